"""Backgrounds of scenes: uniform, smooth or faintly patterned, in colors that differ from those of the things."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import zoom

from elakit.errors import SettingError

# Uniform or smooth ("plain", "gradient", "spot", "clouds"), two planes ("ground", "wall", "hills") or a faint pattern.
KINDS = ("plain", "gradient", "ground", "spot", "clouds", "wall", "hills", "stripes", "tiles", "dots")
_TONES = [
    "f3ead7",
    "e6eef5",
    "dfeee0",
    "f6e3e3",
    "e9e2f3",
    "cfd8dc",
    "bcd0c7",
    "d8c3a5",
    "a9bcd0",
    "c9ada7",
    "8fa3ad",
    "93a17f",
    "8794ab",
    "b09a7d",
    "76858d",
]
_PALETTE = np.array([[int(tone[i : i + 2], 16) / 255 for i in (0, 2, 4)] for tone in _TONES], np.float32)


def background(
    kinds: tuple[str, ...], avoid: list[np.ndarray], size: int, rng: np.random.Generator
) -> tuple[np.ndarray, str]:
    """Background of a random kind and color.

    Parameters
    ----------
    kinds : tuple of str
        Kinds to choose from, each one of `KINDS`.
    avoid : list of ndarray, (3,)
        Mean RGB color of each thing in the scene, in [0, 1]; may be empty. The color of the background is random, but
        far from these colors if possible.
    size : int
        Side of the background in pixels.
    rng : numpy.random.Generator

    Returns
    -------
    canvas : ndarray, float32, (size, size, 3)
        RGB in [0, 1].
    kind : str
        The kind that was chosen.

    Raises
    ------
    SettingError
        No kind is given, or one of them is unknown.

    Examples
    --------
    >>> canvas, kind = background(("stripes",), [], 64, np.random.default_rng(0))
    >>> canvas.shape, kind
    ((64, 64, 3), 'stripes')
    """
    if unknown := [one for one in kinds if one not in KINDS]:
        raise SettingError(f"Unknown background {unknown[0]!r}. Choose from {', '.join(KINDS)}.")
    if not kinds:
        raise SettingError(f"No kind of background is given. Choose from {', '.join(KINDS)}.")
    kind = str(rng.choice(kinds))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)[..., None] / size
    tone = _tone(avoid, rng)
    if kind == "plain":
        canvas = np.broadcast_to(tone, (size, size, 3))
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        canvas = tone * (1.1 - 0.25 * (0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)))
    elif kind == "spot":
        radius = np.hypot(x - rng.uniform(0.3, 0.7), y - rng.uniform(0.2, 0.6))
        canvas = tone * (1.1 - rng.uniform(0.2, 0.35) * radius)
    elif kind == "clouds":
        waves = zoom(rng.normal(0, 1, (4, 4)), size / 4, order=3, grid_mode=True, mode="nearest")
        canvas = tone * (1 + 0.045 * waves[..., None].astype(np.float32))
    elif kind in ("ground", "wall", "hills"):
        canvas = _two_planes(kind, tone, _tone(avoid, rng), x, y, rng)
    else:
        canvas = tone * (1 + rng.choice([-1, 1]) * rng.uniform(0.035, 0.07) * _pattern(kind, x, y, rng))
    return canvas.clip(0, 1).astype(np.float32), kind


def _two_planes(
    kind: str, tone: np.ndarray, other: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Background with an upper part in the color `tone` and a lower part in the color `other`, slightly darkened.

    `kind` names the border between the parts: a straight line ("ground"), a straight line below a skirting board
    ("wall"), or a wavy line ("hills"). Colors are RGB in [0, 1], (3,). `x` and `y` are the coordinates of the pixels as
    shares of the side, (size, size, 1). The result has the shape (size, size, 3).
    """
    size, below = len(y), other * rng.uniform(0.82, 0.95)
    line = np.full_like(x, rng.uniform(0.55, 0.75))
    if kind == "hills":
        phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.6)
        line = line + rng.uniform(0.03, 0.08) * np.sin(2 * np.pi * waves * x + phase)
    share = ((y - line) * size).clip(0, 1)
    canvas = tone * (1.06 - 0.12 * y) * (1 - share) + below * (0.92 + 0.12 * y) * share
    if kind == "wall":
        board = ((y - line + 0.04) * size).clip(0, 1) * (1 - share)
        canvas = canvas * (1 - board) + tone * 1.12 * board
    return canvas


def _pattern(kind: str, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pattern of the kind "stripes", "tiles" or "dots": values from 0 to 1, with edges about one pixel wide.

    `x` and `y` are the coordinates of the pixels as shares of the side, (size, size, 1); the result has this shape.
    """
    count, size = int(rng.integers(3, 7)), len(y)
    sharp = size / count / 4
    if kind == "stripes":
        angle = rng.choice([0, np.pi / 2, np.pi / 4, -np.pi / 4])
        along = x * np.cos(angle) + y * np.sin(angle)
        return (0.5 + sharp * np.sin(2 * np.pi * count * along + rng.uniform(0, 6)) / np.pi * 2).clip(0, 1)
    if kind == "tiles":
        waves = np.sin(np.pi * count * x) * np.sin(np.pi * count * y)
        return (0.5 + sharp * waves).clip(0, 1)
    u, v = (x * count) % 1 - 0.5, (y * count) % 1 - 0.5
    return ((0.22 - np.hypot(u, v)) * size / count + 0.5).clip(0, 1)


def _tone(avoid: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Random background color that is far from the colors in `avoid`, if possible; RGB, (3,).

    Six random colors are compared with `avoid`. The first of the six that is far enough from all colors in `avoid` is
    chosen. If none of the six is far enough, the farthest is chosen.
    """
    tones = _PALETTE[rng.integers(len(_PALETTE), size=6)] + rng.normal(0, 0.02, (6, 3)).astype(np.float32)
    if not avoid:
        return tones[0]
    distance = np.min([np.abs(tones - color).sum(1) for color in avoid], axis=0)
    clear = np.flatnonzero(distance > 0.6)
    return tones[clear[0] if len(clear) else distance.argmax()]
