"""Surveys: many prompts, each diagnosed on a page of its own, with a summary. An interrupted survey is resumed.

The command line is ``elakit diagnose --prompts FILE --out FOLDER``.
"""

from elakit.diagnosis.survey.cases import Case, plan_cases
from elakit.diagnosis.survey.run import Survey, diagnose_many
from elakit.diagnosis.survey.summary import remedies, table, write

__all__ = ["Case", "Survey", "diagnose_many", "plan_cases", "remedies", "table", "write"]
