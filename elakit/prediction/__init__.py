"""Failure predicted: from the attention of a run's first steps to the probability that its image fails, and how."""

from elakit.prediction.features import FEATURES, SHARES, features
from elakit.prediction.predictor import OUTCOMES, Predictor, load_predictor

__all__ = ["FEATURES", "OUTCOMES", "SHARES", "Predictor", "features", "load_predictor"]
