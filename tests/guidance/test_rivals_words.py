"""Attend-and-Excite, SynGen, Divide & Bind and EBAMA alike: finite losses, whole runs, schedules, layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline
from word_maps import PAIR, hand_made, loss_of

from elakit.generation import generate
from elakit.guidance import Attention
from elakit.guidance.attend_excite import AttendAndExcite
from elakit.guidance.divide_bind import DivideAndBind
from elakit.guidance.ebama import EBAMA
from elakit.guidance.syngen import SynGen
from elakit.models import adapter_for
from elakit.run import open_run

METHODS = [AttendAndExcite(), SynGen(), SynGen(lone_nouns=True), DivideAndBind(), EBAMA()]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@each_method
@pytest.mark.parametrize("kind", ["zero", "constant", "one token takes all", "one location takes all"])
def test_loss_and_gradient_are_finite_where_maps_say_nothing(method: Any, kind: str) -> None:
    maps = torch.full((2, 7, 4, 4), 1 / 7 if kind == "constant" else 0.0)
    if kind == "one token takes all":
        maps[:, 2] = 1
    elif kind == "one location takes all":
        maps[:, 2, 0, 0] = 1
    maps.requires_grad_(True)
    loss = loss_of(method, Attention((maps,)), hand_made())
    assert math.isfinite(float(loss.total.detach()))
    assert all(type(term) is float and math.isfinite(term) for term in loss.terms.values())
    assert torch.isfinite(torch.autograd.grad(loss.total, maps)[0]).all()


@each_method
def test_a_whole_run_is_guided_traced_and_reopened(method: Any, tmp_path: Any) -> None:
    if hasattr(method, "refine"):
        method = replace(method, refine=((0.0, 2.0, 2),))  # more than there can be, so both tries are made
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=5, steps=4, record=False, progress=False)
    run = generate(pipe, PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert run.label == method.name
    assert frame.index.tolist() == [0, 1]
    assert frame.refinements.tolist() == [2 if hasattr(method, "refine") else 0, 0]
    assert not frame.skipped.any()
    assert np.isfinite(frame.loss).all()
    assert (frame.moved > 0).all()
    assert np.any(np.asarray(run.image) != np.asarray(plain.image))
    run.save(tmp_path / "run")
    assert open_run(tmp_path / "run").guidance.to_frame().loss.tolist() == frame.loss.tolist()


@pytest.mark.parametrize(
    ("method", "refined"),
    [
        (AttendAndExcite(), {0: (20, 0.95), 10: (20, 0.5), 20: (20, 0.2)}),
        (DivideAndBind(), {0: (50, -0.05), 10: (20, -0.2), 20: (20, -0.3)}),
        (SynGen(), {}),
        (EBAMA(), {}),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_plan_is_the_authors_at_fifty_steps_and_in_proportion_at_others(
    method: Any, refined: dict[int, tuple[int, float]]
) -> None:
    plan = method.plan([1.0] * 50, hand_made())
    falls = bool(refined)
    guided = 26 if isinstance(method, EBAMA) else 25  # EBAMA's code guides while the step index is at most 25
    assert [u.size for u in plan] == pytest.approx([20 * math.sqrt(1 - falls * i / 98) for i in range(guided)])
    assert {i: (u.repeats, u.until) for i, u in enumerate(plan) if u.repeats} == {
        i: (tries, pytest.approx(until)) for i, (tries, until) in refined.items()
    }
    tenth = method.plan([1.0] * 10, hand_made())
    assert len(tenth) == 5
    assert [i for i, u in enumerate(tenth) if u.repeats] == [i // 5 for i in refined]


@each_method
def test_layers_of_the_chosen_size_are_read(method: Any) -> None:
    layers = adapter_for(tiny_pipeline()).layers()
    assert {layer.factor for layer in method.select(layers, (8, 8))} == {1}
    finer = {1} if isinstance(method, DivideAndBind) else set()  # of attributes
    assert {layer.factor for layer in replace(method, size=4).select(layers, (8, 8))} == {2} | finer
    if finer:
        assert {layer.factor for layer in replace(method, size=4, binding=()).select(layers, (8, 8))} == {2}
