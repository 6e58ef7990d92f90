"""Checks and resampling of attention maps and masks.

The last two dimensions of maps and masks are (y, x), and there may be any number of leading dimensions. `as_array`,
`as_maps`, `as_masks` and `distribution` accept arrays, tensors, nested lists and DataArrays. The dimensions of a
DataArray are found by name and may be in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import xarray as xr

from elakit.checks import is_whole
from elakit.errors import SettingError, clause
from elakit.numbering import number_of

__all__ = [
    "area_mean",
    "as_array",
    "as_maps",
    "as_masks",
    "broadcast",
    "distribution",
    "nearest_size",
    "ratio",
    "resize",
    "same_size",
]

# Dimension that lists maps or masks; it comes directly before (y, x).
_LISTS = ("entity", "token", "attribute", "region", "thing")


def as_array(values: Any, name: str) -> np.ndarray:
    """Convert finite, non-negative values to a new float64 array.

    Parameters
    ----------
    values : array, tensor, DataArray or nested sequence
        Tensors may be on any device, have any precision, and may require gradients. The dimensions of a DataArray may
        be in any order.
    name : str
        Name of the values in error messages.

    Returns
    -------
    float64 array
        The given values. A DataArray with the dimensions y and x is transposed to (..., y, x). If it also has a
        dimension entity, token, attribute, region or thing, this dimension is moved directly before y.

    Raises
    ------
    SettingError
        Some values are masked, NaN, infinite, negative or not numbers. A DataArray has y but not x, or x but not y. A
        DataArray with y and x has more than one of the dimensions entity, token, attribute, region and thing.

    Examples
    --------
    A DataArray (x, y) with one x and two y is returned as (y, x), two rows of one column. NaN is refused:

    >>> as_array(xr.DataArray([[1, 2]], dims=("x", "y")), "maps").tolist()
    [[1.0], [2.0]]
    >>> as_array([0.5, float("nan")], "maps")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: maps: 1 of 2 values is NaN or infinite; all must be finite ...
    """
    if isinstance(values, xr.DataArray):
        values = _named(values, name)
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()  # numpy has no bfloat16
    parts = values if isinstance(values, list | tuple) else [values]
    if masked := sum(int(np.ma.getmaskarray(part).sum()) for part in parts if isinstance(part, np.ma.MaskedArray)):
        raise SettingError(
            f"{name}: {number_of(masked, 'value')} {'is' if masked == 1 else 'are'} masked, and measures cannot skip "
            "masked values; fill them first, for instance with values.filled(0)."
        )
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"{name} cannot be read as an array of numbers: {clause(error)}. Give an array, or lists of equal lengths."
        ) from None
    if bad := int((~np.isfinite(array)).sum()):
        raise SettingError(
            f"{name}: {bad} of {number_of(array.size, 'value')} {'is' if bad == 1 else 'are'} NaN or infinite; all "
            "must be finite (half precision may have overflowed: try dtype float32)."
        )
    if array.size and array.min() < 0:
        raise SettingError(
            f"{name}: the lowest value is {array.min():g}; give values that are never negative, such as probabilities."
        )
    return array


def as_maps(values: Any, name: str) -> np.ndarray:
    """Convert maps to a float64 array (..., y, x).

    `values` are the maps, as in :func:`as_array`, and `name` is their name in error messages. A SettingError is raised
    for the values that `as_array` refuses, such as NaN, infinite or negative values. A SettingError is also raised if
    there are fewer than two dimensions, or if y or x has the length 0.
    """
    maps = as_array(values, name)
    if maps.ndim < 2 or 0 in maps.shape[-2:]:
        raise SettingError(f"{name}: the shape is {maps.shape}; it must be (..., y, x) with at least one location.")
    return maps


def as_masks(values: Any, name: str) -> np.ndarray:
    """Convert masks to a bool array (..., y, x).

    `values` are the masks, as in :func:`as_array`, and `name` is their name in error messages. A SettingError is raised
    if a value is not 0 or 1, or if there are fewer than two dimensions.
    """
    masks = as_array(values, name)
    if masks.ndim < 2 or 0 in masks.shape[-2:]:
        raise SettingError(
            f"{name}: the shape is {masks.shape}; give boolean masks (..., y, x) with at least one location."
        )
    if (other := (masks != 0) & (masks != 1)).any():
        raise SettingError(
            f"{name}: the value {masks[other][0]:g} occurs; give boolean masks, with values 0 and 1 only. Binarize "
            "maps first, for instance with elakit.measures.masks.otsu_masks."
        )
    return masks.astype(bool)


def same_size(a: np.ndarray, b: np.ndarray) -> None:
    """Raise SettingError if the spatial sizes (y, x) of two arrays differ."""
    if a.shape[-2:] != b.shape[-2:]:
        raise SettingError(
            f"The sizes (y, x) of two arrays must be equal, not {a.shape[-2:]} and {b.shape[-2:]}. Resize one: "
            "maps with elakit.measures.arrays.resize, masks with elakit.measures.masks.downscale."
        )


def broadcast(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Broadcast the leading dimensions of two arrays (..., y, x).

    Raise SettingError if the sizes (y, x) differ, or if the leading dimensions cannot be broadcast.
    """
    same_size(a, b)
    try:
        a, b = np.broadcast_arrays(a, b)
    except ValueError:
        raise SettingError(
            f"The leading dimensions of two arrays must match, not {a.shape[:-2]} and {b.shape[:-2]}. Give each "
            "dimension the same length in both arrays, or the length 1 in one of them."
        ) from None
    return a, b


