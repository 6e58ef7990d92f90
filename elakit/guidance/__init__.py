"""Guidance: one engine that runs training-free methods, and each method in a file of its own."""

from elakit.guidance.ela import ELA
from elakit.guidance.engine import Guide
from elakit.guidance.method import Attention, Loss, Method, NoiseSearch, Update
from elakit.guidance.trace import Trace

__all__ = ["ELA", "METHODS", "Attention", "Guide", "Loss", "Method", "NoiseSearch", "Trace", "Update"]

METHODS: dict[str, type[ELA]] = {ELA.name: ELA}
