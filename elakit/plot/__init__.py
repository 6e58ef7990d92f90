"""Plotly figures of what a run shows: data in, figure out.

Every function takes runs, gives a `plotly.graph_objects.Figure` and changes nothing else. Words of the prompt are
escaped, since plotly reads labels as HTML.
"""

from __future__ import annotations

from elakit.plot.agreement import agreement
from elakit.plot.leakage import bleeding_over_steps, leakage
from elakit.plot.pictures import entity_maps, pictures
from elakit.plot.regions import region_evolution
from elakit.plot.token_maps import token_maps

__all__ = [
    "agreement",
    "bleeding_over_steps",
    "entity_maps",
    "leakage",
    "pictures",
    "region_evolution",
    "token_maps",
]
