"""InitNO: the losses by hand, and the search for initial noise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from column_maps import ALIKE, APART, HALVED, LEFT, NONE, PAIR, PROMPT, RIGHT, A, attention
from tiny import tiny_pipeline

from elakit.generation import generate
from elakit.guidance import Attention
from elakit.guidance.initno import InitNO


def test_initno_steps_along_the_neglect_and_refines_along_all_terms() -> None:
    seen = attention((NONE, LEFT / 100, NONE, RIGHT / 100), own=ALIKE)
    loss = InitNO().loss(seen, PROMPT, 0, InitNO().begin(PROMPT, 50))
    assert float(loss.total) == pytest.approx(1 - math.e / (math.e + 3), abs=1e-5)
    assert loss.terms["conflict"] == pytest.approx(0.5)  # equal maps: the minimum is half of the sum
    assert loss.refinement is not None
    expected = loss.terms["excite"] + loss.terms["conflict"] + 0.1 * loss.terms["clean"]
    assert float(loss.refinement) == pytest.approx(expected, abs=1e-6)
    assert loss.goal == pytest.approx(max(loss.terms["excite"] / 0.2, 0.5 / 0.3))  # 1 where both thresholds are met
    # the smoothed halves share A and A of 2 + 2 in each row
    halved = InitNO().loss(replace(APART, own=(HALVED[None],)), PROMPT, 0, InitNO().begin(PROMPT, 50))
    assert halved.terms["conflict"] == pytest.approx(A / 2)


def attending(wanted: float, seen: list[torch.Tensor]) -> Callable[[torch.Tensor], Attention]:
    """Halves that stand out by `wanted`, a little more where the noise's mean is high; keeps the noise it is asked."""

    def attend(trial: torch.Tensor) -> Attention:
        seen.append(trial.detach().clone())
        strength = wanted + 0.001 * torch.tanh(trial.mean())
        return attention((NONE, LEFT * strength, NONE, RIGHT * strength), own=HALVED)

    return attend


def test_noise_that_is_good_enough_is_kept_as_it_is() -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found, rows = InitNO().search(noise, attending(1.0, []), PROMPT)
    assert torch.equal(found, noise)
    assert [(row["round"], row["iteration"], row["kl"]) for row in rows] == [(0, 0, 0.0)]
    assert rows[0]["cross"] < 0.2
    assert rows[0]["conflict"] == pytest.approx(A / 2)


def test_a_search_in_vain_draws_anew_and_ends_with_the_best_draw() -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []
    method = InitNO(rounds=3, iterations=2, last_iterations=4)
    found, rows = method.search(noise, attending(0.01, seen), PROMPT)
    assert [row["round"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3]
    starts = [seen[0], seen[2], seen[4]]
    assert torch.equal(starts[0], noise)
    assert all(abs(float(start.mean())) < 0.3 and abs(float(start.std()) - 1) < 0.3 for start in starts)
    assert not torch.equal(starts[1], starts[2])
    # a higher mean is a better score here, and the search raises it
    assert torch.equal(seen[6], max(starts, key=lambda start: float(start.mean())))
    assert float(found.mean()) > float(seen[6].mean())
    assert [row["cross"] for row in rows[6:]] == sorted((row["cross"] for row in rows[6:]), reverse=True)
    again, _ = method.search(noise, attending(0.01, []), PROMPT)
    assert torch.equal(found, again)


def test_noise_stays_near_unit_noise_however_fast_it_moves() -> None:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    _, rows = InitNO(learning_rate=5, rounds=1).search(noise, attending(0.01, []), PROMPT)
    kls = [row["kl"] for row in rows]
    assert max(kls) <= 0.001
    assert max(kls) > 0.0009
    still, _ = InitNO(learning_rate=5, max_kl=0, rounds=1).search(noise, attending(0.01, []), PROMPT)
    assert torch.equal(still, noise)


def test_noise_is_searched_and_refined_in_a_batch_as_for_single_images() -> None:
    """Each of the 20 updates of refinement amplifies the rounding of those before it."""
    pipe = tiny_pipeline()
    method = InitNO(rounds=2, iterations=2, last_iterations=1)
    settings: dict[str, Any] = {"steps": 2, "guidance": method, "record": False, "progress": False}
    batch = generate(pipe, PAIR, seed=[1, 2], **settings)
    for run in batch:
        single = generate(pipe, PAIR, seed=run.seed, **settings)
        assert np.abs(np.asarray(run.image).astype(int) - np.asarray(single.image)).max() <= 1
        assert run.guidance is not None
        assert single.guidance is not None
        assert run.guidance.searched == single.guidance.searched
        assert run.guidance.rows[0]["refinements"] == 20
        assert run.guidance.rows[0]["loss"] == pytest.approx(single.guidance.rows[0]["loss"], rel=1e-6)


def test_initno_may_choose_the_noise_and_leave_latents_alone() -> None:
    pipe = tiny_pipeline()
    method = InitNO(rounds=1, iterations=2, last_iterations=1, guided=0, learning_rate=10, max_kl=1)
    plain = generate(pipe, PAIR, seed=4, steps=2, record=False, progress=False)
    run = generate(pipe, PAIR, seed=4, steps=2, guidance=method, record=False, progress=False)
    assert run.guidance is not None
    assert run.guidance.to_frame().empty
    first, moved, again = (row["cross"] for row in run.guidance.searched)
    assert moved != first == again
    assert np.any(np.asarray(run.image) != np.asarray(plain.image))
