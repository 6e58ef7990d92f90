"""Agreement of attention maps with the finished image: whether attention lies where the entity appeared.

Every function takes maps and masks, arrays whose last two dimensions are (y, x); the leading dimensions broadcast. A
mask is true where an entity is in the image, according to a judge or an annotator. Masks must have the size of the
maps; :func:`elakit.measures.masks.downscale` resamples masks. :func:`elakit.bleeding.measure` adds the measures of this
module to the table of a run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from elakit.measures.arrays import as_maps, as_masks, broadcast
from elakit.measures.masks import otsu_masks

__all__ = ["agreement_iou", "auc", "pointing_game"]


def agreement_iou(maps: Any, masks: Any) -> np.ndarray:
    """Intersection over union (IoU) of each map, binarized with Otsu's threshold, and the mask of the entity.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Mask of the entity on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        IoU, 0 to 1. NaN where the mask is empty; 0 for a constant map, because no value exceeds the threshold.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Otsu, "A threshold selection method from gray-level histograms", 1979.

    Tang et al., "What the DAAM: Interpreting Stable Diffusion Using Cross Attention", ACL 2023. The paper also compares
    attention maps with segmentations by IoU, but with other thresholds.

    Examples
    --------
    The first two locations exceed the threshold. The cat covers the last three locations. Only one of the four
    locations is in both masks, and every location is in at least one mask, so the IoU is 1 / 4:

    >>> float(agreement_iou([[9., 8., 1., 0.]], [[0, 1, 1, 1]]))
    0.25
    """
    found, truth = broadcast(otsu_masks(as_maps(maps, "maps")), as_masks(masks, "masks"))
    both, either = (found & truth).sum(axis=(-2, -1)), (found | truth).sum(axis=(-2, -1))
    return _where(truth.any(axis=(-2, -1)), both, either)


def auc(maps: Any, masks: Any) -> np.ndarray:
    """Area under the ROC curve (AUC) of each map as a predictor of the mask.

    The AUC is the probability that a location on the entity has more attention than a location outside the entity; a
    tie counts half. No threshold is needed, and only the order of the values matters.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Mask of the entity on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        AUC, 0 to 1. It is 1 if every value on the entity is larger than every value outside the entity, and 0.5 for a
        constant map. NaN where the mask is empty or full.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve",
    Radiology 143, 1982.

    Examples
    --------
    Two locations on the entity, with values 3 and 2, are compared with two locations outside, with values 2 and 1. The
    entity wins three of the four comparisons (3 > 2, 3 > 1 and 2 > 1). The tie (2 = 2) counts half, so the AUC is
    3.5 / 4:

    >>> float(auc([[3., 2., 2., 1.]], [[1, 1, 0, 0]]))
    0.875
    """
    values = as_maps(maps, "maps")
    ranks = rankdata(values.reshape(*values.shape[:-2], -1), axis=-1).reshape(values.shape)
    ranks, truth = broadcast(ranks, as_masks(masks, "masks"))
    inside = truth.sum(axis=(-2, -1))
    outside = truth.shape[-2] * truth.shape[-1] - inside
    # Mann-Whitney U: the ranks of the locations inside, less the ranks they would have among themselves.
    won = (ranks * truth).sum(axis=(-2, -1)) - inside * (inside + 1) / 2
    pairs = inside * outside
    return _where(pairs > 0, won, pairs)


def pointing_game(maps: Any, masks: Any) -> np.ndarray:
    """Pointing game: 1 if the maximum of a map lies on the entity, else 0.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Mask of the entity on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        1 for a hit, 0 for a miss. If several locations have the maximum, the share of these locations that lie on the
        entity. NaN where the mask is empty.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016. The paper averages hits and misses over
    maps. The paper also counts a maximum slightly outside the mask as a hit; this function does not, because attention
    maps are coarse.

    Examples
    --------
    The entity covers the last two locations. The first map has its maximum on the entity. The second map has two
    maxima, one on the entity and one outside the entity:

    >>> float(pointing_game([[0., 5., 2.]], [[0, 1, 1]])), float(pointing_game([[5., 0., 5.]], [[0, 1, 1]]))
    (1.0, 0.5)
    """
    values = as_maps(maps, "maps")
    peaks, truth = broadcast(values == values.max(axis=(-2, -1), keepdims=True), as_masks(masks, "masks"))
    return _where(truth.any(axis=(-2, -1)), (peaks & truth).sum(axis=(-2, -1)), peaks.sum(axis=(-2, -1)))


def _where(defined: Any, part: Any, whole: Any) -> Any:
    """Quotient part / whole where `defined` is true, else NaN."""
    return np.where(defined, part / np.where(defined, whole, 1), np.nan)[()]
