from .analysis import find as find
from .findings import CAUSE_KINDS as CAUSE_KINDS
from .findings import FAILURE_KINDS as FAILURE_KINDS
from .findings import Cause as Cause
from .findings import Failure as Failure
from .findings import Findings as Findings
from .layer_profile import profile as profile
