"""Surveys: diagnoses of many prompts, with one page per prompt and a summary.

The command line is ``elakit diagnose --prompts FILE --out FOLDER``. The same command resumes an interrupted survey.
"""

from elakit.diagnosis.survey.cases import Case, plan_cases
from elakit.diagnosis.survey.run import Survey, diagnose_many
from elakit.diagnosis.survey.summary import remedies, table, write

__all__ = ["Case", "Survey", "diagnose_many", "plan_cases", "remedies", "table", "write"]
