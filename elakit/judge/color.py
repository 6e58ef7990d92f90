"""Color names of pixels: the color of picture-world with the smallest distance in the CIE Lab color space."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.ndimage import binary_erosion
from skimage.color import rgb2lab

from elakit.world.recolor import PAINTS, fade

# Things whose color is that of their frame, because the inside is glass.
FRAMED = frozenset({"glasses"})


@lru_cache(maxsize=1)
def _shades() -> tuple[np.ndarray, np.ndarray]:
    """Nine shades of each color of picture-world, from dark to light, with the index of each shade's color.

    Shades are points in the CIE Lab color space, (n, 3). The indices, (n,), follow the order of ``PAINTS``.
    """
    points, owner = [], []
    for i, paint in enumerate(PAINTS.values()):
        light = np.linspace(paint.floor, paint.ceiling, 9)
        chroma = fade(light, paint)
        points.append(np.stack([light, paint.a * chroma, paint.b * chroma], -1))
        owner += [i] * len(light)
    return np.concatenate(points), np.array(owner)


def name_pixels(rgb: np.ndarray) -> np.ndarray:
    """Index of the color of picture-world that is nearest to each pixel.

    Each color is represented by nine shades from dark to light. Distances are computed in the CIE Lab color space.

    Parameters
    ----------
    rgb : ndarray, uint8 or float in [0, 1], (..., 3)

    Returns
    -------
    ndarray of int, (...)
        Indices into the colors in the order of ``elakit.world.recolor.PAINTS``.
    """
    points, owner = _shades()
    lab = rgb2lab(rgb)
    return owner[((lab[..., None, :] - points) ** 2).sum(-1).argmin(-1)]


def name_color(rgb: np.ndarray) -> str | None:
    """Name of the most frequent color among pixels.

    Parameters
    ----------
    rgb : ndarray, uint8 or float in [0, 1], (n, 3)

    Returns
    -------
    str or None
        One of the colors of picture-world; None if there are no pixels.

    Examples
    --------
    Two red pixels and one black pixel:

    >>> name_color(np.array([[200, 20, 30], [210, 30, 30], [10, 10, 10]], np.uint8))
    'red'
    """
    if not len(rgb):
        return None
    counts = np.bincount(name_pixels(rgb), minlength=len(PAINTS))
    return list(PAINTS)[int(counts.argmax())]


def thing_color(rgb: np.ndarray, mask: np.ndarray, noun: str) -> str | None:
    """Name of the color of a thing in an image.

    Parameters
    ----------
    rgb : ndarray, uint8 or float in [0, 1], (y, x, 3)
    mask : ndarray, bool, (y, x)
        Mask of the thing.
    noun : str
        Noun of the thing. For "glasses", only the rim of the mask counts, because the inside is glass. The width of
        the rim is 1/64 of the image's shorter side, and at least one pixel. For all other nouns, every pixel of the
        mask counts.

    Returns
    -------
    str or None
        Most frequent color among the pixels that count, one of picture-world's colors; None if the mask is empty.

    Examples
    --------
    The thing has a red rim of 34 pixels around 50 blue pixels. With the noun "glasses", only the rim counts:

    >>> image = np.full((16, 16, 3), 255, np.uint8)
    >>> image[2:9, 2:14], image[3:8, 3:13] = (200, 20, 30), (30, 80, 200)
    >>> mask = np.zeros((16, 16), bool)
    >>> mask[2:9, 2:14] = True
    >>> thing_color(image, mask, "glasses"), thing_color(image, mask, "car")
    ('red', 'blue')
    """
    if noun in FRAMED:
        thickness = max(1, round(min(mask.shape) / 64))
        mask = mask & ~binary_erosion(mask, iterations=thickness)
    return name_color(rgb[mask])
