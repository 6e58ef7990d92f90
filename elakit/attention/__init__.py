"""Recording, reading and editing the attention of a pipeline run.

`recorder` records a run, and `spec` selects what is kept. `taps` reads the attention of layers. `editing` changes
attention.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
