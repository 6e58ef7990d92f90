"""What is in a finished picture-world picture: which nouns, where, in which colour."""

from elakit.judge.verdict import Verdict, judge, knows

__all__ = ["Verdict", "judge", "knows"]
