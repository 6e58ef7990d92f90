"""The judge: which nouns a finished image shows, where, in which color, and which of them are fused."""

from elakit.judge.things import Detector, Thing
from elakit.judge.verdict import FAILURES, Verdict, is_black, judge, knows

__all__ = ["FAILURES", "Detector", "Thing", "Verdict", "is_black", "judge", "knows"]
