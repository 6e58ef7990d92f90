"""Overlap and divergence of two masks or two maps.

Every function takes two arrays or tensors (..., y, x). The dimensions before y and x are broadcast, and the result has
these dimensions only. All measures are symmetric. Masks must have the values 0 and 1 only. Maps must be finite and
not negative. Otherwise, and if the shapes do not match, a SettingError is raised.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from elakit.measures.arrays import as_maps, as_masks, broadcast, distribution, ratio

__all__ = [
    "astar_overlap",
    "dice",
    "hellinger",
    "iou",
    "jensen_shannon",
    "overlap_coefficient",
    "ruzicka",
    "symmetric_kl",
]

# Least probability of a location in the Kullback-Leibler divergence; it keeps the logarithm finite where half precision
# has rounded to zero.
TINY = 1e-12


def iou(a: Any, b: Any) -> np.ndarray:
    """Intersection over union (Jaccard index) of masks, 0 to 1; 0 if both are empty.

    Parameters
    ----------
    a, b : bool array or tensor, (..., y, x)
        Masks of one spatial size; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or a mask has values other than 0 and 1.

    Examples
    --------
    >>> float(iou([[1, 1, 0, 0]], [[0, 1, 1, 1]]))
    0.25
    """
    both, size_a, size_b = _areas(a, b)
    return ratio(both, size_a + size_b - both)


def dice(a: Any, b: Any) -> np.ndarray:
    """Dice coefficient of masks, ``2 |a & b| / (|a| + |b|)``, 0 to 1; 0 if both are empty.

    Parameters
    ----------
    a, b : bool array or tensor, (..., y, x)
        Masks of one spatial size; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or a mask has values other than 0 and 1.

    Examples
    --------
    >>> float(dice([[1, 1, 0, 0]], [[0, 1, 1, 1]]))
    0.4
    """
    both, size_a, size_b = _areas(a, b)
    return ratio(2 * both, size_a + size_b)


def overlap_coefficient(a: Any, b: Any) -> np.ndarray:
    """Overlap coefficient (Szymkiewicz-Simpson) of masks, ``|a & b| / min(|a|, |b|)``, 0 to 1; 0 if either is empty.

    Parameters
    ----------
    a, b : bool array or tensor, (..., y, x)
        Masks of one spatial size; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or a mask has values other than 0 and 1.

    Examples
    --------
    >>> float(overlap_coefficient([[1, 1, 0, 0]], [[0, 1, 1, 1]]))
    0.5
    """
    both, size_a, size_b = _areas(a, b)
    return ratio(both, np.minimum(size_a, size_b))


def ruzicka(a: Any, b: Any) -> np.ndarray:
    """Ruzicka similarity of maps, sum min(a, b) / sum max(a, b), 0 to 1; 0 if both are zero.

    The result depends on the scale of the maps. To compare only their spatial distribution, first scale each map to
    sum 1 with :func:`~elakit.measures.arrays.distribution`.

    Parameters
    ----------
    a, b : array or tensor, (..., y, x)
        Maps of one spatial size, finite and not negative; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or values are NaN, infinite or negative.

    Examples
    --------
    >>> float(ruzicka([[1., 2., 1.]], [[0., 1., 2.]]))
    0.4
    """
    a, b = _scaled_pair(a, b)
    return ratio(np.minimum(a, b).sum(axis=(-2, -1)), np.maximum(a, b).sum(axis=(-2, -1)))


def astar_overlap(a: Any, b: Any) -> np.ndarray:
    """Overlap of maps in A-STAR's segregation loss, sum min(a, b) / sum (a + b), 0 to .5; 0 if both are zero.

    This overlap is half the soft Dice coefficient. The result depends on the scale of the maps.

    Parameters
    ----------
    a, b : array or tensor, (..., y, x)
        Maps of one spatial size, finite and not negative; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or values are NaN, infinite or negative.

    References
    ----------
    Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", ICCV 2023.

    Examples
    --------
    >>> round(float(astar_overlap([[1., 2., 1.]], [[0., 1., 2.]])), 3)
    0.286
    """
    a, b = _scaled_pair(a, b)
    return ratio(np.minimum(a, b).sum(axis=(-2, -1)), (a + b).sum(axis=(-2, -1)))


def symmetric_kl(a: Any, b: Any) -> np.ndarray:
    """Symmetric Kullback-Leibler divergence of maps as distributions, (KL(p||q) + KL(q||p)) / 2 in nats.

    The distributions p and q are the maps, each scaled to sum 1; a map of zeros counts as uniform. Probabilities below
    1e-12 are set to 1e-12.

    Parameters
    ----------
    a, b : array or tensor, (..., y, x)
        Maps of one spatial size, finite and not negative; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or values are NaN, infinite or negative.

    Examples
    --------
    Maps that differ only in scale do not diverge:

    >>> float(symmetric_kl([[1., 3.]], [[2., 6.]]))
    0.0
    """
    p, q = (np.maximum(x, TINY) for x in _distributions(a, b))
    return np.asarray(0.5 * ((p - q) * (np.log(p) - np.log(q))).sum(axis=(-2, -1)))[()]  # no term is negative


def jensen_shannon(a: Any, b: Any) -> np.ndarray:
    """Jensen-Shannon divergence of maps as distributions, 0 to ln 2 nats.

    The distributions are the maps, each scaled to sum 1; a map of zeros counts as uniform.

    Parameters
    ----------
    a, b : array or tensor, (..., y, x)
        Maps of one spatial size, finite and not negative; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or values are NaN, infinite or negative.

    Examples
    --------
    >>> round(float(jensen_shannon([[1., 0.]], [[0., 5.]])), 4)
    0.6931
    """
    p, q = _distributions(a, b)
    middle = np.log(np.maximum((p + q) / 2, TINY))
    half = [(x * (np.log(np.maximum(x, TINY)) - middle)).sum(axis=(-2, -1)) for x in (p, q)]
    return np.clip(0.5 * (half[0] + half[1]), 0.0, np.log(2))


def hellinger(a: Any, b: Any) -> np.ndarray:
    """Hellinger distance of maps as distributions, 0 to 1.

    The distributions are the maps, each scaled to sum 1; a map of zeros counts as uniform.

    Parameters
    ----------
    a, b : array or tensor, (..., y, x)
        Maps of one spatial size, finite and not negative; leading dimensions broadcast.

    Returns
    -------
    float array, (...)

    Raises
    ------
    SettingError
        Shapes do not match, or values are NaN, infinite or negative.

    Examples
    --------
    >>> float(hellinger([[1., 0.]], [[0., 5.]]))
    1.0
    """
    p, q = _distributions(a, b)
    return np.sqrt(np.clip(0.5 * ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(axis=(-2, -1)), 0.0, 1.0))


def _areas(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Three areas: the intersection of masks ``a`` and ``b``, the mask ``a``, and the mask ``b``."""
    a, b = broadcast(as_masks(a, "a"), as_masks(b, "b"))
    both, size_a, size_b = ((m).sum(axis=(-2, -1)) for m in (a & b, a, b))
    return both, size_a, size_b


def _scaled_pair(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """Maps ``a`` and ``b``, each pair divided by the pair's largest value.

    This scaling keeps subnormal values from underflowing. A pair of zero maps is not scaled.
    """
    a, b = broadcast(as_maps(a, "a"), as_maps(b, "b"))
    top = np.maximum(a.max(axis=(-2, -1), keepdims=True), b.max(axis=(-2, -1), keepdims=True))
    top = np.where(top > 0, top, 1.0)
    return a / top, b / top


def _distributions(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    return broadcast(distribution(a), distribution(b))
