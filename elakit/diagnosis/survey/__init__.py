"""Surveys: many prompts, each diagnosed on a page of its own, with a summary. An interrupted survey is resumed.

The command line is ``elakit diagnose --prompts FILE --out FOLDER``.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
