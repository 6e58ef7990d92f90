"""What attention says of each entity and attribute: numbers per step, for causes to be read from.

Plain functions on arrays (step, entity, y, x), so that the same numbers can be taken of the decoder as a whole, of one
layer, or of one head. An entity's *place* is where its map stands out: the map less its lowest value, as a
distribution over space.
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

# Attention below this is taken for none at all.
NOTHING = 1e-9


@dataclass(frozen=True, eq=False)
class Maps:
    """Raw probabilities of one size, and what is read off them.

    Attributes
    ----------
    steps : ndarray, int, (step,)
        Denoiser calls.
    entities : ndarray, (step, entity, y, x)
        Of the nouns.
    attributes : ndarray, (step, attribute, y, x)
    owners : tuple of int
        Number of the entity that each attribute belongs to.
    start, end : ndarray, (step, y, x)
        Start-of-text, and end-of-text with padding; zeros where there is none.
    words : ndarray, (step, y, x)
        Mean of the recorded words that belong to no entity; zeros where there is none.
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
        """Largest attention of each entity, as a share of the most attended one's, (step, entity)."""
        peaks = self.entities.max(axis=(-2, -1))
        return peaks / np.maximum(peaks.max(axis=-1, keepdims=True), NOTHING)

    @cached_property
    def standing(self) -> np.ndarray:
        """Share an entity has of the attention of it and an idle word ("and"), at its place; 1 without such words."""
        return 1.0 - held_by(self.entities, self.words)

    @cached_property
    def localized(self) -> np.ndarray:
        """How far each map is from being everywhere alike, (step, entity); `localization`."""
        return localization(self.entities)

    @cached_property
    def held(self) -> np.ndarray:
        """Share that entity f has of the attention of e and f, at e's place, (step, e, f)."""
        others = [held_by(self.entities, self.entities[:, f]) for f in range(self.entities.shape[1])]
        return np.stack(others, axis=-1)

    @cached_property
    def start_held(self) -> np.ndarray:
        """Share that start-of-text has of the attention of it and e, at e's place, (step, entity)."""
        return held_by(self.entities, self.start)

    @cached_property
    def alike(self) -> np.ndarray:
        """Overlap (Ruzicka) of the places of e and f, (step, e, f)."""
        return overlap(self.entities, self.entities)

    @cached_property
    def astray(self) -> np.ndarray:
        """Attention to an attribute at f's place, as a share of that at f's and at its own entity's, (step, a, f).

        .5: it attends to both alike; 1: to f's place alone. For its own entity .5.
        """
        there = np.stack([at_place(self.entities, each) for each in np.moveaxis(self.attributes, 1, 0)], axis=1)
        own = np.take_along_axis(there, np.array(self.owners, int).reshape(1, -1, 1), axis=-1)
        return there / np.maximum(there + own, NOTHING)

    @cached_property
    def attribute_held(self) -> np.ndarray:
        """Share that attribute a has of the attention of it and of noun f, at f's place, (step, a, f)."""
        return np.stack([held_by(self.entities, each) for each in np.moveaxis(self.attributes, 1, 0)], axis=1)

    @cached_property
    def split(self) -> np.ndarray:
        """How far each place is in two parts that lie apart, (step, entity); `parted`."""
        found = [parted(place) for place in places(self.entities).reshape(-1, *self.entities.shape[-2:])]
        return np.array(found).reshape(self.entities.shape[:2])

    @cached_property
    def swap(self) -> np.ndarray:
        """How much two entities change places about each step, (step, e, f); see `swaps`."""
        return swaps(self.entities)


def read(recording: Recording, layers: str = "all", size: int | None = None) -> Maps:
    """Maps of some layers of a recording, at their own size.

    Parameters
    ----------
    recording : Recording
        `Recording.sel` takes one head of it.
    layers : str
        As in `Recording.maps`.
    size : int, optional
        Only maps whose larger side is this.

    Raises
    ------
    RecordingError
        Entities were not recorded, or there is no such layer.
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
        np.asarray(entities.step.values),
        entities.values.astype(np.float64),
        attributes,
        owners,
        values("<start>")[:, 0] if "<start>" in kept else nothing,
        values("<end>")[:, 0] if "<end>" in kept else nothing,
        values(idle).mean(1) if idle else nothing,
    )


def places(maps: np.ndarray) -> np.ndarray:
    """Where maps stand out: less their lowest value, as distributions over space, (..., y, x).

    Examples
    --------
    >>> places(np.array([[1.0, 1.0, 4.0, 2.0]])).tolist()
    [[0.0, 0.0, 0.75, 0.25]]
    """
    return distribution(maps - maps.min(axis=(-2, -1), keepdims=True))


def freed(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Where maps would stand out if a rival token were not there, weighted to their core, (step, entity, y, x).

    Attention sums to 1 over the tokens, so without the rival a map A would be A / (1 - rival). Squared, so that the few
    cells where a map is strong count more than the many where it is weak.
    """
    return distribution(places(maps / np.maximum(1.0 - rival[:, None], NOTHING)) ** 2)


