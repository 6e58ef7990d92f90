"""What a detector finds in a picture, whichever detector it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from elakit.masks import bounding_box


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing seen in a picture.

    Attributes
    ----------
    noun : str
        What it is, in lower case.
    mask : ndarray, bool, (y, x)
        Where it is, at the picture's size.
    score : float
        How sure the detector is, 0 to 1.
    colour : str or None
        Its colour, one of `elakit.world.vocabulary.COLOURS`; None for an empty mask.
    mixed_with : tuple of str
        Nouns it is fused with; empty for a thing that is only itself.

    Examples
    --------
    >>> mask = np.zeros((4, 8), bool)
    >>> mask[1:3, 2:6] = True
    >>> thing = Thing("cat", mask, 0.9, "orange")
    >>> thing.box, thing.area
    ((2, 1, 6, 3), 0.25)
    """

    noun: str
    mask: np.ndarray
    score: float
    colour: str | None
    mixed_with: tuple[str, ...] = ()

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels; see `elakit.masks.bounding_box`."""
        return bounding_box(self.mask)

    @property
    def area(self) -> float:
        """Share of the picture it covers."""
        return float(self.mask.mean())


class Detector(Protocol):
    """Finds things in a picture: the embedded judge, or one of `elakit.judge.detectors`."""

    def __call__(self, image: Image.Image, nouns: Sequence[str]) -> list[Thing]:
        """Things in the picture; a detector that must be told what to look for is asked for `nouns`."""
        ...
