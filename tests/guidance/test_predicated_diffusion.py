"""Predicated Diffusion: the three propositions by hand, their gradients, and the schedule."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elakit.guidance import PredicatedDiffusion
from elakit.guidance.method import Attention
from elakit.prompt import Entity, Prompt, Token

TOKENS = tuple(Token(i, word, word, i - 1) for i, word in enumerate(("red", "car", "blue", "bird"), start=1))
CAR = Entity("red car", "car", ("red",), (2,), (1,), "car")
BIRD = Entity("blue bird", "bird", ("blue",), (4,), (3,), "bird")
PROMPT = Prompt("red car blue bird", (CAR, BIRD), TOKENS, end_index=5, length=6)
LEFT, RIGHT = (torch.tensor([side], dtype=torch.float64) for side in ([1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]))


def attention(red: Tensor, car: Tensor, blue: Tensor, bird: Tensor) -> Attention:
    """One layer with one head, between an empty start and end."""
    empty = torch.zeros_like(car)
    return Attention((torch.stack([empty, red, car, blue, bird, empty])[None],))


def terms(seen: Attention) -> dict[str, float]:
    return PredicatedDiffusion().loss(seen, PROMPT, 0, None).terms


def test_attributes_on_their_nouns_and_apart_from_the_others_cost_nothing_but_existence() -> None:
    found = terms(attention(LEFT, LEFT, RIGHT, RIGHT))
    assert found["correspondence"] == found["separation"] == 0
    # A difference of 1 in probability is everything to the softmax of 100 times as much: where the car is, "red" and
    # "car" have 1/2 each. Of four locations two have 1/2 and two have 0.
    nowhere = math.exp((2 * math.log(0.5001) + 2 * math.log(1.0001)) / 4)
    assert found["existence"] == pytest.approx(-math.log(1 - nowhere), rel=1e-6)


def test_exchanged_attributes_break_correspondence_and_separation() -> None:
    found = terms(attention(RIGHT, LEFT, LEFT, RIGHT))
    # The truth of "car <-> red" is 0 (kept at 1e-6) at the locations of the car and at those of "red".
    assert found["correspondence"] == pytest.approx(-math.log(1e-6), rel=1e-6)
    # "red" is on the bird and "blue" on the car, at half of the locations each
    assert found["separation"] == pytest.approx(-math.log(1e-6) / 2, rel=1e-6)


def test_weights_are_those_of_the_released_code() -> None:
    seen = attention(RIGHT, LEFT, LEFT, RIGHT)
    found = terms(seen)
    total = PredicatedDiffusion().loss(seen, PROMPT, 0, None).total
    wanted = 0.1 * found["existence"] + found["correspondence"] + 0.3 * found["separation"]
    assert float(total) == pytest.approx(wanted)


def test_the_gradient_is_that_of_central_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(1, 6, 4, 4, generator=generator, dtype=torch.float64).softmax(1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m: PredicatedDiffusion().loss(Attention((m,)), PROMPT, 0, None).total, (maps,)
    )


def test_the_first_step_has_five_extra_updates_and_a_single_entity_none() -> None:
    plan = PredicatedDiffusion().plan([1.0] * 50, PROMPT)
    assert len(plan) == 25
    assert [update.repeats for update in plan] == [5] + [0] * 24
    assert plan[0].until is None
    single = Prompt("red car", (CAR,), TOKENS[:2], end_index=3, length=6)
    assert PredicatedDiffusion().plan([1.0] * 50, single) == []
