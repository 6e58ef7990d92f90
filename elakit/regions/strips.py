"""Division of an image into strips, one per entity."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from elakit.errors import SettingError
from elakit.measures.arrays import as_array

if TYPE_CHECKING:
    import torch


def divide(maps: np.ndarray | torch.Tensor, free: np.ndarray | None = None) -> np.ndarray:
    """Divide an image into strips of equal width, one per entity, ordered by the centers of the entities' maps.

    Early in a run, maps do not yet show the outline of an entity, but they show which entity is left of another. The
    strips divide the longer side of the image: from top to bottom in a tall image, otherwise from left to right.

    Parameters
    ----------
    maps : array or tensor, (entity, y, x)
        Raw attention probabilities, one map per entity. The lowest value of each map is subtracted from the map before
        the center of the map is computed.
    free : bool array, (y, x), optional
        True at the locations that are divided among the entities; by default all locations. If the free locations are
        not a rectangle, the strips have about equal numbers of free locations instead of equal widths. Each column (or
        row) belongs to one strip.

    Returns
    -------
    bool array, (entity, y, x)
        Every free location is in exactly one mask. With fewer free columns (or rows) than entities, some masks
        are empty.

    Raises
    ------
    SettingError
        `maps` has NaN, infinite or negative values; `maps` is empty or does not have three dimensions; or the shape of
        `free` is not that of one map.

    Examples
    --------
    The attention to the cat is strongest on the right, and the attention to the lion on the left. The lion therefore
    gets the left half:

    >>> cat, lion = [[.2, .2, .3, .3]], [[.1, .4, .1, .1]]
    >>> divide(np.array([cat, lion])).astype(int).tolist()
    [[[0, 0, 1, 1]], [[1, 1, 0, 0]]]
    """
    values = as_array(maps, "maps")
    if values.ndim != 3 or 0 in values.shape:
        raise SettingError(f"maps have shape {values.shape}: give an array (entity, y, x) that is not empty.")
    wide = values.shape[2] >= values.shape[1]
    open_ = np.ones(values.shape[1:], bool) if free is None else np.asarray(free, bool)
    if open_.shape != values.shape[1:]:
        raise SettingError(
            f"free has shape {open_.shape}, but each map has {values.shape[1:]}. free must have the shape of one map."
        )
    if not wide:
        values, open_ = values.swapaxes(1, 2), open_.T
    along = (values - values.min((1, 2), keepdims=True)).sum(1)  # (entity, x)
    mass = along.sum(1)
    columns = np.arange(values.shape[2]) + 0.5
    # an entity whose map is constant gets the middle
    centers = np.where(mass > 0, along @ columns / np.where(mass > 0, mass, 1), columns.mean())
    order = np.argsort(centers, kind="stable")
    heights = open_.sum(0)
    middle = (heights.cumsum() - heights / 2) / max(1, heights.sum())  # column centers as shares of the free area
    strip = np.minimum((middle * len(values)).astype(int), len(values) - 1)
    masks = np.zeros(values.shape, bool)
    for nth, entity in enumerate(order):
        masks[entity] = open_ & (strip == nth)
    return masks if wide else masks.swapaxes(1, 2)
