"""Types of pipelines state what the classes of diffusers have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import pytest
from diffusers import DiffusionPipeline
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from tiny_families import BUILDERS
from typing_extensions import get_protocol_members

from elakit.models import adapter_for
from elakit.pipeline import Pipeline

OLDER: dict[str, Callable[[], Any]] = {
    "Stable Diffusion": tiny_pipeline,
    "SDXL": tiny_sdxl,
    "PixArt": tiny_pixart,
    "Stable Diffusion 3": tiny_sd3,
    "FLUX.1": tiny_flux,
}


def test_the_classes_of_diffusers_are_pipelines_to_a_type_checker() -> None:
    # components are no attributes of these classes, so a type checker would not find them
    assert all(hasattr(DiffusionPipeline, name) for name in get_protocol_members(Pipeline) - {"__call__"})


@pytest.mark.parametrize("name", [*OLDER, *BUILDERS])
def test_pipelines_of_a_family_have_what_its_adapter_declares(name: str) -> None:
    pipe = (OLDER | BUILDERS)[name]()
    declared = get_type_hints(type(adapter_for(pipe)))["pipe"]
    absent = {member for member in get_protocol_members(declared) if not hasattr(pipe, member)}
    absent -= {"system_message"} if name == "FLUX.2 Klein" else set()  # as its docstring says
    assert not absent, f"{declared.__name__} declares {absent}"
