"""Seeds of the benchmark of causes: thresholds are chosen on development seeds, and reported on others."""

from __future__ import annotations

from benchmarks.causes import SEEDS
from benchmarks.tune import DEVELOPMENT


def test_thresholds_are_chosen_on_even_seeds_for_development() -> None:
    assert all(seed < DEVELOPMENT and seed % 2 == 0 for seed in SEEDS["calibrate"])
    assert all(seed >= DEVELOPMENT for seed in SEEDS["report"])
