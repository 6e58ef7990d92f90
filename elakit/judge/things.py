"""Interface of detectors, and the things that they find in an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from elakit.measures.masks import bounding_box


@dataclass(frozen=True, eq=False)
class Thing:
    """One thing that a detector found in an image.

    Attributes
    ----------
    noun : str
        Noun for the thing, in lower case.
    mask : ndarray, bool, (y, x)
        Mask of the thing, at the size of the image.
    score : float
        Confidence of the detector, 0 to 1.
    color : str or None
        Color of the thing, one of `elakit.world.vocabulary.COLORS`; None if the mask is empty.
    mixed_with : tuple of str
        Other nouns of the hybrid that the thing is part of; empty if the thing is not part of a hybrid.
    recognizable : bool
        False for a shape that the detector cannot name. The `noun` of such a shape is only the most probable noun, and
        the judge does not count the shape as a thing.

    Examples
    --------
    The mask covers rows 1 and 2 and columns 2 to 5. The box is (left, top, right, bottom), with right and bottom
    exclusive, and the area is the share of the image:

    >>> mask = np.zeros((4, 8), bool)
    >>> mask[1:3, 2:6] = True
    >>> thing = Thing("cat", mask, 0.9, "orange")
    >>> thing.box, thing.area
    ((2, 1, 6, 3), 0.25)
    """

    noun: str
    mask: np.ndarray
    score: float
    color: str | None
    mixed_with: tuple[str, ...] = ()
    recognizable: bool = True

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box of the mask, (left, top, right, bottom) in pixels; right and bottom are exclusive."""
        return bounding_box(self.mask)

    @property
    def area(self) -> float:
        """Share of the image that the mask covers."""
        return float(self.mask.mean())


class Detector(Protocol):
    """Callable that finds things in an image: the built-in judge, or a detector from `elakit.judge.detectors`."""

    def __call__(self, image: Image.Image, nouns: Sequence[str]) -> list[Thing]:
        """Find things in an image.

        An open-vocabulary detector searches for the given nouns. The built-in judge ignores `nouns`, and searches for
        all nouns of picture-world.
        """
        ...
