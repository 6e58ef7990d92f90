"""Sweeps: every method over suites of prompts, drawn by many workers, kept as they come, and summed up with intervals.

``elakit sweep run`` and ``elakit sweep report`` are this on the command line.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