def held_by(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Share a rival has of the attention of it and each map, where the map would stand out without it.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)
    rival : ndarray, (step, y, x)

    Returns
    -------
    ndarray, (step, entity)
        0: the map has its place to itself; .5: both attend alike; 1: it is the rival's. 0 where neither attends.

    Examples
    --------
    >>> held_by(np.array([[[[0.0, 0.2]], [[0.5, 0.6]]]]), np.array([[[0.5, 0.6]]])).round(2).tolist()
    [[0.75, 0.5]]
    """
    share = rival[:, None] / np.maximum(rival[:, None] + maps, NOTHING)
    return np.asarray((freed(maps, rival) * share).sum(axis=(-2, -1)))


def at_place(maps: np.ndarray, rival: np.ndarray) -> np.ndarray:
    """Attention to a rival where each map would stand out without it, (step, entity)."""
    return np.asarray((freed(maps, rival) * rival[:, None]).sum(axis=(-2, -1)))


def localization(maps: np.ndarray) -> np.ndarray:
    """How far maps are from being everywhere alike: 1 - entropy / log of the cells, (...).

    Examples
    --------
    >>> localization(np.array([[[1.0, 1.0]], [[0.0, 3.0]]])).tolist()
    [0.0, 1.0]
    """
    p = distribution(maps)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(axis=(-2, -1))
    return np.asarray(1.0 - entropy / np.log(max(p.shape[-1] * p.shape[-2], 2)))


def overlap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Overlap (Ruzicka) of the place of every a with that of every b, (step, a, b)."""
    return np.asarray(ruzicka(places(a)[:, :, None], places(b)[:, None, :]))


def parted(place: np.ndarray) -> float:
    """How far a place is in two parts that lie apart: 0 one part, 1 two alike, half the image's side apart.

    Parameters
    ----------
    place : ndarray, (y, x)

    Notes
    -----
    Parts are connected cells of more than a quarter of the largest (squared) value. The result is the second largest
    part's weight as a share of the largest's, times the distance of their centers in half sides, at most 1.

    Examples
    --------
    >>> parted(np.array([[2.0, 0.0, 0.0, 2.0]])), parted(np.array([[2.0, 2.0, 0.0, 0.0]]))
    (1.0, 0.0)
    """
    weight = place**2
    parts, count = label(weight > weight.max() / 4, connectivity=2, return_num=True)
    if count < 2:
        return 0.0
    sums = np.bincount(parts.ravel(), weights=weight.ravel())[1:]
    second, first = np.argsort(sums)[-2:]
    centers = [np.argwhere(parts == which + 1).mean(0) for which in (first, second)]
    distance = float(np.linalg.norm(centers[0] - centers[1])) / (max(place.shape) / 2)
    return float(sums[second] / max(sums[first], NOTHING)) * min(distance, 1.0)


def swaps(maps: np.ndarray) -> np.ndarray:
    """How much entities change places about each step.

    Parameters
    ----------
    maps : ndarray, (step, entity, y, x)

    Returns
    -------
    ndarray, (step, e, f)
        Overlap of e's place after the step with f's before it, less that with e's own before it, and the same of f; the
        lesser of both. Above 0 each is where the other was. "Before" and "after" are the means of an eighth of the
        steps.

    Examples
    --------
    >>> left, right = [[1.0, 0.0]], [[0.0, 1.0]]
    >>> swaps(np.array([[left, right], [left, right], [right, left], [right, left]]))[:, 0, 1].tolist()
    [0.0, -1.0, 1.0, -1.0]
    """
    steps, width = len(maps), max(len(maps) // 8, 1)
    found = np.zeros((steps, maps.shape[1], maps.shape[1]))
    place = places(maps)
    for step in range(width, steps - width + 1):
        before = place[step - width : step].mean(0, keepdims=True)
        after = place[step : step + width].mean(0, keepdims=True)
        moved = overlap(after, before)[0]  # (e after, f before)
        toward = moved - np.diagonal(moved)[:, None]
        found[step] = np.minimum(toward, toward.T)
    return found
