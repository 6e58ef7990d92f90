"""Guidance: one engine that runs training-free methods, and each method in a file of its own."""

from typing import Any

from elakit.errors import SettingError
from elakit.guidance.anchoring import LatentStep
from elakit.guidance.astar import AStar
from elakit.guidance.attend_excite import AttendAndExcite
from elakit.guidance.box_diff import BoxDiff
from elakit.guidance.conform import CONFORM
from elakit.guidance.divide_bind import DivideAndBind
from elakit.guidance.ebama import EBAMA
from elakit.guidance.ela import ELA
from elakit.guidance.engine import Guide, checkpointing
from elakit.guidance.initno import InitNO
from elakit.guidance.layout_guidance import LayoutGuidance
from elakit.guidance.localization import Anchors, FromMaps
from elakit.guidance.metadata import as_code, build, option_values, options, options_of
from elakit.guidance.method import Attention, Loss, Method, NoiseSearch, Update
from elakit.guidance.regional_attention import RegionalAttention
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
    "FromMaps",
    "Guide",
    "InitNO",
    "LatentStep",
    "LayoutGuidance",
    "Loss",
    "Method",
    "NoiseSearch",
    "RegionalAttention",
    "SelfCross",
    "SynGen",
    "Trace",
    "Update",
    "as_code",
    "build",
    "checkpointing",
    "method_title",
    "option_values",
    "options",
    "options_of",
    "without_regions",
]

METHODS: dict[str, type[Any]] = {
    method.name: method
    for method in (
        ELA, RegionalAttention, AttendAndExcite, SynGen, DivideAndBind, AStar, EBAMA, CONFORM, SelfCross, InitNO,
        LayoutGuidance, BoxDiff,
    )
}  # fmt: skip
"""Guidance methods by name. Each class carries its metadata: see `elakit.guidance.Method`."""


def method_title(name: str) -> str:
    """Display name of a method; other names, such as "plain", are returned as they are.

    Examples
    --------
    >>> method_title("attend-and-excite"), method_title("plain")
    ('Attend-and-Excite', 'plain')
    """
    return METHODS[name].title if name in METHODS else name


def without_regions(name: str) -> Any:
    """A method of `METHODS` with its default options, for uses in which no regions can be given.

    Raises
    ------
    SettingError
        The method needs regions.

    Examples
    --------
    >>> without_regions("ela").name
    'ela'
    >>> without_regions("boxdiff")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: boxdiff needs regions, one per entity: call elakit.generate(..., ...
    """
    if METHODS[name].needs_regions:
        raise SettingError(
            f"{name} needs regions, one per entity: call "
            f"elakit.generate(..., guidance=elakit.guidance.{METHODS[name].__name__}(regions=...))."
        )
    return METHODS[name]()
