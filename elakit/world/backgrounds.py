"""Quiet backgrounds, in colors away from those of the things on them."""

from __future__ import annotations

import numpy as np

from elakit.errors import SettingError

KINDS = ("plain", "gradient", "ground")
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
    """A background.

    Parameters
    ----------
    kinds : tuple of str
        Choose among these of `KINDS`.
    avoid : list of ndarray, (3,)
        Mean RGB colors of what will stand on it, if anything.
    size : int
        Side in pixels.
    rng : numpy.random.Generator

    Returns
    -------
    canvas : ndarray, float32, (size, size, 3)
        RGB in [0, 1].
    kind : str

    Raises
    ------
    SettingError
        A kind is unknown.
    """
    kind = str(rng.choice(kinds))
    y, x = np.mgrid[0:size, 0:size].astype(np.float32)[..., None] / size
    tone = _tone(avoid, rng)
    if kind == "plain":
        canvas = np.broadcast_to(tone, (size, size, 3)).copy()
    elif kind == "gradient":
        angle = rng.uniform(0, 2 * np.pi)
        canvas = tone * (1.1 - 0.25 * (0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle)))
    elif kind == "ground":
        floor, horizon = _tone(avoid, rng) * rng.uniform(0.82, 0.95), rng.uniform(0.55, 0.72)
        below = ((y - horizon) * size).clip(0, 1)
        canvas = tone * (1.06 - 0.12 * y) * (1 - below) + floor * (0.92 + 0.12 * y) * below
    else:
        raise SettingError(f"Unknown background {kind!r}. Choose from {', '.join(KINDS)}.")
    return canvas.clip(0, 1).astype(np.float32), kind


def _tone(avoid: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """A tone of the palette, the farthest of a few draws from the colors to avoid."""
    tones = _PALETTE[rng.integers(len(_PALETTE), size=6)] + rng.normal(0, 0.02, (6, 3)).astype(np.float32)
    if not avoid:
        return tones[0]
    distance = np.min([np.abs(tones - color).sum(1) for color in avoid], axis=0)
    clear = np.flatnonzero(distance > 0.6)
    return tones[clear[0] if len(clear) else distance.argmax()]
