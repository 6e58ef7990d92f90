"""A diagnosis: what was drawn, what was found, what fixes it, and all that in words, code and files.

`elakit.diagnose` makes it, `elakit.diagnosis.report` shows it.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
