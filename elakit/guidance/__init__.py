"""Guidance: one engine that runs training-free methods, and each method in a file of its own."""

from elakit.guidance.ela import ELA
from elakit.guidance.engine import Guide, Loss, Method, Trace

__all__ = ["ELA", "METHODS", "Guide", "Loss", "Method", "Trace"]

METHODS: dict[str, type[ELA]] = {ELA.name: ELA}
