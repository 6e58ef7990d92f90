"""Measures of the attention to each entity and attribute at each step; causes of failures are inferred from them.

The functions take arrays (step, entity, y, x), so that the same numbers can be computed for the whole decoder, for one
layer, or for one head. The *spatial distribution* of an entity is its map minus the minimum, normalized to a sum of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from skimage.measure import label

from elakit.attention.recording import Recording
from elakit.measures.arrays import distribution
from elakit.measures.overlap import ruzicka

# Attention below this counts as zero.
NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class Maps:
    """Attention maps of a prompt's words at one size, and numbers derived from the maps.

    Maps are raw probabilities, float64.

    In the docstrings of the properties, e and f are entities, and a is an attribute.

    Attributes
    ----------
    steps : ndarray, int, (step,)
        Denoiser calls, counted from 0.
    entities : ndarray, (step, entity, y, x)
        Attention to the nouns.
    attributes : ndarray, (step, attribute, y, x)
        Attention to the attributes.
    owners : tuple of int
        Index of the entity that each attribute belongs to.
    start : ndarray, (step, y, x)
        Attention to start-of-text; zeros if this token was not recorded.
    end : ndarray, (step, y, x)
        Summed attention to end-of-text and padding; zeros if these tokens were not recorded.
    words : ndarray, (step, y, x)
        Mean attention to the recorded words that belong to no entity; zeros if no such word was recorded.
    """

    steps: np.ndarray
    entities: np.ndarray
    attributes: np.ndarray
    owners: tuple[int, ...]
    start: np.ndarray
    end: np.ndarray
    words: np.ndarray

    @cached_property
    def presence(self) -> np.ndarray:
        """Maximum of each entity's map, divided by the largest of these maxima at the same step, (step, entity)."""
        peaks = self.entities.max(axis=(-2, -1))
        return peaks / np.maximum(peaks.max(axis=-1, keepdims=True), NOTHING)

    @cached_property
    def standing(self) -> np.ndarray:
        """Attention to each entity, divided by the attention to the entity and `words` together, (step, entity).

        `words` is the mean attention to the words that belong to no entity. The quotient is averaged over the
        locations. Locations where the entity's map is strong have large weights (see `freed`). If `words` is zero, the
        result is 1.
        """
        return 1.0 - held_by(self.entities, self.words)

    @cached_property
    def localized(self) -> np.ndarray:
        """Degree to which each entity's map is localized, (step, entity), as `localization` computes it.

        The value is 0 for a constant map, and 1 if all attention is at one location.
        """
        return localization(self.entities)

    @cached_property
    def held(self) -> np.ndarray:
        """Attention to entity f, divided by the attention to entities e and f together, (step, e, f).

        This quotient is averaged over the locations. Locations where the map of e is strong have large weights (see
        `freed`).
        """
        others = [held_by(self.entities, self.entities[:, f]) for f in range(self.entities.shape[1])]
        return np.stack(others, axis=-1)

    @cached_property
    def start_held(self) -> np.ndarray:
        """Attention to start-of-text, divided by the attention to start-of-text and entity e together, (step, e).

        This quotient is averaged over the locations. Locations where the map of e is strong have large weights (see
        `freed`).
        """
        return held_by(self.entities, self.start)

    @cached_property
    def alike(self) -> np.ndarray:
        """Ruzicka similarity of the spatial distributions of entities e and f, (step, e, f).

        A spatial distribution is a map minus its minimum, normalized to a sum of 1. The similarity is 1 if two
        distributions are equal, and 0 if they share no location.
        """
        return overlap(self.entities, self.entities)

    @cached_property
    def astray(self) -> np.ndarray:
        """Degree to which each attribute is attended to at entity f instead of at its own entity, (step, attribute, f).

        The value is A(f) / (A(f) + A(own)). A(f) is the attention to the attribute, averaged over the locations.
        Locations where the map of f is strong have large weights (see `freed`). A(own) is the same mean, with weights
        from the map of the attribute's own entity. The value is .5 if A(f) and A(own) are equal, and 1 if the attribute
        is attended to only at the locations of f.
        """
        there = np.stack([mean_attention(self.entities, each) for each in np.moveaxis(self.attributes, 1, 0)], axis=1)
        own = np.take_along_axis(there, np.array(self.owners, int).reshape(1, -1, 1), axis=-1)
        return there / np.maximum(there + own, NOTHING)

    @cached_property
    def attribute_held(self) -> np.ndarray:
        """Attention to attribute a, divided by the attention to attribute a and entity f together, (step, a, f).

        This quotient is averaged over the locations. Locations where the map of f is strong have large weights (see
        `freed`).
        """
        return np.stack([held_by(self.entities, each) for each in np.moveaxis(self.attributes, 1, 0)], axis=1)

    @cached_property
    def split(self) -> np.ndarray:
        """Degree to which each entity's map has two separate parts, (step, entity), as `parted` computes it.

        The value is 0 for a map with one part, and 1 for two equal parts that are far apart.
        """
        found = [parted(one) for one in spatial_distribution(self.entities).reshape(-1, *self.entities.shape[-2:])]
        return np.array(found).reshape(self.entities.shape[:2])

    @cached_property
    def swap(self) -> np.ndarray:
        """Degree to which the maps of two entities exchange places at each step, (step, e, f), as `swaps` computes it.

        The value is positive if the maps exchange places, and negative if one or both maps stay in place.
        """
        return swaps(self.entities)


