"""Guidance methods by name; the module of a method is imported when the method is first used."""

from __future__ import annotations

import re
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

from elakit.errors import SettingError


class Methods(MutableMapping[str, type[Any]]):
    """Method classes by name, imported at their first use.

    Names can be listed without importing torch. ``METHODS["my-method"] = MyMethod`` registers a method of your own, so
    that sweeps, diagnosis and the live panel can use it by its name.

    Parameters
    ----------
    places : dict of str to str
        Method name -> ``"module:Class"``, where the module is in `elakit.guidance`; for example ``"ela": "ela:ELA"``.
    """

    def __init__(self, places: dict[str, str]) -> None:
        self._known: dict[str, str | type[Any]] = dict(places)

    def __getitem__(self, name: str) -> type[Any]:
        known = self._known[name]
        if isinstance(known, str):
            module, kind = known.split(":")
            known = self._known[name] = getattr(import_module(f"elakit.guidance.{module}"), kind)
        return known

    def __setitem__(self, name: str, kind: type[Any]) -> None:
        self._known[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._known[name]

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)


METHODS = Methods(
    {
        "ela": "ela:ELA",
        "regional-attention": "regional_attention:RegionalAttention",
        "attend-and-excite": "attend_excite:AttendAndExcite",
        "syngen": "syngen:SynGen",
        "divide-and-bind": "divide_bind:DivideAndBind",
        "a-star": "astar:AStar",
        "ebama": "ebama:EBAMA",
        "conform": "conform:CONFORM",
        "self-cross": "self_cross:SelfCross",
        "initno": "initno:InitNO",
        "deleaker": "deleaker:DeLeaker",
        "predicated-diffusion": "predicated_diffusion:PredicatedDiffusion",
        "spdiffusion": "spdiffusion:SPDiffusion",
        "regional-prompter": "regional_prompter:RegionalPrompter",
        "attention-regulation": "attention_regulation:AttentionRegulation",
        "focus": "focus:FOCUS",
        "layout-guidance": "layout_guidance:LayoutGuidance",
        "boxdiff": "box_diff:BoxDiff",
        "bounded-attention": "bounded_attention:BoundedAttention",
        "densediffusion": "dense_diffusion:DenseDiffusion",
    }
)
"""Classes of the guidance methods by name; `elakit.guidance.Method` describes their attributes."""
# stated here so that they can be listed without importing torch; a test compares them with the classes
TAKE_REGIONS = ("ela", "regional-attention")  # optionally
NEED_REGIONS = ("layout-guidance", "boxdiff", "bounded-attention", "densediffusion")
WITHOUT_REGIONS = tuple(name for name in METHODS if name not in NEED_REGIONS)


def method_title(name: str) -> str:
    """Display name of a method; any other name, such as "plain", is returned unchanged.

    Parameters
    ----------
    name : str
        Name in `METHODS`, or any other name. A parenthesis or a comma with further text may follow the name, as in
        "ela(anchor.step_size=0.2)" and "ela, steps 20". This further text is kept unchanged.

    Returns
    -------
    str

    Examples
    --------
    >>> method_title("attend-and-excite"), method_title("plain")
    ('Attend-and-Excite', 'plain')
    >>> method_title("ela(anchor.step_size=0.2), steps 20")
    'ELA(anchor.step_size=0.2), steps 20'
    """
    if name in METHODS:
        return str(METHODS[name].title)
    method = re.split(r"[(,]", name, maxsplit=1)[0]
    return METHODS[method].title + name[len(method) :] if method in METHODS else name


def without_regions(name: str) -> Any:
    """Create a guidance method with its default options; raise an error for a method that needs regions.

    Parameters
    ----------
    name : str
        Name in `METHODS`.

    Returns
    -------
    Method

    Raises
    ------
    KeyError
        There is no method of this name.
    SettingError
        The method needs regions, such as "boxdiff".

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
