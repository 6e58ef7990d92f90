"""A-STAR: the loss by hand, and what it remembers of the step before."""

from __future__ import annotations

import pytest
from column_maps import APART, LEFT, NONE, PROMPT, RIGHT, A, attention, total

from elakit.guidance.astar import AStar
from elakit.guidance.memory import Memory


def test_astar_counts_overlap_and_what_is_lost_since_the_step_before() -> None:
    state = Memory()
    # A row: the minima are 0, A, A, 0 and the maps sum to 2 each.
    first = AStar().loss(APART, PROMPT, 0, state)
    assert first.terms == {"segregation": pytest.approx(2 * A / 4), "retention": 0.0}
    assert float(first.total) == pytest.approx(A / 2)
    # Otsu cuts the map of before down the middle: minima of a row are 1, 1 - A, of sums 2 + 2.
    second = AStar().loss(APART, PROMPT, 1, state)
    assert second.terms["retention"] == pytest.approx(2 * (1 - (2 - A) / 4))
    assert total(AStar(segregation=0, retention=3), APART, 1, state) == pytest.approx(3 * second.terms["retention"])


def test_astar_keeps_to_the_last_pass_of_the_step_before() -> None:
    swapped = attention((NONE, RIGHT, NONE, LEFT))
    state = Memory()
    for step, seen in ((0, swapped), (0, APART), (1, swapped), (1, APART)):
        retention = AStar().loss(seen, PROMPT, step, state).terms["retention"]
    # the masks are those of APART, however often step 1 looks
    assert retention == pytest.approx(2 * (1 - (2 - A) / 4))
    # against the masks of APART the swapped maps have minima A, 0 of a row
    assert AStar().loss(swapped, PROMPT, 1, state).terms["retention"] == pytest.approx(2 * (1 - A / 4))
