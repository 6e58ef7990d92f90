"""BoxDiff: the loss by hand, for boxes and masks, and what refinement follows."""

from __future__ import annotations

import numpy as np
import pytest
from column_maps import APART, HALVES, LEFT, NONE, PROMPT, RIGHT, A, attention, total

from elakit.guidance.box_diff import BoxDiff


def test_boxdiff_refines_along_the_most_neglected_entity() -> None:
    loss = BoxDiff(HALVES).loss(attention((NONE, LEFT, NONE, NONE)), PROMPT, 0, None)
    # the bird has nothing in its box: 1 - the share that four equal words get of it
    assert loss.refinement is not None
    assert float(loss.refinement) == loss.goal == pytest.approx(0.75, abs=1e-6)


def test_boxdiff_sums_what_is_weak_inside_strong_outside_and_wrong_at_edges() -> None:
    # A fifth of 8 locations is one: 1 inside, A outside. All columns are near an edge; 1 - A and A are A away.
    loss = BoxDiff(HALVES).loss(APART, PROMPT, 0, None)
    assert loss.terms == {
        "inner": pytest.approx(0, abs=1e-6),
        "outer": pytest.approx(2 * A),
        "corner": pytest.approx(2 * (A + A) / 4, abs=1e-6),
    }
    assert float(loss.total) == pytest.approx(3 * A, abs=1e-5)
    # All 8 locations of each side: means of 1 and 1 - A inside, A and 0 outside; only the edges' own columns.
    loss = BoxDiff(HALVES, share=1, edge=0).loss(APART, PROMPT, 0, None)
    assert loss.terms == {
        "inner": pytest.approx(A),
        "outer": pytest.approx(A),
        # the car's box ends at column 2, where the map still is A; the bird's begins there, and the map is 1 - A
        "corner": pytest.approx(2 * A / 4, abs=1e-6),
    }


def test_boxdiff_takes_masks_too() -> None:
    masks = np.stack([LEFT.numpy() > 0, RIGHT.numpy() > 0])
    assert total(BoxDiff(masks), APART) == pytest.approx(total(BoxDiff(HALVES), APART))
    assert total(BoxDiff(masks[::-1].copy()), APART) > total(BoxDiff(masks), APART)