def ratio(part: Any, whole: Any, undefined: float = 0.0) -> Any:
    """Quotient part / whole, with the value `undefined` where whole is 0.

    Examples
    --------
    >>> ratio([1, 2], [4, 0]).tolist()
    [0.25, 0.0]
    """
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), undefined)[()]


def distribution(maps: Any) -> np.ndarray:
    """Scale each map so that its values sum to 1 over all locations.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Finite and not negative.

    Returns
    -------
    float64 array, (..., y, x)
        Scaled maps. A map of zeros becomes uniform.

    Raises
    ------
    SettingError
        Values are NaN, infinite or negative, or the maps have no locations.

    Examples
    --------
    >>> distribution([[[1., 3.]], [[0., 0.]]]).tolist()
    [[[0.25, 0.75]], [[0.5, 0.5]]]
    """
    values = as_maps(maps, "maps")
    # Dividing by the maximum first keeps sums of subnormal numbers from vanishing or overflowing.
    top = values.max(axis=(-2, -1), keepdims=True)
    values = np.where(top > 0, values / np.where(top > 0, top, 1.0), 1.0)
    return values / values.sum(axis=(-2, -1), keepdims=True)


def area_mean(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Area-weighted mean of values over a grid of equal boxes.

    Parameters
    ----------
    values : array, (..., y, x)
    size : (int, int)
        Number of rows and columns of the grid of boxes. The border of a box may cut through pixels.

    Returns
    -------
    float64 array, (..., rows, columns)
        Mean of each box. A pixel that lies in several boxes counts in each box with the area inside the box.

    Raises
    ------
    SettingError
        `values` has no pixels, or `size` is not two whole numbers of at least 1.

    Examples
    --------
    Each of two boxes covers one and a half of three pixels: a pixel with the value 0 and half of the pixel with the
    value 6. The mean is 3 / 1.5:

    >>> area_mean(np.array([[0., 6., 0.]]), (1, 2)).tolist()
    [[2.0, 2.0]]
    """
    if 0 in values.shape[-2:]:
        raise SettingError(
            f"The values have shape {values.shape}; the shape must be (..., y, x) with at least one pixel."
        )
    if len(size) != 2 or not all(is_whole(side) and side >= 1 for side in size):
        raise SettingError(f"size={size!r}; give rows and columns, two whole numbers, 1 or more.")
    down, across = (_shared_lengths(old, int(new)) for old, new in zip(values.shape[-2:], size, strict=True))
    # Whole numbers up to the division, so that exactly half stays half.
    total: np.ndarray = down @ values.astype(np.float64) @ across.T
    return total / (values.shape[-2] * values.shape[-1])


def resize(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize maps: linear interpolation along a side that grows, area-weighted mean along a side that shrinks.

    Parameters
    ----------
    maps : ndarray, float, (..., y, x)
    size : (int, int)
        Rows and columns of the result.

    Returns
    -------
    ndarray, (..., rows, columns)
        Resized maps of the same dtype. A map that shrinks along both sides keeps its mean.

    Examples
    --------
    The first map shrinks to its mean, 12 / 4. The second map shrinks to two locations, each the mean of one and a
    half locations, 3 / 1.5. In the last example, two maps grow from 3 to 6 rows and from 3 to 5 columns:

    >>> resize(np.array([[0.0, 4.0], [8.0, 0.0]]), (1, 1))
    array([[3.]])
    >>> resize(np.array([[0.0, 6.0, 0.0]]), (1, 2))
    array([[2., 2.]])
    >>> resize(np.ones((2, 3, 3)), (6, 5)).shape
    (2, 6, 5)
    """
    rows, columns = maps.shape[-2:]
    if columns != size[1]:
        maps = maps @ _weights(columns, size[1]).T.astype(maps.dtype)
    if rows != size[0]:
        maps = _weights(rows, size[0]).astype(maps.dtype) @ maps
    return maps


def nearest_size(sizes: Iterable[int], target: int = 16) -> int:
    """Map size that is nearest to a target by ratio; the smaller size on a tie.

    The ratio is size / target or target / size, whichever is larger. The default target is 16, because the published
    methods read attention at 16 x 16 for images of 512 x 512 pixels.

    Parameters
    ----------
    sizes : iterable of int
        Sizes to choose from: the number of locations along the longer side of each available map.
    target : int
        Desired size.

    Returns
    -------
    int
        The nearest size.

    Raises
    ------
    SettingError
        `sizes` is empty.

    Examples
    --------
    In the first example, 24 has the smallest ratio, 24 / 16 = 1.5. In the second example, both sizes have the ratio 2,
    so the smaller size is returned:

    >>> nearest_size([8, 24, 64]), nearest_size([8, 32])
    (24, 8)
    """
    sides = sorted(set(sizes))
    if not sides:
        raise SettingError("There are no maps to choose a size from; record at least one cross-attention layer.")
    return min(sides, key=lambda side: (abs(np.log(side / target)), side))


def _named(values: xr.DataArray, name: str) -> np.ndarray:
    """Values of a DataArray, with the dimensions y and x moved to the end.

    If the DataArray also has a dimension entity, token, attribute, region or thing, this dimension is moved directly
    before y. Without y and x, the order of the dimensions does not change. A `SettingError` is raised if the DataArray
    has y but not x, or x but not y. It is also raised if several dimensions would have to come directly before y.
    """
    spatial = [dim for dim in ("y", "x") if dim in values.dims]
    if len(spatial) == 1:
        raise SettingError(f"{name}: the dimensions are {values.dims}; both y and x are needed, or neither.")
    listed = [dim for dim in _LISTS if dim in values.dims] if spatial else []
    if len(listed) > 1:
        raise SettingError(f"{name}: the dimensions are {values.dims}; only one of {', '.join(listed)} is allowed.")
    return np.asarray(values.transpose(..., *listed, *spatial).values)


def _shared_lengths(old: int, new: int) -> np.ndarray:
    """Length of the overlap of each new interval with each old interval of a line, as an array (new, old).

    The line is divided into `old` equal intervals, and also into `new` equal intervals. The line has the length
    new * old, so all lengths are whole numbers.

    Examples
    --------
    The line has the length 6. The three old intervals have the length 2, and the two new intervals the length 3:

    >>> _shared_lengths(3, 2)
    array([[2., 1., 0.],
           [0., 1., 2.]])
    """
    olds, news = np.arange(old) * new, np.arange(new)[:, None] * old
    return np.clip(np.minimum(news + old, olds + new) - np.maximum(news, olds), 0, None).astype(np.float64)


@lru_cache(maxsize=64)
def _weights(old: int, new: int) -> np.ndarray:
    """Weights that resize a line of `old` values to `new` values, as an array (new, old) whose rows sum to 1.

    The weights are those of an area-weighted mean if the line shrinks, and of linear interpolation otherwise.
    """
    if new < old:
        return _shared_lengths(old, new) / old
    centers = ((np.arange(new) + 0.5) * (old / new) - 0.5).clip(0, old - 1)
    left = np.minimum(centers.astype(int), max(old - 2, 0))
    share = centers - left
    weights = np.zeros((new, old))
    weights[np.arange(new), left] = 1 - share
    weights[np.arange(new), np.minimum(left + 1, old - 1)] += share
    return weights
