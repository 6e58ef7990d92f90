"""Intervals and tests agree with independent computations."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from scipy.stats import binomtest

from elakit import statistics
from elakit.errors import SettingError


@pytest.mark.parametrize("n", [1, 2, 17, 400])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.99])
def test_wilson_is_that_of_scipy(n: int, level: float) -> None:
    for successes in {0, 1, n // 2, n}:
        expected = binomtest(successes, n).proportion_ci(level, method="wilson")
        assert statistics.wilson(successes, n, level) == pytest.approx(tuple(expected), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(5, 4), (-1, 4), (0.5, 4), (0, -1)])
def test_wilson_refuses_impossible_counts(successes: float, n: int) -> None:
    with pytest.raises(SettingError):
        statistics.wilson(successes, n)  # type: ignore[arg-type]


@pytest.mark.parametrize(("fixed", "broken"), [(5, 0), (0, 5), (9, 3), (4, 4), (40, 21)])
def test_mcnemar_counts_coin_tosses(fixed: int, broken: int) -> None:
    n = fixed + broken
    tail = sum(comb(n, k) for k in range(min(fixed, broken) + 1)) / 2**n
    assert statistics.mcnemar(fixed, broken) == pytest.approx(min(1.0, 2 * tail))


def test_holm_by_hand() -> None:
    # sorted: .005 x 4, .01 x 3, .03 x 2, .04 x 1, never below the one before
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]).tolist() == [1.0, 1.0]
    with pytest.raises(SettingError):
        statistics.holm([0.5, 1.5])


def test_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    values = np.random.default_rng(3).normal(2, 1, 400)
    value, low, high = statistics.bootstrap(values)
    half = 1.96 * values.std(ddof=1) / 20
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - half, value + half), abs=0.02)


def test_bootstrap_resamples_groups_not_rows() -> None:
    # 20 prompts of 10 equal images each: 200 rows carry the information of 20
    outcome = np.random.default_rng(5).integers(0, 2, 20)
    rows, prompts = np.repeat(outcome, 10), np.repeat(np.arange(20), 10)
    grouped, alone = statistics.bootstrap(rows, groups=prompts), statistics.bootstrap(rows)
    assert grouped.value == pytest.approx(alone.value)
    assert (grouped.high - grouped.low) > 2.5 * (alone.high - alone.low)
    assert grouped == pytest.approx(statistics.bootstrap(outcome))


def test_bootstrap_of_ratios_by_column() -> None:
    parts = np.array([[1.0, 0.0, 0.0], [3.0, 0.0, 2.0]])
    wholes = np.array([[2.0, 0.0, 4.0], [6.0, 0.0, 4.0]])
    value, low, high = statistics.bootstrap(parts, wholes, resamples=500)
    assert value.tolist() == pytest.approx([0.5, np.nan, 0.25], nan_ok=True)
    assert (low[0], high[0]) == pytest.approx((0.5, 0.5))
    assert (low[2], high[2]) == pytest.approx((0.0, 0.5))
    assert np.isnan([low[1], high[1]]).all()
    assert statistics.bootstrap(parts, wholes).low.tolist()[0] == statistics.bootstrap(parts, wholes).low.tolist()[0]


@pytest.mark.parametrize(
    "arguments",
    [{"numerators": []}, {"numerators": [1], "denominators": [1, 2]}, {"numerators": [1, 2], "groups": ["a"]},
     {"numerators": [1, 2], "groups": [["a"], ["b"]]},
     {"numerators": [1], "level": 1.0}, {"numerators": [1], "resamples": 0}],
)  # fmt: skip
def test_bootstrap_refuses_what_it_cannot_use(arguments: dict) -> None:
    with pytest.raises(SettingError):
        statistics.bootstrap(**arguments)
