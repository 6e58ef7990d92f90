from .things import Detector as Detector
from .things import Thing as Thing
from .verdict import FAILURES as FAILURES
from .verdict import Verdict as Verdict
from .verdict import is_black as is_black
from .verdict import judge as judge
from .verdict import knows as knows
