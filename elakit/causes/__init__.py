"""Why a prompt fails: what goes wrong in its images, where it starts, and what causes it.

Pure functions over finished runs and the pipeline's text encoder: nothing is drawn here.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
