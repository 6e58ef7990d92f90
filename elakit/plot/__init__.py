"""Plotly figures of what a run shows: data in, figure out.

Every function takes runs, or a table made of runs, gives a `plotly.graph_objects.Figure` and changes nothing else.
Words of the prompt are escaped, since plotly reads labels as HTML.
"""

from __future__ import annotations

from elakit.plot.agreement import agreement
from elakit.plot.layers import bleeding_by_layer
from elakit.plot.leakage import bleeding_over_steps, leakage
from elakit.plot.methods import method_comparison
from elakit.plot.images import entity_maps, images
from elakit.plot.regions import region_animation, region_evolution
from elakit.plot.token_maps import token_maps

__all__ = [
    "agreement",
    "bleeding_by_layer",
    "bleeding_over_steps",
    "entity_maps",
    "leakage",
    "method_comparison",
    "images",
    "region_animation",
    "region_evolution",
    "token_maps",
]