def read(recording: Recording, layers: str = "all", size: int | None = None) -> Maps:
    """Read the maps of the entities, attributes and special tokens from a recording, averaged over layers and heads.

    Parameters
    ----------
    recording : Recording
        A recording; to read one head of a layer, pass the result of `Recording.sel`.
    layers : str
        Layers to average: "all", a place such as "up", or the name of a layer, as `Recording.maps` takes them.
    size : int, optional
        Only maps of this size are read: the number of locations along the longer side. By default, maps of all sizes
        are read and resized to the largest size.

    Returns
    -------
    Maps

    Raises
    ------
    RecordingError
        An entity, an attribute of an entity, or the requested layer or size was not recorded.
    """
    prompt, kept = recording.prompt, recording.tokens

    def values(tokens: Any) -> np.ndarray:
        return recording.maps(tokens, layers, size).values.astype(np.float64)

    entities = recording.maps("entities", layers, size)
    nothing = np.zeros_like(entities.values[:, 0], dtype=np.float64)
    attributes = np.zeros((len(nothing), 0, *nothing.shape[1:]))
    owners: tuple[int, ...] = ()
    if any(entity.attributes for entity in prompt.entities):
        maps = recording.maps("attributes", layers, size)
        labels = [entity.label for entity in prompt.entities]
        attributes = maps.values.astype(np.float64)
        owners = tuple(labels.index(owner) for owner in maps.entity.values.tolist())
    taken = {i for entity in prompt.entities for i in (*entity.token_indices, *entity.attribute_indices)}
    idle = [t.label for t in prompt.tokens if t.index not in taken and t.label in kept and t.text.isalpha()]
    return Maps(
        steps=np.asarray(entities.step.values),
        entities=entities.values.astype(np.float64),
        attributes=attributes,
        owners=owners,
        start=values("<start>")[:, 0] if "<start>" in kept else nothing,
        end=values("<end>")[:, 0] if "<end>" in kept else nothing,
        words=values(idle).mean(1) if idle else nothing,
    )


def spatial_distribution(maps: np.ndarray) -> np.ndarray:
    """Spatial distributions of maps: each map minus its minimum, normalized to a sum of 1, (..., y, x).

    Examples
    --------
    >>> spatial_distribution(np.array([[1.0, 1.0, 4.0, 2.0]])).tolist()
    [[0.0, 0.0, 0.75, 0.25]]
    """
    return distribution(maps - maps.min(axis=(-2, -1), keepdims=True))


def freed(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Weights for a mean over the locations, large where an entity's map is strong, (step, entity, y, x).

    The weights are computed as if a rival token took no attention from the entity. Attention sums to 1 over the tokens.
    Without the rival, the attention A to an entity would therefore be B = A / (1 - rival). For each entity, the minimum
    of B is subtracted, the result is squared, and the squares are normalized to a sum of 1. Because of the squares, the
    few locations where B is large count more than the many where B is small.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)
        Attention to the entities.
    rival : ndarray, (step, y, x)
        Attention to the rival token.
    """
    return distribution(spatial_distribution(maps / np.maximum(1.0 - rival[:, None], NOTHING)) ** 2)


def held_by(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Attention to a rival token, divided by the attention to the rival and an entity together.

    This quotient is averaged over the locations. Locations where the entity's map is strong have large weights.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)
        Attention to the entities.
    rival : ndarray, (step, y, x)
        Attention to the rival token.

    Returns
    -------
    ndarray, (step, entity)
        Mean of rival / (rival + map) over the locations, with the weights that `freed` returns. The mean is 1 if only
        the rival is attended to, .5 if the rival and the entity are attended to equally, and 0 if the rival is not
        attended to.

    Examples
    --------
    One step, two entities and two locations. The first entity is attended to only at the second location, where the
    share of the rival is 0.6 / (0.6 + 0.2) = 0.75. The map of the second entity is equal to the map of the rival:

    >>> held_by(np.array([[[[0.0, 0.2]], [[0.5, 0.6]]]]), np.array([[[0.5, 0.6]]])).round(2).tolist()
    [[0.75, 0.5]]
    """
    share = rival[:, None] / np.maximum(rival[:, None] + maps, NOTHING)
    return np.asarray((freed(maps, rival) * share).sum(axis=(-2, -1)))


