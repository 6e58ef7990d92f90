"""Regions of entities, either localized in attention maps or laid out as strips of the image."""

from elakit.regions.localization import (
    BINARIZATIONS,
    DIFFERENTIATIONS,
    THRESHOLD,
    Binarization,
    Differentiation,
    localize,
    localize_steps,
    step_labels,
    steps_first,
)
from elakit.regions.result import Regions
from elakit.regions.strips import divide

__all__ = [
    "BINARIZATIONS",
    "DIFFERENTIATIONS",
    "THRESHOLD",
    "Binarization",
    "Differentiation",
    "Regions",
    "divide",
    "localize",
    "localize_steps",
    "step_labels",
    "steps_first",
]
