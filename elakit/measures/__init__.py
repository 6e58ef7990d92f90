"""Measures on attention maps and masks, as plain numpy functions.

`arrays` checks and resamples arrays, `masks` binarizes maps and computes bounding boxes, `overlap` compares two maps or
masks, `leakage` compares maps with regions, and `agreement` compares maps with the finished image.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
