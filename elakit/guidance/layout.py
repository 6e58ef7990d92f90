"""Regions given by hand, as boxes or masks."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from elakit.errors import SettingError
from elakit.measures.masks import downscale
from elakit.numbering import number_of

Box = tuple[float, float, float, float]
Region = Box | np.ndarray
Layout = Sequence[Region | None] | np.ndarray


def check_layout(layout: Any, who: str, *, partial: bool = False) -> Layout:
    """Check a layout of regions given by hand, and return it with its boxes as tuples of floats.

    Parameters
    ----------
    layout : sequence of boxes or masks, or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt. A region in a sequence is a box or a mask. A box is
        (left, top, right, bottom), as fractions of the image from 0 to 1. A mask is a bool array (y, x). An array
        holds the masks of all entities.
    who : str
        Name of the class or function that the layout was passed to, for the message of the error.
    partial : bool
        Whether the layout may have None instead of a region, for an entity that is to be localized.

    Returns
    -------
    tuple, or ndarray, bool, (entity, y, x)
        The same regions. A sequence is returned as a tuple, in which each box is a tuple of floats.

    Raises
    ------
    SettingError
        The argument is not a layout, a box has no area or leaves the image, or a mask is empty.

    Examples
    --------
    >>> check_layout([(0, 0, 0.5, 1), (0.5, 0, 1, 1)], "ELA")
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> check_layout([None, (0.5, 0, 1, 1)], "ELA", partial=True)
    (None, (0.5, 0.0, 1.0, 1.0))
    """
    how = (
        "Give one box per entity, such as (0, 0, 0.5, 1), or boolean masks (entity, y, x). A box is (left, top, right, "
        "bottom) as fractions of the image, with left < right and top < bottom."
        f"{' Give None for an entity that is to be localized.' if partial else ''}"
    )
    if isinstance(layout, np.ndarray) and layout.ndim == 3 and layout.dtype == np.bool_:
        if empty := [i for i, mask in enumerate(layout) if not mask.any()]:
            raise SettingError(f"{who}: mask {empty[0]} is empty: no location is True. {how}")
        return layout
    try:
        regions = tuple(None if partial and region is None else _region(region) for region in layout)
    except (TypeError, ValueError) as error:
        raise SettingError(f"{who}: {reprlib.repr(layout)} is not a layout. {how}") from error
    for i, region in enumerate(regions):
        if isinstance(region, np.ndarray):
            if not region.any():
                raise SettingError(f"{who}: mask {i} is empty: no location is True. {how}")
        elif region is not None and not (
            len(region) == 4 and 0 <= region[0] < region[2] <= 1 and 0 <= region[1] < region[3] <= 1
        ):
            raise SettingError(f"{who}: {region} is not a box within the image. {how}")
    return regions


@dataclass(frozen=True)
class NeedsLayout:
    """Base class of methods that require one region per entity; regions cannot be changed during a run.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks; they may overlap.

    Raises
    ------
    SettingError
        No regions are given, or a region is empty or leaves the image.
    """

    regions: Layout

    takes_regions: ClassVar[bool] = True
    needs_regions: ClassVar[bool] = True
    steerable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", check_layout(self.regions, f"{type(self).__name__}(regions=...)"))


def _region(region: Any) -> Region:
    if isinstance(region, np.ndarray) and region.ndim == 2 and region.dtype == np.bool_:
        return region
    return tuple(float(side) for side in region)  # type: ignore[return-value]


def layout_masks(layout: Layout, size: tuple[int, int], entities: int, *, truncate: bool = False) -> np.ndarray:
    """Masks of a layout on the grid of a map.

    Parameters
    ----------
    layout : boxes or masks
        Result of `check_layout`.
    size : tuple of int
        (rows, columns) of the map.
    entities : int
        Number of entities in the prompt.
    truncate : bool
        Rule for the locations of a box. If False, a box has the locations whose center lies in it. If True, the corners
        are rounded down: the columns are int(left * columns) to int(right * columns) - 1, and rows likewise. A box that
        is empty after rounding follows the rule for False.

    Returns
    -------
    ndarray, bool, (entity, y, x)
        Locations of each region. If a box has no location by these rules, it gets the location that contains its
        center. A region given as a mask has the locations that it covers by more than half. If there are no such
        locations, it gets the location with the largest covered share. The mask of an entity whose region is None is
        empty.

    Raises
    ------
    SettingError
        The number of regions differs from the number of entities.

    Examples
    --------
    >>> layout_masks([(0, 0, 0.5, 1), (0.9, 0, 1, 0.1)], (2, 4), 2).astype(int).tolist()
    [[[1, 1, 0, 0], [1, 1, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]]]
    """
    if len(layout) != entities:
        raise SettingError(
            f"The layout has {number_of(len(layout), 'region')}, but the prompt has {number_of(entities, 'entity')}. "
            "Give one region per entity, in the order of the prompt."
        )
    if isinstance(layout, np.ndarray):
        return downscale(layout, size)
    return np.stack([_on_grid(region, size, truncate) for region in layout])


def _on_grid(region: Region | None, size: tuple[int, int], truncate: bool) -> np.ndarray:
    if region is None:
        return np.zeros(size, bool)
    if isinstance(region, np.ndarray):
        return downscale(region[None], size)[0]
    return _truncated(region, size) if truncate else _inside(region, size)


def _truncated(box: Box, size: tuple[int, int]) -> np.ndarray:
    """Locations of a box whose corners are rounded down to whole locations, as a bool array (y, x).

    If the rounded box is empty, its locations are those whose center lies in the box. If there are no such locations,
    the box has the location that contains its center.
    """
    rows, columns = size
    inside = np.zeros(size, bool)
    inside[int(box[1] * rows) : int(box[3] * rows), int(box[0] * columns) : int(box[2] * columns)] = True
    return inside if inside.any() else _inside(box, size)


def apart(masks: np.ndarray) -> np.ndarray:
    """Disjoint masks: a location that belongs to several masks is assigned to the smallest of them.

    Parameters
    ----------
    masks : ndarray, bool, (entity, y, x)

    Returns
    -------
    ndarray, bool, (entity, y, x)

    Examples
    --------
    >>> apart(np.array([[[1, 1, 1]], [[0, 1, 1]]], bool)).astype(int).tolist()
    [[[1, 0, 0]], [[0, 1, 1]]]
    """
    free = np.ones(masks.shape[1:], bool)
    result = np.zeros_like(masks)
    for i in np.argsort(masks.sum((1, 2)), kind="stable"):
        result[i] = masks[i] & free
        free &= ~masks[i]
    return result


def _inside(box: Box, size: tuple[int, int]) -> np.ndarray:
    """Locations whose center lies in a box; if there are none, the location that contains the box's center.

    The result is a bool array (y, x).
    """
    rows, columns = ((np.arange(n) + 0.5) / n for n in size)
    inside = ((rows >= box[1]) & (rows <= box[3]))[:, None] & ((columns >= box[0]) & (columns <= box[2]))
    if not inside.any():
        inside[int((box[1] + box[3]) / 2 * size[0]), int((box[0] + box[2]) / 2 * size[1])] = True
    return inside
