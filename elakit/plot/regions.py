"""The entities' regions from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from elakit.errors import SettingError
from elakit.plot import style
from elakit.plot.images import figure_uri

if TYPE_CHECKING:
    from elakit.generation import Run

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
    """The entities' regions at several steps, and the last of them over the finished image.

    Parameters
    ----------
    run : Run
    source : {"recording", "guidance"}
        Regions localized in the recorded maps, or those that guidance anchored the entities to (guided steps only).
    steps : int or sequence of int
        How many steps, spread evenly with the first and the last; or which.
    maps : bool
        Show the entities' maps in gray below the regions: the largest of them, each relative to its own maximum.
    image : bool
        Add the finished image with the regions of the last step shown over it.
    columns : int
        Panels in a row, at most.
    panel : int, optional
        Width of a panel in pixels; by default what lets a row fit a page.
    title : str, optional
        "" for none.

    Returns
    -------
    plotly.graph_objects.Figure
        A click on an entity in the legend hides its regions.

    Raises
    ------
    SettingError
        Regions of a guidance that did not run; steps that are not there.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> sorted({trace.name for trace in region_evolution(run).data if trace.legendgroup})
    ['cat', 'lion']
    """
    regions = _regions(run, source)
    entities = [str(label) for label in regions.entity.values]
    chosen = style.pick_steps(regions.step.values, steps)
    shown = [*chosen, chosen[-1]] if image else chosen
    across = min(max(1, columns), len(shown))
    down = -(-len(shown) // across)
    rows, cells = regions.sizes["y"], regions.sizes["x"]
    panel = panel or int(min(150, (1010 - 40) / across - 10))
    default = "Regions found in the maps" if source == "recording" else "Regions the entities were anchored to"
    made = style.Panels(
        down, across, width=panel, height=panel * rows / cells, gap=(10, 32), margin=(16, 16, 26, 40),
        title=style.escape(f"{default}, {style.run_name(run)}" if title is None else title),
    )  # fmt: skip
    gray = run.entity_maps() if maps else None
    colors = style.entity_colors(entities)
    for i, step in enumerate(shown):
        row, column = (part + 1 for part in divmod(i, across))
        made.map_axes(row, column, rows, cells)
        over_image = image and i == len(shown) - 1
        if over_image:
            made.image(row, column, figure_uri(run.image), rows, cells)
        elif gray is not None and step in gray.step:
            made.add(row, column, _faint(gray.sel(step=step), rows, cells))
        for label in entities:
            mask = regions.sel(step=step, entity=label).values
            made.add(row, column, _region(mask, label, colors[label], step, over_image))
        made.over(row, column, f"image, step {step}" if over_image else f"step {step}")
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
    """The entities' regions moving from step to step: over their maps, and over the finished image.

    Parameters
    ----------
    run : Run
    source : {"recording", "guidance"}
        As in `region_evolution`.
    steps : int or sequence of int, optional
        How many steps, spread evenly with the first and the last; or which; by default all.
    speed : float
        Steps a second.
    panel : int
        Width of a panel in pixels.
    title : str, optional
        "" for none.

    Returns
    -------
    plotly.graph_objects.Figure
        With a slider, and a button that plays. An image of it shows the first step.

    Raises
    ------
    SettingError
        As `region_evolution`; a speed that is not above 0.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=3, progress=False)
    >>> [frame.name for frame in region_animation(run).frames]
    ['0', '1', '2']
    """
    if not speed > 0:
        raise SettingError(f"speed={speed!r}: give steps a second, above 0.")
    regions = _regions(run, source)
    entities = [str(label) for label in regions.entity.values]
    there = regions.step.values
    chosen = style.pick_steps(there, len(there) if steps is None else steps)
    rows, cells = regions.sizes["y"], regions.sizes["x"]
    what = "Regions found in the maps" if source == "recording" else "Regions the entities were anchored to"
    made = style.Panels(
        1, 2, width=panel, height=panel * rows / cells, gap=(16, 0), margin=(16, 16, 26, 116),
        title=style.escape(f"{what}, {style.run_name(run)}" if title is None else title),
    )  # fmt: skip
    maps, colors = run.entity_maps(), style.entity_colors(entities)
    for column, heading in ((1, "over attention"), (2, "over the finished image")):
        made.map_axes(1, column, rows, cells)
        made.over(1, column, heading)
    made.image(1, 2, figure_uri(run.image), rows, cells)

    def traces(step: int) -> list[tuple[int, dict[str, Any]]]:
        """Panel and trace, in an order that is the same at every step."""
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
    """A button that plays and pauses, and a slider, below the panels."""
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
        "steps": [{"label": str(step), "method": "animate", "args": [[str(step)], stop]} for step in steps],
    }  # fmt: skip
    menu = {
        **place, "type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "pad": {"t": 22, "r": 0},
        "showactive": False, "buttons": buttons, "font": {"size": 12},
    }  # fmt: skip
    return {"sliders": [slider], "updatemenus": [menu]}


def _regions(run: Run, source: Source) -> xr.DataArray:
    if source not in get_args(Source):
        raise SettingError(f"source={source!r}: choose 'recording' or 'guidance'.")
    if source == "recording":
        return run.regions
    if run.guidance is None:
        raise SettingError("source='guidance': this run was drawn plainly; take source='recording', or a guided run.")
    regions = run.guidance.regions
    if regions is None:
        raise SettingError(
            f"source='guidance': {style.run_name(run)} anchored nothing in this run (no guided step, or a single "
            "entity); take source='recording'."
        )
    return regions


def _faint(maps: xr.DataArray, rows: int, cells: int) -> dict[str, Any]:
    """The entities' maps of a step as one gray map, 0 to 1."""
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
        # Maps and regions may differ in size; both fill the panel, whose axes count the regions' cells.
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
        "hovertemplate": f"{style.escape(label)}, step {step}<br>x %{{x}}, y %{{y}}<extra></extra>",
    }
