"""elakit: see, measure and fix concept bleeding in text-to-image diffusion models."""

from elakit import errors, plot, regions
from elakit.measures import agreement
from elakit import judge as judge
from elakit.attention import Recording, RecordSpec, open_recording, record
from elakit.bleeding import Bleeding
from elakit.diagnosis.procedure import Diagnosis, diagnose
from elakit.diagnosis import open_diagnosis
from elakit.widgets.explorer import Explorer, explore
from elakit.generation import Progress, Run, compare, generate, open_run
from elakit.guidance import ELA
from elakit.widgets.live import live
from elakit.models import load
from elakit.prompt import Entity, Prompt, Token, parse

__version__ = "0.1.0"

__all__ = [
    "ELA",
    "Bleeding",
    "Diagnosis",
    "Entity",
    "Explorer",
    "Progress",
    "Prompt",
    "RecordSpec",
    "Recording",
    "Run",
    "Token",
    "agreement",
    "compare",
    "diagnose",
    "errors",
    "explore",
    "generate",
    "judge",
    "live",
    "load",
    "open_diagnosis",
    "open_recording",
    "open_run",
    "parse",
    "plot",
    "record",
    "regions",
]
