"""A diagnosis: what was drawn, what was found, what fixes it, and all that in words, code and files.

`elakit.diagnose` makes it, `elakit.diagnosis.report` shows it.
"""

from elakit.diagnosis.drawer import Drawer
from elakit.diagnosis.measures import MEANINGS, measure_table
from elakit.diagnosis.remedies import DEFAULT, Remedy, Tried, ranked
from elakit.diagnosis.result import Diagnosis, Outcome, Pair
from elakit.diagnosis.sentences import summary, told
from elakit.diagnosis.store import open_diagnosis, save

__all__ = [
    "DEFAULT",
    "MEANINGS",
    "Diagnosis",
    "Drawer",
    "Outcome",
    "Pair",
    "Remedy",
    "Tried",
    "measure_table",
    "open_diagnosis",
    "ranked",
    "save",
    "summary",
    "told",
]
