"""Attention Regulation: terms and descent by hand, and the layers really use the regulated scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guided_families import SIZE, shared
from tiny import tiny_pipeline
from torch import Tensor

from elakit import generate
from elakit.attention.rescoring import Site
from elakit.errors import SettingError
from elakit.guidance import AttentionRegulation
from elakit.guidance.attention_regulation import gaussians, objective
from elakit.models import adapter_for
from elakit.prompt import parse

PAIR = "a [red car] and a [blue bird]"


def test_the_terms_are_those_of_maps_that_are_easily_counted() -> None:
    # 100 locations: the .9 quantile is nine tenths of the way from the 90th to the 91st value: 0 and 1 -> .1
    maps = torch.zeros(1, 1, 10, 10, dtype=torch.float64)
    maps.view(-1)[:10] = 1
    strength, share = objective(maps)
    assert float(strength) == pytest.approx((0.1 - 0.9) ** 2)
    assert float(share) == pytest.approx((0.1 - 0.2) ** 2)
    # six tokens share all attention instead of asking for 1.2 of it
    assert float(objective(torch.full((1, 6, 3, 3), 1 / 6))[1]) == pytest.approx(0, abs=1e-12)


def test_one_iteration_adds_the_first_gaussians_faded_by_the_step() -> None:
    pipe = tiny_pipeline()
    prompt, layer = parse(PAIR, pipe), adapter_for(pipe).layers()[0]
    method = AttentionRegulation(iterations=1)
    state = method.begin(prompt, 50)
    scores = torch.randn(2, 64, 20, generator=torch.Generator().manual_seed(0))
    change = method.hold(None, (8, 8), prompt, 3, state).change(Site(layer, (8, 8), 0, 0.9, 20), lambda: scores)
    assert change is not None
    wanted = 0.99**3 * 0.5 * gaussians((8, 8)).sum(0).flatten()  # first weights are .5, in this step and "before"
    for token in (3, 7):  # car and bird
        torch.testing.assert_close(change.bias[0, :, token], wanted)
    others = [i for i in range(20) if i not in (3, 7)]
    assert not change.bias[..., others].any()
    assert change.kept == (0, 8)  # start and end of text


def test_the_descent_is_the_one_of_central_differences() -> None:
    scores = torch.randn(2, 6, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    bumps, targets = gaussians((6, 6)).double(), [1, 3]
    start = torch.full((2, len(bumps), 2), 0.5, dtype=torch.float64)
    method = AttentionRegulation(iterations=2, step_size=5.0)

    def addend(weights: Tensor) -> Tensor:
        return sum(w[:, None, None, :] * b[None, :, :, None] for w, b in zip(weights.unbind(1), bumps, strict=True))

    def loss(weights: Tensor) -> float:
        changed = scores.clone()
        changed[..., targets] += addend(weights)
        maps = changed.softmax(-1)[..., targets].movedim(-1, 1)
        strength, share = objective(maps)
        return float(strength + 80 * share + 0.09 * weights.square().mean())

    slope, step = torch.zeros_like(start), 1e-6
    for i in range(start.numel()):
        moved = torch.zeros(start.numel(), dtype=torch.float64)
        moved[i] = step
        moved = moved.view_as(start)
        slope.view(-1)[i] = (loss(start + moved) - loss(start - moved)) / (2 * step)
    second = start - 5.0 * 2 * slope  # two heads
    better = min((start, second), key=loss)
    assert loss(second) < loss(start)  # or the test would show nothing
    torch.testing.assert_close(method.optimize(scores, targets, bumps, start), addend(better), atol=1e-6, rtol=1e-5)


def test_the_previous_steps_addend_is_a_quarter_of_the_next_one() -> None:
    pipe = tiny_pipeline()
    prompt, layer = parse(PAIR, pipe), adapter_for(pipe).layers()[0]
    method = AttentionRegulation(decay=1)
    site, state = Site(layer, (8, 8), 0, 0.9, 20), method.begin(prompt, 50)
    first, second = torch.randn(2, 2, 64, 20, generator=torch.Generator().manual_seed(0))
    method.hold(None, (8, 8), prompt, 0, state).change(site, lambda: first)
    before = state.last[layer.name]
    change = method.hold(None, (8, 8), prompt, 1, state).change(site, lambda: second)
    assert change is not None
    wanted = 0.25 * before + 0.75 * state.last[layer.name]
    torch.testing.assert_close(change.bias[..., [3, 7]], wanted.flatten(1, 2))


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha"])
def test_nouns_get_a_larger_share_in_every_family_with_cross_attention(name: str) -> None:
    pipe = shared(name)
    options: dict[str, Any] = {"seed": 2, "steps": 2, "progress": False, **SIZE}
    plain = generate(pipe, PAIR, **options).entity_maps().isel(step=0)
    run = generate(pipe, PAIR, guidance=AttentionRegulation(), **options)
    goal = 0.2
    maps = run.entity_maps().isel(step=0)
    assert abs(float(maps.mean()) - goal) < abs(float(plain.mean()) - goal)
    assert run.guidance is not None
    assert run.guidance.to_frame().index.tolist() == [0]


def test_a_batch_is_made_of_single_runs_and_repeats_itself() -> None:
    pipe = tiny_pipeline(torch.float64)  # a descent in steps of 100 amplifies rounding
    options: dict[str, Any] = {"steps": 4, "guidance": AttentionRegulation(), "record": False, "progress": False}
    for run in generate(pipe, PAIR, seed=[1, 2], **options):
        alone = generate(pipe, PAIR, seed=run.seed, **options)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1


def test_models_with_joint_attention_are_refused() -> None:
    with pytest.raises(SettingError, match="Use a model with plain cross-attention"):
        generate(shared("sd3"), PAIR, steps=2, guidance=AttentionRegulation(), progress=False, **SIZE)
