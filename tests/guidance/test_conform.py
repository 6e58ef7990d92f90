"""CONFORM: the loss by hand, also where there is nothing to compare."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from column_maps import APART, BIRD, CAR, LEFT, NONE, PROMPT, RIGHT, A, attention

from elakit.guidance.conform import CONFORM
from elakit.guidance.memory import Memory


def test_conform_is_the_mean_over_pairs_of_one_class() -> None:
    prompt = replace(PROMPT, entities=(CAR, replace(BIRD, attributes=(), attribute_indices=())))
    seen = attention((LEFT, LEFT, NONE, RIGHT))
    # Cosine of the two halves: minima of a row multiply to A (1 - A) twice, squares sum to 1 + (1 - A)^2 + A^2.
    cosine = 2 * A * (1 - A) / (1 + (1 - A) ** 2 + A**2)
    method, state = CONFORM(), Memory()
    # Pairs (red, car) and (car, red), each against one bird; the bird alone has no pair.
    first = method.loss(seen, prompt, 0, state)
    alone = math.log1p(math.exp(cosine / 0.5 - 1 / 0.5))
    assert float(first.total) == pytest.approx(alone)
    # With the step before: 4 x 3 pairs of car and red against two birds, 2 of the bird against four.
    second = method.loss(seen, prompt, 1, state)
    car, bird = (math.log1p(n * math.exp(cosine / 0.5 - 1 / 0.5)) for n in (2, 4))
    assert float(second.total) == pytest.approx((12 * car + 2 * bird) / 14)


def test_conform_has_nothing_to_compare_at_the_first_step_without_attributes() -> None:
    entities = tuple(replace(e, attributes=(), attribute_indices=()) for e in PROMPT.entities)
    state = Memory()
    assert float(CONFORM().loss(APART, replace(PROMPT, entities=entities), 0, state).total) == 0
    assert float(CONFORM().loss(APART, replace(PROMPT, entities=entities), 1, state).total) > 0
