"""The explorer: runs side by side, with attention, regions and measures that follow one step slider.

`explore` makes a widget for Jupyter; `Explorer.to_html` writes the same as a page that needs no Jupyter and no Python.
"""

from __future__ import annotations

from elakit.widgets.explorer.widget import Explorer, explore

__all__ = ["Explorer", "explore"]
