"""Why a prompt fails: what goes wrong in its images, where it starts, and what causes it.

Pure functions over finished runs and the pipeline's text encoder: nothing is drawn here.
"""

from elakit.causes.find import find
from elakit.causes.findings import CAUSE_KINDS, FAILURE_KINDS, Cause, Failure, Findings, wilson
from elakit.causes.profile import profile

__all__ = ["CAUSE_KINDS", "FAILURE_KINDS", "Cause", "Failure", "Findings", "find", "profile", "wilson"]
