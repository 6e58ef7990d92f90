"""Failure foretold: from the attention of a run's first steps to the probability that its picture fails, and how."""

from elakit.prediction.features import FEATURES, SHARES, features

__all__ = ["FEATURES", "SHARES", "features"]
