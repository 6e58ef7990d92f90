"""Attention maps as bytes, with one scale per map: the value that the byte 255 stands for."""

from __future__ import annotations

import numpy as np


def quantize(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantize maps to bytes; each map has a scale of its own, the value that the byte 255 stands for.

    Parameters
    ----------
    maps : numpy.ndarray, float (..., y, x)
        Maps; negative values and values that are not finite count as 0.

    Returns
    -------
    levels : numpy.ndarray, uint8 (..., y, x)
        Bytes from 0 to 255: the values of each map divided by its scale, times 255, rounded.
    scales : numpy.ndarray, float32 (...)
        Largest value of each map; the quantization error is at most 1/510 of it.

    Examples
    --------
    >>> levels, scales = quantize(np.array([[0.0, 0.25, 0.5]]))
    >>> levels.tolist(), float(scales)
    ([[0, 128, 255]], 0.5)
    """
    values = np.asarray(maps, np.float32)
    if not np.isfinite(values).all() or values.min(initial=0) < 0:
        values = np.nan_to_num(values, nan=0.0, posinf=0.0).clip(0)
    tops = values.max(axis=(-2, -1))
    # Divide before multiplying, since 255 / top may overflow float32.
    levels = values / np.where(tops > 0, tops, 1)[..., None, None]
    levels *= 255
    return np.rint(levels, out=levels).astype(np.uint8), tops
