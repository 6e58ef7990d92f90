"""Self-Cross: the loss by hand, and the gate that opens once every entity is there."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from column_maps import ALIKE, APART, HALVED, LEFT, NONE, PROMPT, RIGHT, A, attention, total

from elakit.guidance.self_cross import SelfCross


def test_self_cross_counts_attention_to_where_the_other_entity_is() -> None:
    seen = replace(APART, own=(ALIKE[None],))
    # All locations attend equally to all 16: the minimum with 1, 1 - A, A, 0 is 1/16 in three columns of four.
    method = SelfCross(top=1)
    loss = method.loss(seen, PROMPT, 0, method.begin(PROMPT, 50))
    assert loss.terms["excite"] == pytest.approx(0, abs=1e-6)
    assert loss.terms["self_cross"] == pytest.approx(12 / 16, abs=1e-4)
    # the mask holds the columns of 1, 1 - A and A, and outside it the map is 0
    assert loss.terms["clean"] == 0
    assert total(SelfCross(top=1, weight=2), seen) == pytest.approx(24 / 16, abs=1e-4)
    # Locations attend to their own half alone. Those of 1 and 1 - A lie in the entity's half, that of A in the other.
    own, other = (1, 1 - A, A, 0), (0, A, 1 - A, 1)
    mine, theirs = (2 - A) / 2, A / 2
    spread = [(mine * o + theirs * t) / 8 for o, t in zip(own, other, strict=True)]
    reach = sum(min(s, a) for s, a in zip(spread, other, strict=True))
    assert total(method, replace(APART, own=(HALVED[None],))) == pytest.approx(4 * reach, abs=1e-4)


def test_self_cross_takes_the_mean_of_the_largest_values_as_the_maximum() -> None:
    seen = replace(APART, own=(ALIKE[None],))
    method = SelfCross(top=8)
    # a smoothed half holds 1 and 1 - A in four locations each
    assert method.loss(seen, PROMPT, 0, method.begin(PROMPT, 50)).terms["excite"] == pytest.approx(A / 2, abs=1e-6)


def test_self_cross_waits_until_every_entity_is_there() -> None:
    # A hundredth becomes a difference of 1: the softmax over red, car, blue, bird gives e / (e + 3) at most.
    seen = attention((NONE, LEFT / 100, NONE, RIGHT / 100), own=ALIKE)
    base = 1 - math.e / (math.e + 3)
    method = SelfCross(top=1, clean=0)
    loss = method.loss(seen, PROMPT, 0, method.begin(PROMPT, 50))
    assert base > 0.5
    assert float(loss.total) == pytest.approx(base, abs=1e-5)
    assert loss.terms["self_cross"] > 0.1
    open_gate = SelfCross(top=1, clean=0, gate=0.6)
    assert total(open_gate, seen) == pytest.approx(base + loss.terms["self_cross"], abs=1e-5)
