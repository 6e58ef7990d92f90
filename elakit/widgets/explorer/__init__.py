"""The explorer: runs side by side, with attention, regions and measures that follow one step slider.

`explore` makes a widget for Jupyter; `Explorer.to_html` writes the same as a page that needs no Jupyter and no Python.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
