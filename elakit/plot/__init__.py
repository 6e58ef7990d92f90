"""Plotly figures of what a run shows: data in, figure out.

Every function takes runs, or a table made of runs, gives a `plotly.graph_objects.Figure` and changes nothing else.
Words of the prompt are escaped, since plotly reads labels as HTML.
"""

import lazy_loader

# The names and their modules are in __init__.pyi, for type checkers too; each module is imported when it is needed.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
