"""Sweeps: every method over suites of prompts, drawn by many workers, kept as they come, and summed up with intervals.

``elakit sweep run`` and ``elakit sweep report`` are this on the command line.
"""

from elakit.sweep.drawing import draw
from elakit.sweep.report import figures, summary, write
from elakit.sweep.store import table
from elakit.sweep.suites import SUITES, Suite, read_prompts, spread, suite
from elakit.sweep.sweep import Outcome, run
from elakit.sweep.units import Unit, plan

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
