"""Plans of the methods: those of their authors at fifty steps, and in proportion at other numbers of steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from column_maps import HALVES, PROMPT
from word_maps import hand_made

from elakit.guidance import (
    CONFORM,
    EBAMA,
    AStar,
    AttendAndExcite,
    BoxDiff,
    DivideAndBind,
    InitNO,
    LayoutGuidance,
    SelfCross,
    SynGen,
)


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
