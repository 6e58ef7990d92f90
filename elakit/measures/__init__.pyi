from . import agreement as agreement
from . import arrays as arrays
from . import leakage as leakage
from . import masks as masks
from . import overlap as overlap
