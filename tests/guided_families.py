"""Tiny pipelines of every family that can be guided, and what tests have to know about each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl

PAIR = "a [red car] and a [blue bird]"
SIZE = {"height": 32, "width": 48}


@dataclass
class Family:
    make: Callable[..., Any]  # of a dtype
    options: dict[str, Any] = field(default_factory=dict)  # of the pipeline's own call
    negative: str | None = "a dog"
    stacked: bool = True  # rows without and with the prompt
    rounded: bool = False  # norms or rotations are in float32 even in a float64 model
    decoder: bool = False  # has layers placed "up"
    cells: tuple[int, int] = (4, 6)  # of the maps that are analyzed, at SIZE


UNBINNED = {"use_resolution_binning": False}
FAMILIES = {
    "sd": Family(tiny_pipeline, decoder=True, cells=(8, 12)),
    "sdxl": Family(tiny_sdxl, decoder=True),
    "pixart-alpha": Family(tiny_pixart, UNBINNED),
    "pixart-sigma": Family(lambda *dtype: tiny_pixart(*dtype, sigma=True), UNBINNED),
    "sd3": Family(tiny_sd3, rounded=True),
    "flux": Family(tiny_flux, negative=None, stacked=False, rounded=True),
}


@cache
def shared(name: str) -> Any:
    """A pipeline for tests that leave it as it is."""
    return FAMILIES[name].make()
