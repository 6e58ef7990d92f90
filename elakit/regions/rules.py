"""Stages of localization, one function per stage.

The stages are preparation of the maps, differentiation, binarization, selection of the largest components, and
enlargement of small regions. `localize` runs the stages in this order and describes their options.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from elakit.measures.masks import is_constant, otsu_thresholds


def prepare(
    values: np.ndarray, background: np.ndarray | None, smooth: float, normalize: bool, subtract_pedestal: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Prepare the maps of the entities and the background for localization.

    The maps are smoothed, then scaled to 0..1, then reduced by their pedestal. Each operation is optional.

    Parameters
    ----------
    values : ndarray, float, (entity, y, x)
        Maps of the entities.
    background : ndarray, float, (y, x), or None
        Map of the background, if there is one.
    smooth : float
        Standard deviation of a Gaussian filter, in locations; 0 for no filter.
    normalize : bool
        Whether each map is scaled to 0..1.
    subtract_pedestal : bool
        Whether the pedestal, the smallest value of a map, is subtracted. The background keeps its pedestal.

    Returns
    -------
    values, background
        The prepared maps.
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
    """Compute the scores of the entities from their maps.

    Parameters
    ----------
    values : ndarray, float, (entity, y, x)
        Maps of the entities.
    winner : ndarray, bool, (entity, y, x)
        True where the map of the entity is the largest of all maps.
    how : str
        Rule, a value of the argument ``differentiation`` of `localize`.

    Returns
    -------
    ndarray, float, (entity, y, x)
        Scores, not negative.
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
    """Compute the thresholds of binarization. A location whose score is above the threshold may be in the region.

    Parameters
    ----------
    scores : ndarray, float, (entity, y, x)
        Scores of the entities.
    background : ndarray, float, (y, x), or None
        Map of the background, required by the rule "background".
    how : str
        Rule, a value of the argument ``binarization`` of `localize`.
    threshold : float
        Factor of `background`, for the rule "background".
    quantile : float
        Quantile of the scores, 0 to 1, for the rule "quantile".

    Returns
    -------
    ndarray, float
        Thresholds, of a shape that broadcasts to (entity, y, x).
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
    """Mask of the largest connected components of a mask (8-neighborhood).

    `keep` is the number of components. On a tie, the components that come first in reading order are kept.
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
    """Enlarge regions that have fewer than `least` locations.

    The notes of `localize` state which locations are added.

    Parameters
    ----------
    masks : ndarray, bool, (entity, y, x)
        Disjoint regions of the entities.
    scores : ndarray, float, (entity, y, x)
        Scores of the entities.
    values : ndarray, float, (entity, y, x)
        Maps of the entities, which decide between equal scores.
    least : int
        Smallest area of a region, in locations.

    Returns
    -------
    masks : ndarray, bool, (entity, y, x)
        Disjoint regions with the smallest area or more.
    floored : tuple of bool
        True for each region that was too small.
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
