"""Fixtures that every test file may use; no test reaches the network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from elakit.prompt import Prompt

# Tiers by file or folder; a test that is in none and has no tier of its own is a unit test.
TIERS = {
    "integration": (
        "causes", "diagnosis", "prediction", "sweep", "test_cli.py", "test_startup.py", "test_typing.py",
        "widgets", "world/test_world.py",
    ),
    "slow": ("test_notebooks.py", "world/test_training.py"),
}  # fmt: skip
MARKS = {"unit", "integration", "browser", "slow", "cuda"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its tier, and skip those that need a GPU where there is none."""
    here = Path(__file__).parent
    for item in items:
        try:
            place = item.path.relative_to(here).as_posix()
        except ValueError:
            place = ""  # a doctest of the package
        if not MARKS & {mark.name for mark in item.iter_markers()}:
            tier = (name for name, starts in TIERS.items() if place.startswith(starts))
            item.add_marker(next(tier, "unit"))
        if item.get_closest_marker("cuda") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


class SharedModel:
    """Examples in docstrings share one picture-world, which they leave as it is.

    Registered as a plugin, because hooks of this file are called for the tests below its folder only.
    """

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Generator[None, Any, Any]:
        if not isinstance(item, pytest.DoctestItem):
            return (yield)
        import elakit
        from elakit.models import load

        def shared(name: Any, **options: Any) -> Any:
            return load(name, **options) if options else _loaded(name)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(elakit, "load", shared)
            return (yield)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SharedModel())


@cache
def _loaded(name: str) -> Any:
    from elakit.models import load

    return load(name)


@cache
def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


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
