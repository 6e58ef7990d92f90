"""Figures of the leakage matrix and of bleeding over the steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import xarray as xr

from elakit.errors import SettingError
from elakit.numbering import plural, step_number
from elakit.plot import style
from elakit.plot.maps import at_step, labels_of_one_prompt

if TYPE_CHECKING:
    from elakit.run import Run

_TITLES = {
    "bleed": "bleed (share outside its own region)",
    "intrusion": "intrusion (share in other entities' regions)",
    "spill": "spill (share in the background)",
}


def leakage(
    run: Run | Iterable[Run],
    *others: Run,
    step: int | None = None,
    attributes: bool = False,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Leakage matrix: share of each entity's attention in every region.

    Each row is an entity. The columns are the entities' regions and, last, the background. Each row sums to 1. Without
    bleeding, every entry of the diagonal is 1.

    Parameters
    ----------
    run, *others : Run, or a sequence of Run
        Recorded runs of one prompt, which are shown side by side.
    step : int, optional
        Step to show, counted from 0. Negative numbers count back from the last step. Default: the mean over all steps.
    attributes : bool
        Add a row for each attribute of the prompt, such as "red (of car)".
    panel : int, optional
        Width of a matrix in pixels; by default all matrices together fit into 860 pixels.
    title : str, optional
        Title of the figure, or "" for no title. Default: "Share of each entity's attention by region".

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    RecordingError
        A run was not recorded.
    SettingError
        No run is given, the step was not recorded, or the runs have different entities.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=1, progress=False)
    >>> figure = leakage(run)
    >>> figure.data[0].z.shape, bool(np.allclose(figure.data[0].z.sum(1), 1))
    ((2, 3), True)
    """
    runs = _runs(run, others, "leakage")
    found = [at_step(_matrix(each, attributes), step) for each in runs]
    matrices, when = [matrix for matrix, _ in found], found[0][1]
    regions = labels_of_one_prompt((matrix.region.values for matrix in matrices), "leakage")
    labels = [str(label) for label in matrices[0].row.values]
    most = 16
    rows = [style.escape(style.shorten(label, most + 8)) for label in labels]
    columns = [style.escape(style.shorten(label, most)) for label in regions]
    left = 24 + 7 * max(min(len(label), most + 8) for label in labels)
    space = (style.WIDTH - left - 20 - 36 * (len(runs) - 1)) / len(runs)
    cell = panel / len(regions) if panel else float(np.clip(space / len(regions), 30, 96))
    slanted = max(len(label) for label in regions) * 7 > cell
    bottom = 34 + (7 * min(max(map(len, regions)), most) * 0.75 if slanted else 18)
    heading = "Share of each entity's attention by region" if title is None else title
    made = style.Panels(
        1, len(runs), width=cell * len(regions), height=min(cell, 64) * len(rows), gap=(36, 0),
        margin=(left, 20, 30 if len(runs) > 1 else 12, bottom), title=style.escape(heading),
        caption=f"{when} Framed: the row's own region.",
    )  # fmt: skip
    bare = {"showgrid": False, "zeroline": False, "ticks": "outside", "tickcolor": "rgba(0,0,0,0)"}
    for i, (matrix, name) in enumerate(zip(matrices, style.run_names(runs), strict=True), start=1):
        made.add(1, i, _heatmap(matrix.values, rows, regions, name))
        _print_values(made, matrix.values, i)
        _frame_own(made, matrix, i)
        made.axes(
            1,
            i,
            {
                **bare, "tickvals": list(range(len(regions))), "ticktext": columns, "range": [-0.5, len(regions) - 0.5],
                "tickangle": -40 if slanted else 0, "ticklen": 4,
                "title": {"text": "region", "font": {"size": 11}, "standoff": 6},
            },
            {
                **bare, "tickvals": list(range(len(rows))), "ticktext": rows if i == 1 else [""] * len(rows),
                "range": [len(rows) - 0.5, -0.5], "ticklen": 6,
            },
        )  # fmt: skip
        if len(runs) > 1:
            made.over(1, i, f"<b>{style.escape(name)}</b>")
    return made.figure()


