"""Masks of things: their boxes, and how they look on a coarser grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from elakit.errors import SettingError
from elakit.regions import as_array

__all__ = ["bounding_box", "coverage", "downscale"]


def bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Smallest box around a mask.

    Parameters
    ----------
    mask : ndarray, bool, (y, x)

    Returns
    -------
    tuple of int
        (left, top, right, bottom) in pixels; right and bottom exclusive; zeros for an empty mask.

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
    """Share of each cell's area that a mask covers, when its image is divided into cells.

    Parameters
    ----------
    masks : bool array, (..., y, x)
    size : (int, int)
        Rows and columns of cells; they need not divide those of the masks.

    Returns
    -------
    float array, (..., *size)
        0 to 1.

    Raises
    ------
    SettingError
        Masks that are not boolean or have no pixel; a size below 1.

    Examples
    --------
    Three of six pixels, cut into four cells of one and a half pixels each:

    >>> coverage([[0, 1, 1, 1, 0, 0]], (1, 4)).round(3).tolist()
    [[0.333, 1.0, 0.667, 0.0]]
    """
    return area_mean(as_masks(masks, "masks"), size)


def downscale(masks: Any, size: tuple[int, int]) -> np.ndarray:
    """Bring masks to a coarser grid: cells that are covered by more than half.

    Parameters
    ----------
    masks : bool array, (..., y, x)
    size : (int, int)
        Rows and columns wanted; they need not divide those of the masks.

    Returns
    -------
    bool array, (..., *size)
        A thing too small to fill half a cell keeps the one it covers most (the first in reading order on a tie),
        so only an empty mask comes out empty.

    Raises
    ------
    SettingError
        As :func:`coverage`.

    Examples
    --------
    >>> downscale([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]], (1, 3)).astype(int)
    array([[1, 0, 0]])
    >>> downscale([[0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]], (1, 3)).astype(int)
    array([[0, 1, 0]])
    """
    covered = coverage(masks, size)
    small = covered > 0.5
    lost = covered.any(axis=(-2, -1), keepdims=True) & ~small.any(axis=(-2, -1), keepdims=True)
    flat = covered.reshape(*covered.shape[:-2], -1)
    best = np.arange(flat.shape[-1]) == flat.argmax(axis=-1)[..., None]
    return np.asarray(small | (lost & best.reshape(small.shape)))


def as_masks(masks: Any, what: str) -> np.ndarray:
    """Masks as bool (..., y, x); refuse anything that is not 0 or 1."""
    values = as_array(masks, what)
    if values.ndim < 2 or ((values != 0) & (values != 1)).any():
        raise SettingError(
            f"{what} must be boolean masks (..., y, x); binarize maps first, for instance with otsu_masks"
        )
    return values.astype(bool)


def area_mean(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Mean of values (..., y, x) over each of `size` equal cells, pixels that are cut counting in part."""
    if 0 in values.shape[-2:]:
        raise SettingError(f"masks have shape {values.shape}; they need (..., y, x) with at least one pixel")
    if len(size) != 2 or any(side != int(side) or side < 1 for side in size):
        raise SettingError(f"size={size!r}; give rows and columns, whole numbers of at least 1")
    down, across = (_overlaps(pixels, int(cells)) for pixels, cells in zip(values.shape[-2:], size, strict=True))
    # Whole numbers up to the division, so that exactly half stays half.
    total: np.ndarray = down @ values.astype(np.float64) @ across.T
    return total / (values.shape[-2] * values.shape[-1])


def _overlaps(pixels: int, cells: int) -> np.ndarray:
    """Length that each pixel has in each cell, (cell, pixel), where a pixel is as long as there are cells."""
    pixel, cell = np.arange(pixels) * cells, np.arange(cells)[:, None] * pixels
    return np.clip(np.minimum(cell + pixels, pixel + cells) - np.maximum(cell, pixel), 0, None).astype(np.float64)
