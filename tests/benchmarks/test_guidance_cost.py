"""Cost of guidance in the shape of Stable Diffusion 1.5, counted without computing anything."""

from __future__ import annotations

from benchmarks.guidance import costs


def test_ela_takes_a_third_more_than_a_plain_run_and_keeps_three_quarters_of_a_gigabyte() -> None:
    step, ways = costs()
    ela, checkpoints, theirs = ways.values()
    # a conditional and an unconditional pass of the U-Net: 339 billion multiplications each, and attention
    assert 2 * 2 * 339e9 < step < 1.2 * 2 * 2 * 339e9
    assert ela.ratio(step) < 1.35
    assert ela.kept < 0.75e9
    assert checkpoints.kept < ela.kept / 4
    assert checkpoints.guided < 1.5 * ela.guided
    assert theirs.ratio(step) > 1.5
    assert theirs.kept > 6 * ela.kept
