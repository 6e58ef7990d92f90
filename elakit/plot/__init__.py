"""Plotly figures of runs and of tables.

Every function takes runs, or a table of runs, returns a `plotly.graph_objects.Figure` and has no side effect. Figures
are at most 900 pixels wide unless a panel size is given. Words of the prompt are escaped, because plotly reads labels
as HTML.
"""

from __future__ import annotations

from elakit.plot.agreement import agreement
from elakit.plot.animation import save_animation
from elakit.plot.images import entity_maps, images
from elakit.plot.layers import bleeding_by_layer
from elakit.plot.leakage import bleeding_over_steps, leakage
from elakit.plot.methods import method_comparison
from elakit.plot.regions import region_animation, region_evolution
from elakit.plot.token_maps import token_maps

__all__ = [
    "agreement",
    "bleeding_by_layer",
    "bleeding_over_steps",
    "entity_maps",
    "images",
    "leakage",
    "method_comparison",
    "region_animation",
    "region_evolution",
    "save_animation",
    "token_maps",
]
