from .cases import Case as Case
from .cases import plan_cases as plan_cases
from .run import Survey as Survey
from .run import diagnose_many as diagnose_many
from .summary import remedies as remedies
from .summary import table as table
from .summary import write as write
