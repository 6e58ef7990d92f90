"""A-STAR, CONFORM, Self-Cross, layout guidance, BoxDiff and InitNO alike: finite losses, whole runs, schedules."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from column_maps import HALVES, PAIR, PROMPT
from tiny import tiny_pipeline

from elakit.errors import SettingError
from elakit.generation import generate
from elakit.guidance import Attention, NoiseSearch
from elakit.guidance.astar import AStar
from elakit.guidance.box_diff import BoxDiff
from elakit.guidance.conform import CONFORM
from elakit.guidance.initno import InitNO
from elakit.guidance.layout_guidance import LayoutGuidance
from elakit.guidance.self_cross import SelfCross

# Few passes, and no gate that random weights would keep shut.
METHODS: dict[str, Callable[[], Any]] = {
    "a-star": lambda: AStar(),
    "conform": lambda: CONFORM(refinements=1),
    "self-cross": lambda: SelfCross(gate=1, refinements=1),
    "layout-guidance": lambda: LayoutGuidance(HALVES, guided=1, iterations=2, until=0),
    "boxdiff": lambda: BoxDiff(HALVES),
    "initno": lambda: InitNO(rounds=2, iterations=1, last_iterations=1, refinements=1),
}
every_method = pytest.mark.parametrize("name", METHODS)


@every_method
@pytest.mark.parametrize("value", [0.0, 1 / 6])
def test_losses_and_gradients_are_finite_where_maps_are_empty_or_constant(name: str, value: float) -> None:
    method = METHODS[name]()
    state = method.begin(PROMPT, 50)
    for step in (0, 1):
        cross = torch.full((2, 6, 4, 4), value, requires_grad=True)
        own = torch.full((2, 4, 4, 4, 4), value, requires_grad=True)
        loss = method.loss(Attention((cross,), (own,)), PROMPT, step, state).total
        assert torch.isfinite(loss)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, (cross, own), allow_unused=True)
            assert all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)


@every_method
def test_a_whole_run_leaves_a_trace_and_options_that_can_be_written(name: str) -> None:
    method = METHODS[name]()
    run = generate(tiny_pipeline(), PAIR, seed=4, steps=3, guidance=method, record=False, progress=False)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert frame.index.tolist() == list(range(len(method.plan([1.0] * 3, run.prompt))))
    assert np.isfinite(frame.loss).all()
    assert not frame.skipped.any()
    assert frame.moved[0] > 0
    assert json.loads(json.dumps(run.guidance.options)).keys() == run.guidance.options.keys()
    assert run.settings["method"] == name == run.guidance.method
    assert bool(run.guidance.searched) == isinstance(method, NoiseSearch) == (name == "initno")
    assert (run.guidance.regions is not None) == hasattr(method, "regions")


def test_schedules_are_those_of_fifty_steps() -> None:
    noise = np.linspace(14, 0.1, 50).tolist()
    astar, conform, cross, layout, box, initno = (
        kind.plan(noise, PROMPT)
        for kind in (AStar(), CONFORM(), SelfCross(), LayoutGuidance(HALVES), BoxDiff(HALVES), InitNO())
    )
    assert [len(plan) for plan in (astar, conform, cross, layout, box, initno)] == [50, 25, 25, 10, 25, 25]
    assert astar[0].size == 20
    assert astar[49].size == pytest.approx(20 * math.sqrt(0.5))
    assert {i: u.repeats for i, u in enumerate(conform) if u.repeats} == {0: 20, 10: 20, 20: 20}
    assert {i: u.until for i, u in enumerate(cross) if u.repeats} == {10: 0.2, 20: 0.2}
    assert {i: u.until for i, u in enumerate(initno) if u.repeats} == {10: 1, 20: 1}
    assert not any(u.repeats for u in astar)
    assert {i: (u.repeats, u.until) for i, u in enumerate(box) if u.repeats} == {
        0: (20, 0.95), 10: (20, 0.5), 20: (20, pytest.approx(0.2))
    }  # fmt: skip
    # at most 5 updates: 4 while the loss is high, and the one that always follows
    assert {(u.repeats, u.until, u.final) for u in layout} == {(4, 0.2, True)}
    assert layout[0].size == pytest.approx(30 * 14**2 / (1 + 14**2))


@pytest.mark.parametrize("kind", [LayoutGuidance, BoxDiff])
def test_a_layout_has_to_be_given_and_to_fit_the_prompt(kind: Any) -> None:
    with pytest.raises(TypeError, match="regions"):
        kind()
    with pytest.raises(SettingError, match="1 regions, but the prompt has 2 entities"):
        generate(tiny_pipeline(), PAIR, steps=2, guidance=kind(HALVES[:1], guided=1), record=False, progress=False)
