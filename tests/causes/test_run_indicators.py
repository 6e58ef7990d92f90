"""Layers and heads that are named for a cause."""

from __future__ import annotations

from math import inf

from elakit.causes.run_indicators import _clearest


def test_a_layer_is_named_only_if_the_indicator_becomes_visible_there() -> None:
    # One (position of the first visible step, strength) per run.
    found = {
        "late": [(9.0, 0.9), (9.0, 0.9)],
        "never": [(inf, 0.9), (inf, 0.9)],
        "in one of three runs": [(0.0, 0.9), (inf, 0.9), (inf, 0.9)],
        "weak": [(0.0, 0.01), (0.0, 0.01)],
        "early": [(1.0, 0.8), (3.0, 0.8)],
        "early and strong": [(1.0, 0.9), (3.0, 0.9)],
    }
    assert _clearest(found) == ("early and strong", "early", "late")
