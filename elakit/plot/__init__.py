"""Plotly figures of runs and of tables.

Every function takes runs or a table and returns a `plotly.graph_objects.Figure`; only `save_animation` writes a file
instead. Figures are at most 860 pixels wide unless a panel size is given. Words of the prompt are escaped, because
plotly reads labels as HTML.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
