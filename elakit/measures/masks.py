"""Masks: binarization of maps, bounding boxes, and resampling to a coarser grid."""

from __future__ import annotations

from typing import Any

import numpy as np
from skimage.filters import threshold_otsu

from elakit.errors import SettingError
from elakit.measures.arrays import area_mean, as_array, as_masks
from elakit.numbering import number_of

__all__ = ["bounding_box", "check_disjoint", "coverage", "downscale", "is_constant", "otsu_masks", "otsu_thresholds"]


def otsu_masks(maps: Any) -> np.ndarray:
    """Binarize each map separately with Otsu's threshold; the masks may overlap.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Finite and not negative.

    Returns
    -------
    bool array, (..., y, x)
        The mask of a constant map is empty, because no value exceeds the threshold.

    Raises
    ------
    SettingError
        Values are NaN, infinite or negative, or there are fewer than two dimensions.

    References
    ----------
    Otsu, "A threshold selection method from gray-level histograms", 1979.

    Examples
    --------
    >>> otsu_masks([[.1, .1, .9], [.2, .8, 1.]]).astype(int)
    array([[0, 0, 1],
           [0, 1, 1]])
    """
    values = as_array(maps, "maps")
    if values.ndim < 2:
        raise SettingError(
            f"maps have shape {values.shape}; the shape must be (..., y, x). Give each map as a two-dimensional array."
        )
    flat = values.reshape(-1, *values.shape[-2:])
    return (flat > otsu_thresholds(flat)).reshape(values.shape)


def otsu_thresholds(maps: np.ndarray) -> np.ndarray:
    """Otsu's threshold of each map.

    ``maps`` has the shape (n, y, x), and the thresholds have the shape (n, 1, 1). The threshold of a constant map is
    the value of the map.
    """
    thresholds = maps.max(axis=(1, 2), keepdims=True)
    for i in np.flatnonzero(~is_constant(maps)):
        low, span = maps[i].min(), np.ptp(maps[i])
        # Scaled to [0, 1], so that the histogram of a small range is as fine as that of a large one.
        thresholds[i] = low + span * threshold_otsu((maps[i] - low) / span)
    return thresholds


def is_constant(maps: np.ndarray) -> np.ndarray:
    """Test for each map whether all values of the map are equal, up to rounding.

    ``maps`` has the shape (n, y, x), and the bool result has the shape (n, 1, 1).
    """
    high = maps.max(axis=(1, 2), keepdims=True)
    return np.asarray(high - maps.min(axis=(1, 2), keepdims=True) <= 1e-9 * high)


def check_disjoint(masks: np.ndarray) -> None:
    """Raise SettingError if two of the masks (..., region, y, x) overlap."""
    if shared := int((masks.sum(axis=-3) > 1).sum()):
        raise SettingError(
            f"The masks overlap: {number_of(shared, 'location')} {'belongs' if shared == 1 else 'belong'} to more than "
            "one region. Assign each location to at most one region."
        )


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box around a mask.

    Parameters
    ----------
    mask : ndarray, bool, (y, x)

    Returns
    -------
    tuple of int
        (left, top, right, bottom) in pixels; right and bottom are exclusive. All zeros for an empty mask.

    Examples
    --------
    >>> bounding_box(np.array([[0, 0, 0], [0, 1, 1]], bool))
    (1, 1, 3, 2)
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def coverage(masks: Any, size: tuple[int, int]) -> np.ndarray:
    """Resample masks to a coarser or finer grid; each value is the share of a location that the mask covers.

    Parameters
    ----------
    masks : bool array, (..., y, x)
    size : (int, int)
        Rows and columns of the grid; they need not divide those of the masks.

    Returns
    -------
    float array, (..., rows, columns)
        Covered share of each location's area, 0 to 1.

    Raises
    ------
    SettingError
        The masks have no pixel, or have values other than 0 and 1. Or `size` is not two whole numbers, each at least 1.

    Examples
    --------
    Six pixels, three of them covered, on a grid of four locations of one and a half pixels each:

    >>> coverage([[0, 1, 1, 1, 0, 0]], (1, 4)).round(3).tolist()
    [[0.333, 1.0, 0.667, 0.0]]
    """
    return area_mean(as_masks(masks, "masks"), size)


def downscale(masks: Any, size: tuple[int, int]) -> np.ndarray:
    """Resample masks to a coarser grid.

    A location of the grid belongs to the new mask if the old mask covers more than half of the location's area. If
    no location is covered that much, the new mask has one location: the one with the largest covered share. On a tie,
    this is the first location in reading order. An empty mask stays empty.

    Parameters
    ----------
    masks : bool array, (..., y, x)
    size : (int, int)
        Rows and columns of the grid; they need not divide those of the masks.

    Returns
    -------
    bool array, (..., rows, columns)
        The new masks.

    Raises
    ------
    SettingError
        The masks have no pixel, or have values other than 0 and 1. Or `size` is not two whole numbers, each at least 1.

    Examples
    --------
    On a grid of three locations of 2x2 pixels each, the mask covers four pixels of the first location and one pixel of
    the second. Only the first is covered by more than half:

    >>> downscale([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], (1, 3)).astype(int)
    array([[1, 0, 0]])

    A mask of one pixel covers only a quarter of the second location, and no other location:

    >>> downscale([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], (1, 3)).astype(int)
    array([[0, 1, 0]])
    """
    covered = coverage(masks, size)
    small = covered > 0.5
    lost = covered.any(axis=(-2, -1), keepdims=True) & ~small.any(axis=(-2, -1), keepdims=True)
    flat = covered.reshape(*covered.shape[:-2], -1)
    best = np.arange(flat.shape[-1]) == flat.argmax(axis=-1)[..., None]
    return np.asarray(small | (lost & best.reshape(small.shape)))
