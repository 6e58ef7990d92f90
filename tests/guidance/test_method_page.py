"""The page on adding a method: its example runs, and its table lists what the interface has."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tiny import tiny_flux, tiny_pipeline, tiny_sd3

import elakit
from elakit.guidance import METHODS
from elakit.guidance.method import Attention, Method, Update

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "developing" / "adding-a-method.md"


def example(name: str) -> Iterator[ModuleType]:
    text = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(rf"```python\n# elakit/guidance/{name}\.py\n(.*?)```", text, flags=re.S)
    module = ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        exec(compile(code, str(PAGE), "exec"), module.__dict__)
        yield module
    finally:
        del sys.modules[name]


@pytest.fixture(scope="module")
def separate() -> Iterator[Any]:
    for module in example("separate"):
        yield module.Separate


@pytest.fixture(scope="module")
def loud() -> Iterator[Any]:
    for module in example("loud"):
        yield module.Loud


def test_the_table_lists_the_interface_and_all_files_exist() -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, flags=re.M)
    listed = {name for row in rows for name in re.findall(r"\w+", row)}
    members = {name for name in {*vars(Method), *Method.__annotations__} if not name.startswith("_")}
    assert listed == members
    for path in re.findall(r"`((?:elakit|tests|docs)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_loss_of_the_example_is_the_overlap_of_two_maps(separate: Any) -> None:
    prompt = elakit.parse("a [bear] and a [clock]", elakit.load("picture-world"))
    maps = torch.zeros(prompt.length, 1, 4)
    bear, clock = (entity.token_indices[0] for entity in prompt.entities)
    maps[bear, 0] = torch.tensor([0.2, 0.2, 0.0, 0.0])  # normalized: .5 .5 0 0
    maps[clock, 0] = torch.tensor([0.0, 0.1, 0.1, 0.2])  # normalized: 0 .25 .25 .5
    loss = separate().loss(Attention((maps[None],)), prompt, 0, None)
    assert float(loss.total) == pytest.approx(0.25)


def test_the_example_guides_and_can_be_registered(separate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "separate", separate)
    pipe = elakit.load("picture-world")
    run = elakit.generate(
        pipe, "a [bear] and a [clock]", seed=0, steps=4, guidance=METHODS["separate"](), progress=False, record=False
    )
    trace = run.guidance.to_frame()
    assert list(trace.index) == [0, 1]
    assert (trace["moved"] > 0).all()
    with pytest.raises(elakit.errors.SettingError, match="guided"):
        separate(guided=2)


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_sd3, tiny_flux])
def test_the_example_that_edits_scores_raises_the_share_of_attributes(loud: Any, make: Any) -> None:
    options = {"seed": 0, "steps": 2, "progress": False, "record": False, "height": 32, "width": 48}
    pipe = make()
    shares = [
        elakit.generate(pipe, "a [red car] and a [blue bird]", guidance=loud(strength=strength), **options)
        .guidance.to_frame()
        .attributes
        for strength in (0.0, 2.0)
    ]
    assert (shares[1] > shares[0]).all()


def test_a_plan_of_edits_without_edits_is_refused(separate: Any) -> None:
    class Forgotten(separate):  # type: ignore[misc]
        def plan(self, noise: Any, prompt: Any) -> Any:
            return [Update(0.0, hold=True)] * len(noise)

    pipe = elakit.load("picture-world")
    with pytest.raises(TypeError, match="Forgotten has updates with hold=True, but the class has no method `hold`"):
        elakit.generate(pipe, "a [bear] and a [clock]", seed=0, steps=1, guidance=Forgotten(), progress=False)
