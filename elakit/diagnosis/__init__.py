"""Diagnosis of a prompt: images with and without guidance, failures, causes and remedies, as text, code and files.

`elakit.diagnose` makes a diagnosis, and `elakit.diagnosis.report` writes it as an HTML page.
"""

from elakit.diagnosis.data import DiagnosisData, Outcome, Pair
from elakit.diagnosis.measures import MEANINGS, measure_table
from elakit.diagnosis.procedure import diagnose
from elakit.diagnosis.remedies import Remedy, RemedyResult, ranked
from elakit.diagnosis.result import Diagnosis, open_diagnosis
from elakit.diagnosis.sentences import statements, summary
from elakit.diagnosis.trials import DEFAULT, OTHERS

__all__ = [
    "DEFAULT",
    "MEANINGS",
    "OTHERS",
    "Diagnosis",
    "DiagnosisData",
    "Outcome",
    "Pair",
    "Remedy",
    "RemedyResult",
    "diagnose",
    "measure_table",
    "open_diagnosis",
    "ranked",
    "statements",
    "summary",
]
