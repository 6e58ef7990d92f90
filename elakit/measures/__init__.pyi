from . import agreement as agreement
from . import masks as masks
