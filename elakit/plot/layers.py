"""Figure of bleeding by layer and head, or by layer and step."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go

from elakit.errors import SettingError
from elakit.numbering import plural, step_number
from elakit.plot import style

if TYPE_CHECKING:
    import pandas as pd

Across = Literal["head", "step"]

_PLACES = {"down": "encoder", "mid": "middle", "up": "decoder"}
# Values are printed if a row has at most this many columns.
_PRINTED = 12


def bleeding_by_layer(
    table: pd.DataFrame,
    measure: str = "bleed",
    *,
    across: Across | None = None,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Show a measure of bleeding as a matrix with one row per layer, and one column per head or per step.

    The first layer is at the top. Each entry is the mean of all values in the table for its layer and its head, or for
    its layer and its step.

    Parameters
    ----------
    table : DataFrame
        Table with the columns layer, head, step, measure and value, as `elakit.causes.profile` returns it. The optional
        column "order" is the position of the layer in the network. Without this column, the layers keep the order of
        the table.
    measure : str
        Name of the measure to show, one of the values in the column "measure".
    across : {"head", "step"}, optional
        Columns of the matrix: "head" for one column per head, "step" for one column per step. Default: "head" if the
        table has several heads, else "step".
    panel : int, optional
        Width of the matrix in pixels; by default the figure is at most 860 pixels wide.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that names the measure.

    Returns
    -------
    plotly.graph_objects.Figure
        Matrix, with the mean of each layer in a separate column at the right. An entry without values is NaN, and is
        left blank.

    Raises
    ------
    SettingError
        The table lacks a column or the measure, or `across` is invalid.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"layer": ["down.0", "down.0", "up.0"], "head": [0, 1, 0], "step": 0,
    ...     "measure": "bleed", "value": [0.2, 0.4, 0.9]})
    >>> bleeding_by_layer(table).data[0].z.tolist()
    [[0.2, 0.4], [0.9, nan]]
    """
    part, across = _chosen(table, measure, across)
    layers = list(dict.fromkeys(part["layer"]))
    matrix = part.pivot_table(index="layer", columns=across, values="value", aggfunc="mean", sort=True).loc[layers]
    means = part.groupby("layer")["value"].mean().loc[layers]
    count = matrix.shape[1]
    labels = _labels(layers)
    left = 24 + 6.6 * max(map(len, labels))
    width = panel or int(np.clip(46 * count, 240, min(620, style.WIDTH - 60 - 62 - left)))
    low, high = float(np.nanmin(matrix.values)), float(np.nanmax(matrix.values))
    span = low, high if high > low else low + 1e-9
    # The mean has a separate column that is wide enough for a printed value.
    unit = count / width
    mean_from, mean_to = count - 0.5 + 14 * unit, count - 0.5 + (14 + 46) * unit
    rest = "steps and entities" if across == "head" else "heads and entities"
    heading = f"{measure.capitalize().replace('_', ' ')} by layer and {across}"
    made = style.Panels(
        1, 1, width=width + 60, height=30 * len(layers), margin=(left, 62, 12, 44),
        title=style.escape(heading if title is None else title),
        caption=f"Mean over {rest}; layers in the order of the network.",
    )  # fmt: skip
    titles = [str(step_number(name) if across == "step" else name) for name in matrix.columns]
    names = [style.escape(f"{across} {title}") for title in titles]
    made.add(1, 1, {**_heatmap(matrix.values, names, labels, span), **_bar(span)})
    column = means.to_numpy()[:, None]
    made.add(1, 1, {**_heatmap(column, ["mean"], labels, span), "x": [mean_from, mean_to]})
    shown = list(range(0, count, -(-count // _PRINTED)))
    middle = (mean_from + mean_to) / 2
    bare = {"showgrid": False, "zeroline": False, "ticks": "outside", "ticklen": 4, "tickcolor": "rgba(0,0,0,0)"}
    made.axes(
        1,
        1,
        {
            **bare, "range": [-0.5, mean_to], "tickvals": [*shown, middle], "tickangle": 0,
            "ticktext": [*(style.escape(titles[i]) for i in shown), "mean"],
            "title": {"text": across, "font": {"size": 11}, "standoff": 4},
        },
        {**bare, "range": [len(layers) - 0.5, -0.5], "tickvals": list(range(len(layers))), "ticktext": labels},
    )  # fmt: skip
    if count <= _PRINTED:
        _print(made, matrix.values, list(range(count)), span)
    _print(made, column, [middle], span)
    return made.figure()


def _chosen(table: pd.DataFrame, measure: str, across: Across | None) -> tuple[pd.DataFrame, Across]:
    """Rows of the table for one measure, in the order of the layers, and the dimension of the matrix columns.

    The dimension is "head" or "step". If `across` is None, it is "head" if the table has several heads, else "step".
    """
    needed = ("layer", "head", "step", "measure", "value")
    if missing := [name for name in needed if name not in table]:
        raise SettingError(
            f"bleeding_by_layer: the table lacks the {plural('column', len(missing))} {', '.join(missing)}. Compute "
            "the table with elakit.causes.profile(run), where run is a recorded run."
        )
    there = sorted(table["measure"].unique())
    if measure not in there:
        raise SettingError(f"measure={measure!r} is unknown; choose from {', '.join(there)}.")
    part = table[table["measure"] == measure]
    if across is None:
        across = "head" if part["head"].nunique() > 1 else "step"
    if across not in get_args(Across):
        raise SettingError(f"across={across!r}: choose 'head' or 'step'.")
    if "order" in part:
        part = part.sort_values("order", kind="stable")
    return part, across


def _labels(layers: list[str]) -> list[str]:
    """Short names of layers: "encoder", "middle" or "decoder", followed by numbers from the layer's full name.

    Numbers that are equal in all encoder layers, or in all decoder layers, are left out. If a layer is in none of the
    three places, all layers keep their full names, cut to 40 characters.
    """
    places = [next((words for name, words in _PLACES.items() if layer.startswith(name)), "") for layer in layers]
    if not all(places):
        return [style.escape(style.shorten(layer, 40)) for layer in layers]
    labels: dict[str, str] = {}
    for place in dict.fromkeys(places):
        numbers = {n: re.findall(r"\d+", n) for n, where in zip(layers, places, strict=True) if where == place}
        # Numbers that all layers of the place share are left out.
        shortest = min(map(len, numbers.values()))
        differing = [i for i in range(shortest) if len({parts[i] for parts in numbers.values()}) > 1]
        labels |= {
            name: " ".join([place, ".".join(parts[i] for i in differing)]).strip() for name, parts in numbers.items()
        }
    return [labels[layer] for layer in layers]


def _heatmap(values: np.ndarray, columns: list[str], rows: list[str], span: tuple[float, float]) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": values,
        "zmin": span[0],
        "zmax": span[1],
        "colorscale": style.SHARES,
        "showscale": False,
        "xgap": 1,
        "ygap": 2,
        "hoverongaps": False,
        "customdata": [[f"{row}, {column}" for column in columns] for row in rows],
        "hovertemplate": "%{customdata}: %{z:.3f}<extra></extra>",
    }


def _bar(span: tuple[float, float]) -> dict[str, Any]:
    bar = {
        "thickness": 10, "len": 110, "lenmode": "pixels", "x": 1, "xpad": 14, "y": 1, "yanchor": "top", "ypad": 0,
        "tickvals": list(span), "ticktext": [f"{end:.2f}" for end in span], "tickfont": {"size": 10},
        "outlinewidth": 0,
    }  # fmt: skip
    return {"showscale": True, "colorbar": bar}


def _print(made: style.Panels, values: np.ndarray, columns: list[float], span: tuple[float, float]) -> None:
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            dark = (value - span[0]) / (span[1] - span[0]) > style.DARK_FROM
            ink = "#ffffff" if dark else style.INK
            made.note(1, 1, f"{value:.2f}", columns[j], i, font={"size": 12, "color": ink})
