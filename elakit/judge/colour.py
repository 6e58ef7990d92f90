"""Name the colour of a set of pixels by perceptual distance (CIE Lab) to the world's paints."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from skimage.color import rgb2lab

from elakit.world.recolour import PAINTS, fade


@lru_cache(maxsize=1)
def _shades() -> tuple[np.ndarray, np.ndarray]:
    """Every paint from its darkest to its lightest shade: Lab points (n, 3) and the paint's index of each (n,)."""
    points, owner = [], []
    for i, paint in enumerate(PAINTS.values()):
        light = np.linspace(paint.floor, paint.ceiling, 9)
        chroma = fade(light, paint)
        points.append(np.stack([light, paint.a * chroma, paint.b * chroma], -1))
        owner += [i] * len(light)
    return np.concatenate(points), np.array(owner)


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """Index in ``PAINTS`` of each pixel's nearest shade.

    Parameters
    ----------
    rgb : ndarray, uint8 or float in [0, 1], (..., 3)

    Returns
    -------
    ndarray of int, (...)
    """
    points, owner = _shades()
    lab = rgb2lab(rgb)
    return owner[((lab[..., None, :] - points) ** 2).sum(-1).argmin(-1)]


def name_colour(rgb: np.ndarray) -> str | None:
    """The colour that most of the pixels have; None for no pixels.

    Parameters
    ----------
    rgb : ndarray, uint8 or float in [0, 1], (n, 3)

    Examples
    --------
    >>> name_colour(np.array([[200, 20, 30], [210, 30, 30], [10, 10, 10]], np.uint8))
    'red'
    """
    if not len(rgb):
        return None
    counts = np.bincount(name_pixels(rgb), minlength=len(PAINTS))
    return list(PAINTS)[int(counts.argmax())]
