"""Stages of localization: preparation, differentiation, binarization, components and the floor on area.

`localize` runs them in this order and describes their options.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from elakit.measures.masks import is_constant, otsu_thresholds


def prepare(
    values: np.ndarray, background: np.ndarray | None, smooth: float, normalize: bool, subtract_pedestal: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Smooth and scale maps of entities (entity, y, x) and background (y, x), and subtract the pedestal, as requested.

    The three steps are applied in this order. The pedestal of a map is its smallest value; it is subtracted from the
    maps of entities only, not from the background.
    """
    stack = values if background is None else np.concatenate([values, background[None]])
    if smooth:
        stack = gaussian_filter(stack, sigma=(0, smooth, smooth), mode="reflect")
    if normalize:
        low = stack.min(axis=(1, 2), keepdims=True)
        span = stack.max(axis=(1, 2), keepdims=True) - low
        stack = (stack - low) / np.where(span > 0, span, 1.0)  # a constant map becomes 0
    entities, rest = stack[: len(values)], None if background is None else stack[-1]
    if subtract_pedestal:
        entities = entities - entities.min(axis=(1, 2), keepdims=True)
    return entities, rest


def differentiate(values: np.ndarray, winner: np.ndarray, how: str) -> np.ndarray:
    """Nonnegative scores (entity, y, x) of the entities' maps by a rule `how` of `localize`.

    `winner`, bool (entity, y, x), is True where the map of an entity is the largest.
    """
    count = len(values)
    if how == "none" or count == 1:
        return values
    if how == "argmax":
        return np.where(winner, values, 0.0)
    if how == "subtract-max":
        first, second = np.sort(values, axis=0)[[-1, -2]]
        rivals = np.where(winner, second, first)
    else:
        rivals = (values.sum(axis=0) - values) / (count - 1)
    return np.maximum(values - rivals, 0.0)


def thresholds(
    scores: np.ndarray, background: np.ndarray | None, how: str, threshold: float, quantile: float
) -> np.ndarray:
    """Values that scores must exceed for their locations to be in a region, by a rule `how` of `localize`.

    The result can be broadcast to (entity, y, x).
    """
    if how == "background":
        assert background is not None  # checked by localize
        return threshold * background[None]
    if how == "otsu":
        return otsu_thresholds(scores)
    if how == "mean-std":
        tops = scores.mean(axis=(1, 2), keepdims=True) + scores.std(axis=(1, 2), keepdims=True)
        return np.where(is_constant(scores), scores.max(axis=(1, 2), keepdims=True), tops)
    return np.quantile(scores, quantile, axis=(1, 2), keepdims=True)


def largest_components(mask: np.ndarray, keep: int) -> np.ndarray:
    """Mask that keeps only the `keep` largest connected components (8-neighborhood).

    On a tie, the components that come first in reading order are kept.
    """
    parts, count = label(mask, connectivity=2, return_num=True)
    if count <= keep:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    kept = 1 + np.argsort(-sizes, kind="stable")[:keep]
    return np.isin(parts, kept)


def fill_to_floor(
    masks: np.ndarray, scores: np.ndarray, values: np.ndarray, least: int
) -> tuple[np.ndarray, tuple[bool, ...]]:
    """Disjoint regions with at least `least` locations each, and whether each region grew to reach that number.

    The notes of `localize` state which locations are added.
    """
    count = len(masks)
    held = masks.reshape(count, -1).copy()
    missing = np.maximum(least - held.sum(axis=1), 0)
    floored = tuple(bool(m) for m in missing)
    flat_scores, flat_values = scores.reshape(count, -1), values.reshape(count, -1)
    # lexsort is stable: equal locations stay in reading order.
    order = {e: np.lexsort((-flat_values[e], -flat_scores[e])) for e in range(count) if missing[e]}
    while missing.any():
        available = np.asarray(~held.any(axis=0))
        if not available.any():
            available = held[held.sum(axis=1) > least].any(axis=0)
        offers = []
        for e in (int(i) for i in np.flatnonzero(missing)):
            location = order[e][available[order[e]].argmax()]
            offers.append((flat_scores[e, location], flat_values[e, location], -e, int(location)))
        _, _, minus, location = max(offers)
        held[:, location] = False
        held[-minus, location] = True
        missing[-minus] -= 1
    return held.reshape(masks.shape), floored
