"""Figures of the methods of a sweep: success, kinds of failure, and time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from elakit.guidance.registry import method_title
from elakit.plot.style import ENTITY_COLORS, FAINT, FONT, INK, RUN_COLORS, escape
from elakit.sweep.comparison import summary

FAILURES = (("neglect", "neglect"), ("mixture", "mixture"), ("wrong_color", "wrong color"))


def figures(table: pd.DataFrame) -> dict[str, go.Figure]:
    """Figures that compare the methods of a sweep.

    Parameters
    ----------
    table : DataFrame
        Table of a sweep, as `elakit.sweep.table` returns it.

    Returns
    -------
    dict of str to plotly.graph_objects.Figure
        Three figures. "success" shows the share of right images for each method. "failures" shows the share of each
        kind of failure for each method; an image may have several kinds of failure. "time" has one point per method:
        its x is the generation time divided by that of plain generation, and its y is the share of right images. All
        values have 95% intervals.
    """
    return summary_figures(summary(table))


def summary_figures(found: pd.DataFrame) -> dict[str, go.Figure]:
    """Figures that compare the methods of a sweep: "success", "failures" and "time", as described for `figures`.

    `found` is the result of `elakit.sweep.summary`.
    """
    names = [escape(method_title(str(name))) for name in found.index]
    # plotly counts rows from the bottom, and the first row is to be at the top
    rows = {"categoryorder": "array", "categoryarray": names[::-1], "automargin": True}
    shares = {"title": "share of images", "tickformat": ".0%", "rangemode": "tozero"}
    colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(names))]
    success = go.Figure(
        go.Scatter(
            x=found["success"], y=names, error_x=_error_bars(found, "success"), mode="markers",
            marker={"size": 11, "color": colors}, hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )  # fmt: skip
    success.update_layout(_layout("Right images", len(names), xaxis=shares, yaxis=rows))
    failures = go.Figure(
        [
            go.Bar(
                x=found[column], y=names, name=heading, orientation="h", error_x=_error_bars(found, column),
                marker_color=color, hovertemplate=f"%{{y}}, {heading}: %{{x:.1%}}<extra></extra>",
            )
            for (column, heading), color in zip(FAILURES, ENTITY_COLORS, strict=False)
        ]
    )  # fmt: skip
    failures.update_layout(_layout("Kinds of failure", 2 * len(names), xaxis=shares, yaxis=rows, barmode="group"))
    time = go.Figure(
        go.Scatter(
            x=found["seconds"], y=found["success"], error_x=_error_bars(found, "seconds"),
            error_y=_error_bars(found, "success"), mode="markers+text", text=names,
            textposition=_label_positions(found["seconds"], found["success"]),
            marker={"size": 11, "color": colors}, hovertemplate="%{text}: %{y:.1%}, %{x:.2f}<extra></extra>",
        )
    )  # fmt: skip
    times = {"title": "generation time relative to plain", "rangemode": "tozero"}
    time.update_layout(_layout("Right images against time", 9, xaxis=times, yaxis=shares))
    return {"success": success, "failures": failures, "time": time}


def _label_positions(x: pd.Series, y: pd.Series) -> list[str]:
    """Choose the position of each point's label by plotly's names: "top center", "middle left" and so on.

    `x` and `y` are the coordinates of the points. Points are labeled one after the other. Each label is placed on the
    side of its point where it is farthest from the other points and from the labels already placed.
    """
    shifts = {"top center": (0, 0.07), "bottom center": (0, -0.07), "middle right": (0.1, 0), "middle left": (-0.1, 0)}
    points = np.nan_to_num(np.stack([x / max(x.max(), 1e-9), y / max(y.max(), 1e-9)], 1))
    labels: list[np.ndarray] = []
    positions = []
    for i, point in enumerate(points):
        taken = [*np.delete(points, i, 0), *labels]

        def distance(name: str, at: np.ndarray = point, taken: Sequence[np.ndarray] = taken) -> float:
            label = at + shifts[name]
            inside = 0 <= label[0] <= 1.05
            return min((float(np.hypot(*(label - other))) for other in taken), default=1.0) if inside else 0.0

        best = max(shifts, key=distance)
        labels.append(point + shifts[best])
        positions.append(best)
    return positions


def _layout(title: str, rows: int, **axes: Any) -> dict[str, Any]:
    return {
        "template": "plotly_white", "title": {"text": f"<b>{title}</b>"}, "height": 170 + 34 * rows,
        "font": {"family": FONT, "size": 13, "color": INK}, "legend": {"orientation": "h", "y": -0.25}, **axes,
    }  # fmt: skip


def _error_bars(found: pd.DataFrame, name: str) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "color": FAINT, "thickness": 1.5,
        "array": found[f"{name}_high"] - found[name], "arrayminus": found[name] - found[f"{name}_low"],
    }  # fmt: skip
