"""Options with which every guidance method acts on a tiny pipeline of random weights."""

from __future__ import annotations

from typing import Any

HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
# Given what they need, with few passes, and without a gate that random weights would keep shut.
OPTIONS: dict[str, dict[str, Any]] = {
    "conform": {"refinements": 1},
    "self-cross": {"gate": 1, "refinements": 1},
    "layout-guidance": {"regions": HALVES, "guided": 1, "iterations": 2},
    "boxdiff": {"regions": HALVES},
    "densediffusion": {"regions": HALVES},
    "bounded-attention": {"regions": [(0, 0, 0.25, 1), (0.75, 0, 1, 1)]},  # with a background
    "initno": {"rounds": 2, "iterations": 1, "last_iterations": 1, "refinements": 1},
}
