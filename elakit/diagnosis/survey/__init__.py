"""Many prompts: each diagnosed to a page of its own, and summed up; what was ended is gone on with like a sweep.

`diagnose_many` and ``elakit diagnose --prompts FILE --out FOLDER``.
"""

from elakit.diagnosis.survey.cases import Case, cases
from elakit.diagnosis.survey.run import Survey, diagnose_many
from elakit.diagnosis.survey.summary import remedies, table, write

__all__ = ["Case", "Survey", "cases", "diagnose_many", "remedies", "table", "write"]
