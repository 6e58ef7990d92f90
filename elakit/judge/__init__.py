"""What is in a finished image: which nouns, where, in which color, and what is fused."""

from elakit.judge.things import Detector, Thing
from elakit.judge.verdict import FAILURES, Verdict, judge, knows

__all__ = ["FAILURES", "Detector", "Thing", "Verdict", "judge", "knows"]