def _matrix(run: Run, attributes: bool) -> xr.DataArray:
    """Leakage matrix of a run, with the dimensions (step, row, region).

    The rows are the entities. If `attributes` is True, one row per attribute follows. The coordinate "owner" of a row
    is the entity itself, or the entity that the attribute describes.
    """
    bleeding = run.bleeding
    entities = bleeding.leakage.rename(entity="row")
    parts = [entities.assign_coords(owner=("row", entities.row.values))]
    if attributes and bleeding.attribute_leakage is not None:
        words = bleeding.attribute_leakage.rename(attribute="row")
        owners = words.owner.values
        named = [f"{word} (of {owner})" for word, owner in zip(words.row.values, owners, strict=True)]
        parts.append(words.assign_coords(row=named))
    return xr.concat(parts, "row") if len(parts) > 1 else parts[0]


def _heatmap(values: np.ndarray, rows: Sequence[str], regions: Sequence[str], name: str) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": values,
        "zmin": 0,
        "zmax": 1,
        "colorscale": style.SHARES,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
        "name": style.escape(name),
        "customdata": [[f"{row} in {style.escape(region)}" for region in regions] for row in rows],
        "hovertemplate": "%{customdata}: %{z:.3f}<extra></extra>",
    }


def _print_values(made: style.Panels, values: np.ndarray, column: int) -> None:
    for (i, j), value in np.ndenumerate(values):
        ink = "#ffffff" if value > style.DARK_FROM else style.INK
        made.note(1, column, f"{value:.2f}", j, i, font={"size": 13, "color": ink})


def _frame_own(made: style.Panels, matrix: xr.DataArray, column: int) -> None:
    """Add a frame around one entry in each row of a leakage matrix: the share in the row's own region.

    The own region of an entity is its region. The own region of an attribute is the region of the entity that the
    attribute describes. The frame has the color of the entity.

    `column` is the column of the panel in the figure, counted from 1.
    """
    regions = [str(label) for label in matrix.region.values]
    colors = style.entity_colors(regions[:-1])
    for i, owner in enumerate(matrix.owner.values):
        j = regions.index(str(owner))
        line = {"color": colors[str(owner)], "width": 3}
        made.shape(1, column, type="rect", x0=j - 0.47, x1=j + 0.47, y0=i - 0.46, y1=i + 0.46, line=line)


def bleeding_over_steps(
    runs: Run | Iterable[Run],
    *others: Run,
    measures: Sequence[str] = ("bleed", "intrusion"),
    width: int | None = None,
    height: int = 240,
    title: str | None = None,
) -> go.Figure:
    """Curves of bleeding over the steps, averaged over entities, with one panel per measure and one curve per run.

    Runs of one method share a color. If a method has several runs, their curves are thin, and a thick curve shows the
    mean of these runs. Shading extends from the first step to the last step that is guided in any run.

    Parameters
    ----------
    runs, *others : Run, or a sequence of Run
        Recorded runs.
    measures : sequence of str
        Names of measures, from the column "measure" of ``run.bleeding.to_frame()``.
    width : int, optional
        Width of a panel in pixels; by default the figure is at most 860 pixels wide.
    height : int
        Height of a panel in pixels.
    title : str, optional
        Title of the figure, or "" for no title. Default: "Bleeding at each step, mean over entities".

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    RecordingError
        A run was not recorded.
    SettingError
        No run or no measure is given, or a measure is unknown.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> [len(trace.y) for trace in bleeding_over_steps(run).data]
    [2, 2]
    """
    every = _runs(runs, others, "bleeding_over_steps")
    curves = [_curves(each, measures) for each in every]
    names = list(dict.fromkeys(style.run_name(each) for each in every))
    colors = {
        name: style.RUN_COLORS[i % len(style.RUN_COLORS)] for i, name in enumerate(sorted(names, key=_plain_first))
    }
    count = max(1, len(measures))
    width = width or int(min(440, (style.WIDTH - 46 - 16 - 34 * (count - 1)) / count))
    made = style.Panels(
        1, len(measures), width=width, height=height, gap=(34, 0), margin=(46, 16, 30, 76),
        title=style.escape("Bleeding at each step, mean over entities" if title is None else title),
    )  # fmt: skip
    for column, measure in enumerate(measures, start=1):
        for name in names:
            group = [(each, c[measure]) for each, c in zip(every, curves, strict=True) if style.run_name(each) == name]
            for each, curve in group:
                alone = len(group) == 1
                label = name if alone else f"{name}, seed {each.seed}"
                _line(made, column, curve, label, colors[name], thick=alone, legend=alone and column == 1, group=name)
            if len(group) > 1:
                mean = pd.concat([curve for _, curve in group], axis=1).mean(axis=1)
                label = f"{name}, mean of {len(group)} runs"
                _line(made, column, mean, label, colors[name], thick=True, legend=column == 1, group=name)
        heading = _TITLES.get(measure, measure)
        made.over(1, column, style.escape(heading if 7 * len(heading) < width else measure))
        _shade_guided(made, every, column)
        shared = {} if column == 1 else {"matches": "y", "showticklabels": False}
        made.axes(
            1,
            column,
            {
                "title": {"text": "step", "font": {"size": 11}, "standoff": 4},
                "gridcolor": style.RULE,
                "zeroline": False,
            },
            {"rangemode": "tozero", "gridcolor": style.RULE, "zerolinecolor": style.RULE, **shared},
        )
    made.legend(names)
    return made.figure()


