"""Agreement of attention maps with the finished image: whether attention lies where the entity appeared.

The arguments of every function are arrays whose last two dimensions are (y, x); the dimensions before them broadcast. A
mask is true where an entity is in the image, according to a judge or an annotator. It must be on the grid of the maps;
:func:`elakit.measures.masks.downscale` resamples it. :func:`elakit.bleeding.measure` adds these measures to a run's
table.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import rankdata

from elakit.measures.arrays import as_maps, as_masks, broadcast
from elakit.measures.masks import otsu_masks

__all__ = ["agreement_iou", "auc", "pointing_game"]


def agreement_iou(maps: Any, masks: Any) -> np.ndarray:
    """Intersection over union of the entity's mask and each map, which is binarized with Otsu's threshold.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Mask of the entity on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        0 to 1; NaN where the mask is empty. A constant map has no value above its threshold and scores 0.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Otsu, "A threshold selection method from gray-level histograms", 1979. Tang et al., "What the DAAM: Interpreting
    Stable Diffusion Using Cross Attention", ACL 2023, also compare attention maps with segmentations of the images by
    IoU, at thresholds of their own.

    Examples
    --------
    Two locations stand out; one of them is on the cat, which covers three:

    >>> float(agreement_iou([[9., 8., 1., 0.]], [[0, 1, 1, 1]]))
    0.25
    """
    found, truth = broadcast(otsu_masks(as_maps(maps, "maps")), as_masks(masks, "masks"))
    both, either = (found & truth).sum(axis=(-2, -1)), (found | truth).sum(axis=(-2, -1))
    return _where(truth.any(axis=(-2, -1)), both, either)


def auc(maps: Any, masks: Any) -> np.ndarray:
    """Area under the ROC curve of each map as a detector of the mask's locations.

    It is the probability that a location on the entity has more attention than a location outside it; ties count
    half. No threshold is needed, and only the order of the values matters.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Attention, on any scale; finite and not negative.
    masks : bool array, (..., y, x)
        Mask of the entity on the maps' grid; leading dimensions broadcast.

    Returns
    -------
    float array, (...)
        0 to 1. A map whose values on the entity are all larger than those outside it scores 1, a constant map 0.5. NaN
        where the mask is empty or full.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Hanley and McNeil, "The meaning and use of the area under a receiver operating characteristic (ROC) curve",
    Radiology 143, 1982 (ranks, ties by mid-ranks).

    Examples
    --------
    There are four pairs of a location on the entity and one outside it. In three of them the location on the entity has
    more attention (3 > 2, 3 > 1 and 2 > 1); one is a tie (2 = 2) and counts half:

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
        1 for a hit, 0 for a miss; where several locations share the maximum, the share of them that hit. NaN where the
        mask is empty.

    Raises
    ------
    SettingError
        Sizes differ, a mask has values other than 0 and 1, or values are NaN, infinite or negative.

    References
    ----------
    Zhang et al., "Top-down Neural Attention by Excitation Backprop", ECCV 2016. Its accuracy is the mean of these
    values over maps. The paper also counts a maximum within a margin around the mask as a hit; this function does not,
    because attention maps are coarse.

    Examples
    --------
    >>> float(pointing_game([[0., 5., 2.]], [[0, 1, 1]])), float(pointing_game([[5., 0., 5.]], [[0, 1, 1]]))
    (1.0, 0.5)
    """
    values = as_maps(maps, "maps")
    peaks, truth = broadcast(values == values.max(axis=(-2, -1), keepdims=True), as_masks(masks, "masks"))
    return _where(truth.any(axis=(-2, -1)), (peaks & truth).sum(axis=(-2, -1)), peaks.sum(axis=(-2, -1)))


def _where(defined: Any, part: Any, whole: Any) -> Any:
    """Quotient part / whole where `defined` is true, else NaN."""
    return np.where(defined, part / np.where(defined, whole, 1), np.nan)[()]
