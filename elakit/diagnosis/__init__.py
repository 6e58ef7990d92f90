"""Diagnosis of a prompt: images with and without guidance, their failures, likely causes, and remedies.

`elakit.diagnose` makes a diagnosis, and `elakit.diagnosis.report` writes it as an HTML page.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
