"""FOCUS: divergences and step sizes by hand, the blocks that are read, and runs of every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from guided_families import FAMILIES, PAIR, SIZE, shared
from word_maps import hand_made

from elakit import generate
from elakit.guidance import FOCUS, Attention
from elakit.guidance.engine import noise_levels
from elakit.guidance.focus import divergence
from elakit.models import adapter_for


def test_the_divergence_of_two_maps_by_hand() -> None:
    # cubed and normalized: (8, 1) / 9 and (1, 8) / 9, whose mean is (1/2, 1/2)
    maps = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    wanted = (8 / 9 * math.log(16 / 9) + 1 / 9 * math.log(2 / 9)) / math.log(2)
    assert float(divergence(maps)) == pytest.approx(wanted, rel=1e-6)
    assert float(divergence(5 * maps)) == pytest.approx(wanted, rel=1e-6)


def test_words_that_attend_alike_and_apart_from_others_cost_nothing() -> None:
    prompt = hand_made()
    maps = torch.zeros(1, prompt.length, 4, 12, dtype=torch.float64)
    for token in (1, 2):
        maps[0, token, :, :3] = 0.3
    for token in (3, 4):
        maps[0, token, :, 9:] = 0.3
    right = FOCUS().loss(Attention((maps,)), prompt, 0, None)
    assert right.terms == pytest.approx({"coherence": 0, "separation": 0}, abs=1e-6)
    swapped = maps.clone()
    swapped[0, [1, 3]] = maps[0, [3, 1]]  # each attribute is on the other noun
    wrong = FOCUS().loss(Attention((swapped,)), prompt, 0, None)
    assert wrong.terms == pytest.approx({"coherence": 1, "separation": 1}, abs=1e-6)
    assert float(wrong.total) == pytest.approx(1, abs=1e-6)


def test_the_blur_is_a_gaussian_of_three_locations_with_standard_deviation_one() -> None:
    prompt = hand_made()
    maps = torch.rand(1, prompt.length, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)], dtype=torch.float64)
    kernel = torch.outer(weights, weights) / weights.sum() ** 2
    padded = torch.nn.functional.pad(maps[0][:, None], (1, 1, 1, 1), mode="reflect")
    blurred = torch.nn.functional.conv2d(padded, kernel[None, None])[:, 0].flatten(1)
    alike = (divergence(blurred[[1, 2]]) + divergence(blurred[[3, 4]])) / 2
    apart = 1 - divergence(torch.stack([blurred[[1, 2]].mean(0), blurred[[3, 4]].mean(0)]))
    assert float(FOCUS().loss(Attention((maps,)), prompt, 0, None).total) == pytest.approx(float((alike + apart) / 2))


def test_step_sizes_are_those_of_the_control_of_the_velocity() -> None:
    pipe = FAMILIES["sd3"].make()
    pipe.scheduler.set_timesteps(4)
    plan = FOCUS(strength=3).plan(noise_levels(pipe.scheduler), hand_made(pieces=2))
    sigmas = pipe.scheduler.sigmas.double().tolist()  # from 1 to 0
    for update, now, after in zip(plan, sigmas[:-1], sigmas[1:], strict=True):
        t = 1 - now
        sigma = 2 * (1 - t + 1e-3) / (t + 1e-3)
        assert update.size == pytest.approx(3 * sigma * (1 - t) * (now - after), rel=1e-4)


def test_only_the_blocks_with_two_streams_are_read_where_there_are_any() -> None:
    flux = adapter_for(shared("flux")).layers()
    assert {layer.place for layer in FOCUS().select(flux, (8, 12))} == {"double"}
    assert {layer.place for layer in FOCUS(layers="single").select(flux, (8, 12))} == {"single"}
    assert FOCUS().select(adapter_for(shared("sd")).layers(), (8, 12))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_guided_in_every_step(name: str) -> None:
    options: dict[str, Any] = {"steps": 2, "guidance": FOCUS(strength=0.01), "record": False, "progress": False, **SIZE}
    run = generate(shared(name), PAIR, seed=1, **options)
    assert run.guidance is not None
    moved = run.guidance.to_frame().moved
    assert moved.index.tolist() == [0, 1]
    assert moved[0] > 0  # the last step has next to no noise, so that its control may vanish