def mean_attention(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Attention to a rival token at the locations of each entity, (step, entity).

    The attention is averaged over the locations. The weights of `freed` are large where the entity's map is strong.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)
        Attention to the entities.
    rival : ndarray, (step, y, x)
        Attention to the rival token.
    """
    return np.asarray((freed(maps, rival) * rival[:, None]).sum(axis=(-2, -1)))


def localization(maps: np.ndarray) -> np.ndarray:
    """Degree to which maps are localized: 1 - entropy / log(number of locations).

    The degree is 0 for a constant map, and 1 if all attention is at one location. Maps of shape (..., y, x) give values
    of shape (...).

    Examples
    --------
    >>> localization(np.array([[[1.0, 1.0]], [[0.0, 3.0]]])).tolist()
    [0.0, 1.0]
    """
    p = distribution(maps)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=(-2, -1))
    return np.asarray(1.0 - entropy / np.log(max(p.shape[-1] * p.shape[-2], 2)))


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Ruzicka similarity of every map in `a` with every map in `b`, (step, a, b).

    The maps, (step, map, y, x), are compared as spatial distributions: each map minus its minimum is normalized to a
    sum of 1. The similarity is 1 for equal distributions, and 0 for distributions that share no location.
    """
    return np.asarray(ruzicka(spatial_distribution(a)[:, :, None], spatial_distribution(b)[:, None, :]))


def parted(density: np.ndarray) -> float:
    """Degree to which a spatial distribution has two separate parts.

    Parameters
    ----------
    density : ndarray, (y, x)
        A spatial distribution, as `spatial_distribution` returns it; its scale does not matter.

    Returns
    -------
    float
        0 for one part, 1 for two equal parts whose centers are at least half the map's longer side apart.

    Notes
    -----
    The density is squared. Locations count if the squared density exceeds a quarter of its maximum. Neighboring
    locations that count, also diagonal neighbors, form a part. The weight of a part is the sum of the squared density
    over its locations. The result is the product of two factors, computed from the two parts with the largest weights:

    - the smaller weight, divided by the larger weight;
    - the distance between the centers of the two parts, divided by half the longer side of the map, but at most 1.

    Examples
    --------
    The first density has two equal parts, 3 locations apart on a map with 4 locations. The second has one part:

    >>> parted(np.array([[2.0, 0.0, 0.0, 2.0]])), parted(np.array([[2.0, 2.0, 0.0, 0.0]]))
    (1.0, 0.0)
    """
    weight = density**2
    parts, count = label(weight > weight.max() / 4, connectivity=2, return_num=True)
    if count < 2:
        return 0.0
    sums = np.bincount(parts.ravel(), weights=weight.ravel())[1:]
    second, first = np.argsort(sums)[-2:]
    centers = [np.argwhere(parts == which + 1).mean(0) for which in (first, second)]
    distance = float(np.linalg.norm(centers[0] - centers[1])) / (max(density.shape) / 2)
    return float(sums[second] / max(sums[first], NOTHING)) * min(distance, 1.0)


def swaps(maps: np.ndarray) -> np.ndarray:
    """Degree to which the maps of two entities exchange places at each step.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)
        Attention to the entities.

    Returns
    -------
    ndarray, (step, e, f)
        Positive if the new map of each entity resembles the former map of the other entity more than its own former
        map. Negative if the new map of one or both entities resembles its own former map more.

    Notes
    -----
    O(e, f) is the Ruzicka similarity of the new map of e and the former map of f. The value is the smaller of two
    differences: O(e, f) - O(e, e) and O(f, e) - O(f, f).

    Each map is first converted to its spatial distribution (see `spatial_distribution`). New and former maps are means
    over w steps. The number w is an eighth of the number of steps, rounded down, but at least 1. The former map is the
    mean over the w steps before the current step. The new map is the mean over the current step and the w - 1 steps
    that follow. The value is 0 at the first w steps, which have no complete former map, and at the last w - 1 steps,
    which have no complete new map.

    Examples
    --------
    Two maps exchange places at the third of four steps. Four steps give w = 1, so only the first step has no former
    map. At the second and the fourth step, both maps stay in place:

    >>> left, right = [[1.0, 0.0]], [[0.0, 1.0]]
    >>> swaps(np.array([[left, right], [left, right], [right, left], [right, left]]))[:, 0, 1].tolist()
    [0.0, -1.0, 1.0, -1.0]
    """
    steps, width = len(maps), max(len(maps) // 8, 1)
    found = np.zeros((steps, maps.shape[1], maps.shape[1]))
    density = spatial_distribution(maps)
    for step in range(width, steps - width + 1):
        before = density[step - width : step].mean(0, keepdims=True)
        after = density[step : step + width].mean(0, keepdims=True)
        moved = overlap(after, before)[0]  # (e after, f before)
        toward = moved - np.diagonal(moved)[:, None]
        found[step] = np.minimum(toward, toward.T)
    return found
