"""How well attention maps agree with the finished image: does attention lie where the entity came to be?

Plain functions on arrays whose last two dimensions are (y, x); dimensions before them broadcast. A mask says
where an entity is in the image, as a judge or a person drew it; :func:`elakit.measures.masks.downscale` brings it to the
maps' grid.
:func:`elakit.bleeding.measure` puts these measures into a run's table.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from scipy.stats import rankdata

from elakit.errors import SettingError
from elakit.measures.masks import as_masks
from elakit.regions import as_array, otsu_masks

if TYPE_CHECKING:
    from elakit.judge import Verdict

__all__ = ["agreement_iou", "auc", "pointing_game", "truth_masks"]


def agreement_iou(maps: Any, masks: Any) -> np.ndarray:
    """Overlap of each map, cut at its Otsu threshold, with the entity's mask: intersection over union.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Where the entity is, on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        0 to 1; NaN where the mask is empty, because there is nothing to agree with. A constant map has nothing
        above its threshold and scores 0.

    Raises
    ------
    SettingError
        Sizes that differ, masks that are not boolean, NaN, infinite or negative values.

    References
    ----------
    Otsu, "A threshold selection method from gray-level histograms", 1979. Tang et al., "What the DAAM:
    Interpreting Stable Diffusion Using Cross Attention", ACL 2023, set attention maps against segmentations of
    the images by IoU too, at thresholds of their own.

    Examples
    --------
    Two cells stand out; one of them is on the cat, which has three:

    >>> float(agreement_iou([[9., 8., 1., 0.]], [[0, 1, 1, 1]]))
    0.25
    """
    values, truth = as_maps(maps, "maps"), as_masks(masks, "masks")
    same_size(values, truth)
    found, truth = broadcast(otsu_masks(values), truth)
    both, either = (found & truth).sum(axis=(-2, -1)), (found | truth).sum(axis=(-2, -1))
    return _where(truth.any(axis=(-2, -1)), both, either)


def auc(maps: Any, masks: Any) -> np.ndarray:
    """Area under the ROC curve of each map as a score for the cells of the mask.

    It is the chance that a cell on the entity has more attention than a cell beside it, a tie counting half. No
    threshold is needed, and only the order of the values counts.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Where the entity is, on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        0 to 1; .5 is what a constant map scores, 1 a map that is larger everywhere on the entity than anywhere
        beside it. NaN where the mask is empty or full.

    Raises
    ------
    SettingError
        Sizes that differ, masks that are not boolean, NaN, infinite or negative values.

    References
    ----------
    Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve",
    Radiology 143, 1982 (ranks, ties by mid-ranks).

    Examples
    --------
    Of the four pairs (cell on it, cell beside it), 3 > 1 and 3 > 2 are right, 2 > 1 too, and 2 = 2 counts half:

    >>> float(auc([[3., 2., 2., 1.]], [[1, 1, 0, 0]]))
    0.875
    """
    values, truth = as_maps(maps, "maps"), as_masks(masks, "masks")
    same_size(values, truth)
    ranks = rankdata(values.reshape(*values.shape[:-2], -1), axis=-1).reshape(values.shape)
    ranks, truth = broadcast(ranks, truth)
    inside = truth.sum(axis=(-2, -1))
    outside = truth.shape[-2] * truth.shape[-1] - inside
    # The Mann-Whitney statistic: ranks of the cells inside, less what they would have among themselves.
    won = (ranks * truth).sum(axis=(-2, -1)) - inside * (inside + 1) / 2
    pairs = inside * outside
    return _where(pairs > 0, won, pairs)


def pointing_game(maps: Any, masks: Any) -> np.ndarray:
    """Does the largest value of each map lie on the entity?

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Where the entity is, on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        1 for a hit, 0 for a miss; where several cells share the largest value, the share of them that hit. NaN
        where the mask is empty.

    Raises
    ------
    SettingError
        Sizes that differ, masks that are not boolean, NaN, infinite or negative values.

    References
    ----------
    Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016, whose accuracy is the mean of
    this over maps. The maps' cells are coarse already, so no margin around the mask is allowed for.

    Examples
    --------
    >>> float(pointing_game([[0., 5., 2.]], [[0, 1, 1]])), float(pointing_game([[5., 0., 5.]], [[0, 1, 1]]))
    (1.0, 0.5)
    """
    values, truth = as_maps(maps, "maps"), as_masks(masks, "masks")
    same_size(values, truth)
    peaks, truth = broadcast(values == values.max(axis=(-2, -1), keepdims=True), truth)
    return _where(truth.any(axis=(-2, -1)), (peaks & truth).sum(axis=(-2, -1)), peaks.sum(axis=(-2, -1)))


def truth_masks(truth: Verdict | xr.DataArray, entities: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Where each entity is in the image, in the entities' order, once it is known to fit the maps.

    Parameters
    ----------
    truth : Verdict or DataArray, bool (entity, y, x)
        At any resolution; an entity that is not in the image has an empty mask. Anything with `masks` and
        `entities` will do for a Verdict.
    entities : sequence of str
        Labels.
    size : (int, int)
        Rows and columns of the maps, whose shape must be the image's, rounded to cells.

    Returns
    -------
    bool array, (entity, y, x)

    Raises
    ------
    SettingError
        Another kind of truth, other entities, masks that are not boolean, a picture of another shape.

    Examples
    --------
    >>> seen = xr.DataArray([[[0, 1]], [[1, 0]]], dims=("entity", "y", "x"), coords={"entity": ["frog", "cat"]})
    >>> truth_masks(seen, ["cat", "frog"], (4, 8)).astype(int).tolist()
    [[[1, 0]], [[0, 1]]]
    """
    if hasattr(truth, "masks") and hasattr(truth, "entities"):
        truth = xr.DataArray(truth.masks, dims=("entity", "y", "x"), coords={"entity": list(truth.entities)})
    if not isinstance(truth, xr.DataArray):
        raise SettingError(
            f"truth is a {type(truth).__name__}; give a Verdict, or masks as xr.DataArray(masks, "
            'dims=("entity", "y", "x"), coords={"entity": labels})'
        )
    if set(truth.dims) != {"entity", "y", "x"}:
        raise SettingError(f"truth has dimensions {truth.dims}; (entity, y, x) are needed: an image has no steps")
    default = [f"entity {i}" for i in range(truth.sizes["entity"])]
    labels = [str(label) for label in truth["entity"].values] if "entity" in truth.coords else default
    if sorted(labels) != sorted(entities):
        raise SettingError(f"truth is of {labels}, maps of {list(entities)}; both need the same entities")
    masks = as_masks(truth.transpose("entity", "y", "x").values, "truth")[[labels.index(label) for label in entities]]
    (rows, columns), (high, wide) = size, masks.shape[-2:]
    # Each side of a map is its image's, divided and rounded to a whole cell.
    if abs(rows - columns * high / max(wide, 1)) >= 1 and abs(columns - rows * wide / max(high, 1)) >= 1:
        raise SettingError(
            f"truth has {high} x {wide} pixels (y, x), the maps {rows} x {columns} cells, which is another shape; "
            "give masks of the whole image"
        )
    return masks


# --- shared with elakit.bleeding ----------------------------------------------------------------------------


def as_maps(maps: Any, what: str) -> np.ndarray:
    """Maps as float64 (..., y, x); refuse NaN, infinite and negative values."""
    values = as_array(maps, what)
    if values.ndim < 2 or 0 in values.shape[-2:]:
        raise SettingError(f"{what} have shape {values.shape}; they need (..., y, x) with at least one cell")
    return values


def same_size(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse arrays whose (y, x) differ."""
    if a.shape[-2:] != b.shape[-2:]:
        raise SettingError(f"sizes {a.shape[-2:]} and {b.shape[-2:]} (y, x) differ; resize one first")


def broadcast(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Arrays of one size with common leading dimensions."""
    try:
        a, b = np.broadcast_arrays(a, b)
    except ValueError:
        raise SettingError(f"leading dimensions {a.shape[:-2]} and {b.shape[:-2]} do not belong together") from None
    return a, b


def _where(defined: Any, part: Any, whole: Any) -> Any:
    """part / whole where it is defined, else NaN."""
    return np.where(defined, part / np.where(defined, whole, 1), np.nan)[()]
