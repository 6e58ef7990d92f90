"""Figure that compares methods: success, images fixed and broken, and time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from elakit.errors import SettingError
from elakit.guidance import method_title
from elakit.numbering import number_of, plural
from elakit.plot import style

if TYPE_CHECKING:
    import pandas as pd

# Columns of the summary and their headings.
_PANELS = {
    "success": "right",
    "fixed": "fixed, share of<br>plain's failures",
    "broken": "broken, share of<br>plain's successes",
    "seconds": "time relative<br>to plain",
}
_PLAIN = "plain"
_LEVEL = 0.05


def method_comparison(summary: pd.DataFrame, *, panel: int | None = None, title: str | None = None) -> go.Figure:
    """Comparison of methods with plain generation: shares of right, fixed and broken images, and time.

    Plain generation comes first. The methods follow in descending order of their share of right images.

    Parameters
    ----------
    summary : DataFrame
        One row per method, as `elakit.sweep.summary` returns it. The columns success, fixed and broken are shares, from
        0 to 1. The column "seconds" is the generation time divided by the time of plain generation.

        For each of these four columns, two further columns have the suffixes "_low" and "_high": the ends of an
        interval, shown as whiskers. The column "p_holm" is optional: the p-value of the difference in success
        between the method and plain generation.
    panel : int, optional
        Width of a panel in pixels; by default the figure is at most 860 pixels wide.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that states how many methods are compared.

    Returns
    -------
    plotly.graph_objects.Figure
        Each panel has one dot per method. A dot is filled if the success of the method differs significantly from that
        of plain generation (``p_holm`` below 0.05). The dots of plain generation are always filled.

    Raises
    ------
    SettingError
        The table lacks a column, or has no rows.

    Examples
    --------
    >>> import pandas as pd
    >>> from elakit import sweep
    >>> table = pd.DataFrame({"prompt": ["a", "a", "b", "b"], "method": ["plain", "ela", "plain", "ela"],
    ...     "success": [0, 1, 1, 1]})
    >>> [float(x) for x in method_comparison(sweep.summary(table)).data[0].x]
    [0.5, 1.0]
    """
    needed = [f"{name}{end}" for name in _PANELS for end in ("", "_low", "_high")]
    if missing := [name for name in needed if name not in summary]:
        raise SettingError(
            f"method_comparison: the summary lacks the {plural('column', len(missing))} {', '.join(missing)}. Compute "
            "the summary with elakit.sweep.summary(table). The table needs one row per image, as in "
            "elakit.sweep.table(folder)."
        )
    if summary.empty:
        raise SettingError(
            "method_comparison: the summary has no rows, so there is no method to show. Keep at least one row of "
            "elakit.sweep.summary; if the sweep itself has no images, generate them with `elakit sweep run`."
        )
    found = _ordered(summary)
    plain = [_is_plain(name) for name in found.index]
    labels = [style.escape(style.shorten(method_title(str(name)), 30)) for name in found.index]
    colors = [style.RUN_COLORS[0] if is_plain else style.RUN_COLORS[2] for is_plain in plain]
    p = found["p_holm"].to_numpy(dtype=float) if "p_holm" in found else np.full(len(found), np.nan)
    significant = [is_plain or bool(value < _LEVEL) for is_plain, value in zip(plain, p, strict=True)]
    row, left = 30, 24 + 7 * max(map(len, labels))
    panel = panel or int((style.WIDTH - left - 24 - 28 * (len(_PANELS) - 1)) / len(_PANELS))
    made = style.Panels(
        1, len(_PANELS), width=panel, height=row * len(found), gap=(28, 0), margin=(left, 24, 44, 34),
        title=style.escape(f"{number_of(len(found), 'method')} compared" if title is None else title),
        caption="Whiskers: 95% intervals over prompts. Filled dots: success differs from plain generation (p < 0.05, "
        "McNemar test with Holm's correction).",
    )  # fmt: skip
    for column, (name, heading) in enumerate(_PANELS.items(), start=1):
        made.add(1, column, _dots(found, name, labels, colors, significant))
        made.over(1, column, heading)
        reference = 1.0 if name == "seconds" else _plains(found, plain) if name == "success" else None
        if reference is not None:
            dotted = {"color": style.FAINT, "width": 1, "dash": "dot"}
            ends = {"y0": -0.5, "y1": len(found) - 0.5, "x0": reference, "x1": reference}
            made.shape(1, column, type="line", line=dotted, layer="below", **ends)
        named = {"ticktext": labels, "ticks": "outside", "ticklen": 6, "tickcolor": "rgba(0,0,0,0)"}
        made.axes(
            1,
            column,
            _scale(found, name),
            {
                "range": [len(found) - 0.5, -0.5], "tickvals": list(range(len(found))), "gridcolor": style.RULE,
                "zeroline": False, **(named if column == 1 else {"showticklabels": False}),
            },
        )  # fmt: skip
    return made.figure()


def _is_plain(name: object) -> bool:
    return str(name).split(",")[0] == _PLAIN


def _ordered(summary: pd.DataFrame) -> pd.DataFrame:
    """Summary with sorted rows: plain generation first, then the methods in descending order of success.

    Methods without judged images come last, in the order of the summary.
    """
    keys = [(not _is_plain(name), -value) for name, value in summary["success"].fillna(-1).items()]
    return summary.iloc[sorted(range(len(keys)), key=keys.__getitem__)]


def _plains(found: pd.DataFrame, plain: list[bool]) -> float | None:
    """Success of plain generation, or None if it is unknown, or if several rows are plain generation.

    `plain` states for each row whether the row is plain generation.
    """
    values = found["success"].to_numpy(dtype=float)[plain]
    return float(values[0]) if len(values) == 1 and not np.isnan(values[0]) else None


def _dots(
    found: pd.DataFrame, name: str, labels: list[str], colors: list[str], significant: list[bool]
) -> dict[str, Any]:
    values = found[name].to_numpy(dtype=float)
    filled = [color if full else "#ffffff" for color, full in zip(colors, significant, strict=True)]
    unit = ".2f" if name == "seconds" else ".1%"
    return {
        "type": "scatter",
        "mode": "markers",
        "x": values,
        "y": list(range(len(found))),
        "customdata": labels,
        "error_x": {
            "type": "data", "symmetric": False, "color": style.FAINT, "thickness": 1.5, "width": 4,
            "array": found[f"{name}_high"].to_numpy(dtype=float) - values,
            "arrayminus": values - found[f"{name}_low"].to_numpy(dtype=float),
        },
        "marker": {"size": 11, "color": filled, "line": {"color": colors, "width": 2}},
        "hovertemplate": f"%{{customdata}}: %{{x:{unit}}}<extra></extra>",
        "meta": {"measure": name},
    }  # fmt: skip


def _scale(found: pd.DataFrame, name: str) -> dict[str, Any]:
    """Axis of the panel that shows the column `name` of the summary.

    The axis is linear for shares. The values of "seconds" are durations divided by the duration of plain generation.
    The axis of "seconds" is logarithmic if any value, or the upper end of any interval, is above 6. Otherwise, it is
    linear.
    """
    axis: dict[str, Any] = {"gridcolor": style.RULE, "zerolinecolor": style.RULE}
    top = float(np.nanmax([0.0, *found[f"{name}_high"], *found[name]]))
    if name != "seconds":
        return {**axis, "tickformat": ".0%", "range": [-0.03, min(1.0, top * 1.1) + 0.03], "nticks": 5}
    if top > 6:
        ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if t < 1.5 * top]
        low = float(np.nanmin([1.0, *found[f"{name}_low"], *found[name]]))
        return {**axis, "type": "log", "range": [np.log10(low * 0.8), np.log10(top * 1.2)], "tickvals": ticks}
    return {**axis, "range": [0, max(top, 1.0) * 1.1], "nticks": 5}
