"""The live panel: draw in a notebook, watch attention and regions move, and put things where they are wanted."""

from __future__ import annotations

from elakit.widgets.live.panel import Panel, live

__all__ = ["Panel", "live"]
