from . import explorer as explorer
from . import live as live
