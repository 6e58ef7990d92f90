"""Fixtures that every test file may use; no test reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from elakit.prompt import Prompt


@pytest.fixture
def pipe() -> Any:
    """A fresh tiny Stable Diffusion pipeline of random weights (see ``tiny.py``)."""
    from tiny import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def prompt(pipe: Any) -> Prompt:
    """Two entities with an attribute each."""
    from elakit.prompt import parse

    return parse("a [red car] and a [blue bird]", pipe)
