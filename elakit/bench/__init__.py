"""Sweeps: every method over suites of prompts, drawn by many workers, kept as they come, and summed up with intervals.

``elakit bench run`` and ``elakit bench report`` are this on the command line.
"""

from elakit.bench.drawing import draw
from elakit.bench.report import figures, summary, write
from elakit.bench.store import table
from elakit.bench.suites import SUITES, Suite, read_prompts, spread, suite
from elakit.bench.sweep import Outcome, run
from elakit.bench.units import Unit, plan

__all__ = [
    "SUITES",
    "Outcome",
    "Suite",
    "Unit",
    "draw",
    "figures",
    "plan",
    "read_prompts",
    "run",
    "spread",
    "suite",
    "summary",
    "table",
    "write",
]