def _plain_first(name: str) -> tuple[bool, str]:
    return name != "plain", name


def _curves(run: Run, measures: Sequence[str]) -> pd.DataFrame:
    """Mean over entities of each measure, as a table with one row per step and one column per measure."""
    frame = run.bleeding.to_frame()
    there = list(frame["measure"].unique())
    if missing := [measure for measure in measures if measure not in there]:
        raise SettingError(
            f"measures={list(measures)}: unknown {plural('measure', len(missing))} {', '.join(missing)}; choose from "
            f"{', '.join(there)}."
        )
    if not measures:
        raise SettingError(f"measures=[]: choose at least one of {', '.join(there)}.")
    chosen = frame[frame["measure"].isin(measures)]
    return chosen.groupby(["step", "measure"])["value"].mean().unstack("measure")


def _line(
    made: style.Panels, column: int, curve: pd.Series, name: str, color: str, *, thick: bool, legend: bool, group: str
) -> None:
    trace = {
        "type": "scatter",
        "mode": "lines",
        "x": [step_number(step) for step in curve.index],
        "y": curve.to_numpy(),
        "name": style.escape(name),
        "legendgroup": group,
        "showlegend": legend,
        "line": {"color": color, "width": 3 if thick else 1},
        "opacity": 1 if thick else 0.5,
        "hovertemplate": f"{style.escape(name)}, step %{{x}}: %{{y:.3f}}<extra></extra>",
    }
    made.add(1, column, trace)


def _shade_guided(made: style.Panels, runs: Sequence[Run], column: int) -> None:
    steps = [step for run in runs if run.guidance is not None for step in run.guidance.guided]
    if not steps:
        return
    start, stop = step_number(min(steps)) - 0.5, step_number(max(steps)) + 0.5
    _, down = made.panel_axes(1, column)
    made.shape(
        1, column, type="rect", x0=start, x1=stop, y0=0, y1=1, yref=f"{down} domain", layer="below",
        fillcolor="rgba(128, 128, 128, 0.12)", line={"width": 0},
    )  # fmt: skip
    made.note(
        1,
        column,
        "guided",
        start,
        1,
        yref=f"{down} domain",
        xanchor="left",
        yanchor="top",
        font={"size": 10},
        opacity=0.7,
    )


def _runs(first: Run | Iterable[Run], others: Sequence[Run], what: str) -> list[Run]:
    runs = [*([first] if hasattr(first, "bleeding") else first), *others]
    if not runs:
        raise SettingError(
            f"{what}: there is no run to show. Pass at least one run, such as the result of elakit.generate."
        )
    return runs
