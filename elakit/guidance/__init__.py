"""Guidance: one engine that runs training-free methods, and each method in a file of its own."""

from typing import Any

from elakit.errors import SettingError
from elakit.guidance.astar import AStar
from elakit.guidance.attend_excite import AttendAndExcite
from elakit.guidance.box_diff import BoxDiff
from elakit.guidance.conform import CONFORM
from elakit.guidance.divide_bind import DivideAndBind
from elakit.guidance.ebama import EBAMA
from elakit.guidance.ela import ELA, Anchors, PaperELA
from elakit.guidance.engine import Guide, checkpointing
from elakit.guidance.initno import InitNO
from elakit.guidance.layout_guidance import LayoutGuidance
from elakit.guidance.method import Attention, Loss, Method, NoiseSearch, Update
from elakit.guidance.self_cross import SelfCross
from elakit.guidance.syngen import SynGen
from elakit.guidance.trace import Trace

__all__ = [
    "CONFORM",
    "EBAMA",
    "ELA",
    "METHODS",
    "AStar",
    "Anchors",
    "AttendAndExcite",
    "Attention",
    "BoxDiff",
    "DivideAndBind",
    "Guide",
    "InitNO",
    "LayoutGuidance",
    "Loss",
    "Method",
    "NoiseSearch",
    "PaperELA",
    "SelfCross",
    "SynGen",
    "Trace",
    "Update",
    "checkpointing",
    "without_regions",
]

# Layout guidance and BoxDiff cannot be built without regions.
METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (
        ELA, PaperELA, AttendAndExcite, SynGen, DivideAndBind, AStar, EBAMA, CONFORM, SelfCross, InitNO, LayoutGuidance,
        BoxDiff,
    )
}  # fmt: skip


def without_regions(name: str) -> Any:
    """A method of `METHODS` with its defaults, for places where no regions can be given.

    Raises
    ------
    SettingError
        It cannot do without.

    Examples
    --------
    >>> without_regions("ela").name
    'ela'
    >>> without_regions("boxdiff")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: boxdiff needs regions, one for each entity: draw it from Python, with ...
    """
    try:
        return METHODS[name]()
    except TypeError as error:
        raise SettingError(
            f"{name} needs regions, one for each entity: draw it from Python, with "
            f"elakit.generate(..., guidance=elakit.guidance.{METHODS[name].__name__}(regions=...))."
        ) from error
