"""Figures of the entities' regions over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from elakit.errors import SettingError
from elakit.numbering import step_name, step_number
from elakit.plot import style
from elakit.plot.image_figures import figure_uri

if TYPE_CHECKING:
    from elakit.run import Run

Source = Literal["recording", "guidance"]

_GRAYS = [[0, "#ffffff"], [1, "#585858"]]


def region_evolution(
    run: Run,
    *,
    source: Source = "recording",
    steps: int | Sequence[int] = 6,
    maps: bool = True,
    image: bool = True,
    columns: int = 8,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Regions of the entities, with one panel per step, and a last panel with the finished image.

    The last panel shows the regions of the last selected step over the finished image.

    Parameters
    ----------
    run : Run
        A recorded run.
    source : {"recording", "guidance"}
        Source of the regions. "recording": regions localized in the recorded maps, at the recorded steps. "guidance":
        the regions that the guidance method used, at the steps in its trace.
    steps : int or sequence of int
        An int is the number of steps to show, evenly spaced from the first to the last. If fewer steps are available,
        all are shown. A list names the steps to show, counted from 0.
    maps : bool
        Show the entities' attention maps in gray behind the regions, except in the panel with the finished image. Each
        map is divided by its maximum. Where maps overlap, the largest value is shown.
    image : bool
        Add the panel with the finished image.
    columns : int
        Maximum number of panels per row.
    panel : int, optional
        Width of a panel in pixels; by default a row is at most 860 pixels wide.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that names the source of the regions and the method.

    Returns
    -------
    plotly.graph_objects.Figure
        A click on an entity in the legend hides the regions of this entity.

    Raises
    ------
    RecordingError
        The run was not recorded.
    SettingError
        An option is invalid, a step was not recorded, or the requested regions of guidance do not exist.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> sorted({trace.name for trace in region_evolution(run).data if trace.legendgroup})
    ['cat', 'lion']
    """
    regions = chosen_regions(run, source)
    entities = [str(label) for label in regions.entity.values]
    chosen = style.pick_steps(regions.step.values, steps)
    drawn = [*chosen, chosen[-1]] if image else chosen
    across = min(max(1, columns), len(drawn))
    down = -(-len(drawn) // across)
    rows, cells = regions.sizes["y"], regions.sizes["x"]
    panel = panel or int(min(150, (style.WIDTH - 40) / across - 10))
    default = "Regions localized in the maps" if source == "recording" else "Regions used by guidance"
    made = style.Panels(
        down, across, width=panel, height=panel * rows / cells, gap=(10, 32), margin=(16, 16, 26, 40),
        title=style.escape(f"{default}, {style.run_name(run)}" if title is None else title),
    )  # fmt: skip
    gray = run.entity_maps() if maps else None
    colors = style.entity_colors(entities)
    for i, step in enumerate(drawn):
        row, column = (part + 1 for part in divmod(i, across))
        made.map_axes(row, column, rows, cells)
        over_image = image and i == len(drawn) - 1
        if over_image:
            made.image(row, column, figure_uri(run.image), rows, cells)
        elif gray is not None and step in gray.step:
            made.add(row, column, _faint(gray.sel(step=step), rows, cells))
        for label in entities:
            mask = regions.sel(step=step, entity=label).values
            made.add(row, column, _region(mask, label, colors[label], step, over_image))
        made.over(row, column, f"image, {step_name(step)}" if over_image else step_name(step))
    made.entity_legend(entities)
    return made.figure()


def region_animation(
    run: Run,
    *,
    source: Source = "recording",
    steps: int | Sequence[int] | None = None,
    speed: float = 4,
    panel: int = 300,
    title: str | None = None,
) -> go.Figure:
    """Animation of the entities' regions over the steps, in two panels.

    The left panel shows the regions over the attention maps in gray. The right panel shows the regions over the
    finished image.

    Parameters
    ----------
    run : Run
        A recorded run.
    source : {"recording", "guidance"}
        Source of the regions. "recording": regions localized in the recorded maps. "guidance": the regions that the
        guidance method used.
    steps : int or sequence of int, optional
        An int is the number of steps to show, evenly spaced from the first to the last. If fewer steps are available,
        all are shown. A list names the steps to show, counted from 0. Default: all steps.
    speed : float
        Number of steps shown per second.
    panel : int
        Width of a panel in pixels.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that names the source of the regions and the method.

    Returns
    -------
    plotly.graph_objects.Figure
        Figure with a slider, a play button, and one frame per step. The name of a frame is the number of its step,
        counted from 0. A static export of the figure shows only the first step; `save_animation` writes an animation
        to a file.

    Raises
    ------
    RecordingError
        The run was not recorded.
    SettingError
        An option is invalid, a step was not recorded, or the requested regions of guidance do not exist.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=3, progress=False)
    >>> [frame.name for frame in region_animation(run).frames]
    ['0', '1', '2']
    """
    if not speed > 0:
        raise SettingError(f"speed={speed!r}: give a positive number of steps per second.")
    regions = chosen_regions(run, source)
    entities = [str(label) for label in regions.entity.values]
    maps = run.entity_maps()
    chosen = animated_steps(regions, maps, steps)
    rows, cells = regions.sizes["y"], regions.sizes["x"]
    what = "Regions localized in the maps" if source == "recording" else "Regions used by guidance"
    made = style.Panels(
        1, 2, width=panel, height=panel * rows / cells, gap=(16, 0), margin=(16, 16, 26, 116),
        title=style.escape(f"{what}, {style.run_name(run)}" if title is None else title),
    )  # fmt: skip
    colors = style.entity_colors(entities)
    for column, heading in ((1, "over attention"), (2, "over the finished image")):
        made.map_axes(1, column, rows, cells)
        made.over(1, column, heading)
    made.image(1, 2, figure_uri(run.image), rows, cells)

    def traces(step: int) -> list[tuple[int, dict[str, Any]]]:
        """Plotly traces of one step, in the same order at every step.

        Each item is a pair: the column of the panel, counted from 1, and the trace.
        """
        below = _faint(maps.sel(step=step), rows, cells)
        masks = {label: regions.sel(step=step, entity=label).values for label in entities}
        over = [
            (column, _region(masks[label], label, colors[label], step, column == 2))
            for column in (1, 2)
            for label in entities
        ]
        return [(1, below), *over]

    for column, trace in traces(chosen[0]):
        made.add(1, column, trace)
    made.entity_legend(entities)
    moving = list(range(1 + 2 * len(entities)))
    frames = [{"name": str(s), "data": [trace for _, trace in traces(s)], "traces": moving} for s in chosen]
    made.layout |= _transport(chosen, speed)
    figure = made.figure()
    figure.frames = frames
    return figure


def _transport(steps: Sequence[int], speed: float) -> dict[str, Any]:
    """Buttons for play and pause, and a slider, below the panels."""
    pace = {"duration": 1000 / speed, "redraw": True}
    play = {"frame": pace, "transition": {"duration": 0}, "fromcurrent": True, "mode": "immediate"}
    stop = {"frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}, "mode": "immediate"}
    buttons = [
        {"label": "▶ play", "method": "animate", "args": [None, play]},
        {"label": "❚❚ pause", "method": "animate", "args": [[None], stop]},
    ]
    place = {"y": 0, "yanchor": "top"}
    slider = {
        **place, "x": 0.36, "len": 0.64, "pad": {"t": 6, "b": 0, "l": 0, "r": 0}, "active": 0, "ticklen": 3,
        "minorticklen": 0,
        "font": {"size": 10}, "currentvalue": {"prefix": "step ", "font": {"size": 12}, "xanchor": "left", "offset": 8},
        "steps": [
            {"label": str(step_number(step)), "method": "animate", "args": [[str(step)], stop]} for step in steps
        ],
    }  # fmt: skip
    menu = {
        **place, "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "pad": {"t": 22, "r": 0},
        "showactive": False, "buttons": buttons, "font": {"size": 12},
    }  # fmt: skip
    return {"sliders": [slider], "updatemenus": [menu]}


def animated_steps(regions: xr.DataArray, maps: xr.DataArray, steps: int | Sequence[int] | None) -> list[int]:
    """Select the steps of an animation from the steps that have both regions and recorded maps.

    `steps` is the number of steps to select, a list of steps counted from 0, or None for all steps.

    Raises
    ------
    SettingError
        No step has both regions and recorded maps, or a requested step does not have both.
    """
    there = [int(step) for step in regions.step.values if step in maps.step.values]
    if not there:
        raise SettingError(
            "source='guidance': no guided step was recorded. Record every step with record=True, or give "
            "source='recording'."
        )
    return style.pick_steps(there, len(there) if steps is None else steps)


def chosen_regions(run: Run, source: Source) -> xr.DataArray:
    """Regions of a run, boolean (step, entity, y, x).

    Parameters
    ----------
    run : Run
    source : {"recording", "guidance"}
        Source of the regions. "recording": regions localized in the recorded maps. "guidance": the regions that the
        guidance method used.

    Raises
    ------
    RecordingError
        The run was not recorded.
    SettingError
        `source` is unknown, or the requested regions of guidance do not exist.
    """
    if source not in get_args(Source):
        raise SettingError(f"source={source!r}: choose 'recording' or 'guidance'.")
    if source == "recording":
        return run.regions
    if run.guidance is None:
        raise SettingError("source='guidance': this run has no guidance; give source='recording', or a guided run.")
    regions = run.guidance.regions
    if regions is None:
        raise SettingError(
            f"source='guidance': {style.run_name(run)} used no regions in this run (no guided step, or a single "
            "entity); give source='recording'."
        )
    return regions


def _faint(maps: xr.DataArray, rows: int, cells: int) -> dict[str, Any]:
    """Gray plotly heatmap that merges the attention maps of all entities at one step.

    Each map is first divided by its maximum. Each location of the heatmap then has the largest value of all maps at
    this location. The heatmap is stretched over a panel whose axes count `rows` locations along y and `cells` along x.
    """
    top = maps.max(("y", "x"))
    strongest = (maps / top.where(top > 0, 1)).max("token").values
    high, wide = strongest.shape
    return {
        "type": "heatmap",
        "z": strongest,
        "zmin": 0,
        "zmax": 1,
        "colorscale": _GRAYS,
        "showscale": False,
        "hoverinfo": "skip",
        "meta": {"below": True},
        # Maps and regions may differ in size; both fill the panel, whose axes count the locations of the regions.
        "x0": -0.5 + 0.5 * cells / wide,
        "dx": cells / wide,
        "y0": -0.5 + 0.5 * rows / high,
        "dy": rows / high,
    }


def _region(mask: np.ndarray, label: str, color: str, step: int, over_image: bool) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": np.where(mask, 1.0, np.nan).astype(np.float32),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, color], [1, color]],
        "showscale": False,
        "opacity": 0.55 if over_image else 0.62,
        "name": style.escape(label),
        "legendgroup": label,
        "hoverongaps": False,
        "meta": {"step": step, "entity": label},
        "hovertemplate": f"{style.escape(label)}, {step_name(step)}<br>x %{{x}}, y %{{y}}<extra></extra>",
    }
