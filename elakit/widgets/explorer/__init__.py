"""The explorer: a Jupyter widget that shows runs side by side. A slider selects the denoising step that is shown.

For each run, the explorer shows the image, attention maps, regions and measures. `explore` creates the widget.
`Explorer.to_html` writes the explorer as an HTML page, which needs neither Jupyter nor Python.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
