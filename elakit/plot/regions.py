"""The entities' regions from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from elakit.errors import SettingError
from elakit.plot import style
from elakit.plot.pictures import figure_uri

if TYPE_CHECKING:
    from elakit.generate import Run

Source = Literal["recording", "guidance"]

_GREYS = [[0, "#ffffff"], [1, "#585858"]]


def region_evolution(
    run: Run,
    *,
    source: Source = "recording",
    steps: int | Sequence[int] = 6,
    maps: bool = True,
    picture: bool = True,
    columns: int = 8,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """The entities' regions at several steps, and the last of them over the finished picture.

    Parameters
    ----------
    run : Run
    source : {"recording", "guidance"}
        Regions localised in the recorded maps, or those that guidance anchored the entities to (guided steps only).
    steps : int or sequence of int
        How many steps, spread evenly with the first and the last; or which.
    maps : bool
        Show the entities' maps in grey below the regions: the largest of them, each relative to its own maximum.
    picture : bool
        Add the finished picture with the regions of the last step shown over it.
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
    shown = [*chosen, chosen[-1]] if picture else chosen
    across = min(max(1, columns), len(shown))
    down = -(-len(shown) // across)
    rows, cells = regions.sizes["y"], regions.sizes["x"]
    panel = panel or int(min(150, (1010 - 40) / across - 10))
    default = "Regions found in the maps" if source == "recording" else "Regions the entities were anchored to"
    made = style.Panels(
        down, across, width=panel, height=panel * rows / cells, gap=(10, 32), margin=(16, 16, 26, 40),
        title=style.escape(f"{default}, {style.run_name(run)}" if title is None else title),
    )  # fmt: skip
    grey = run.entity_maps() if maps else None
    colours = style.entity_colours(entities)
    for i, step in enumerate(shown):
        row, column = (part + 1 for part in divmod(i, across))
        made.map_axes(row, column, rows, cells)
        over_picture = picture and i == len(shown) - 1
        if over_picture:
            made.image(row, column, figure_uri(run.image), rows, cells)
        elif grey is not None and step in grey.step:
            made.add(row, column, _faint(grey.sel(step=step), rows, cells))
        for label in entities:
            mask = regions.sel(step=step, entity=label).values
            made.add(row, column, _region(mask, label, colours[label], step, over_picture))
        made.over(row, column, f"picture, step {step}" if over_picture else f"step {step}")
    made.entity_legend(entities)
    return made.figure()


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
    """The entities' maps of a step as one grey map, 0 to 1."""
    top = maps.max(("y", "x"))
    strongest = (maps / top.where(top > 0, 1)).max("token").values
    high, wide = strongest.shape
    return {
        "type": "heatmap",
        "z": strongest,
        "zmin": 0,
        "zmax": 1,
        "colorscale": _GREYS,
        "showscale": False,
        "hoverinfo": "skip",
        "meta": {"below": True},
        # Maps and regions may differ in size; both fill the panel, whose axes count the regions' cells.
        "x0": -0.5 + 0.5 * cells / wide,
        "dx": cells / wide,
        "y0": -0.5 + 0.5 * rows / high,
        "dy": rows / high,
    }


def _region(mask: np.ndarray, label: str, colour: str, step: int, over_picture: bool) -> dict[str, Any]:
    return {
        "type": "heatmap",
        "z": np.where(mask, 1.0, np.nan).astype(np.float32),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, colour], [1, colour]],
        "showscale": False,
        "opacity": 0.55 if over_picture else 0.62,
        "name": style.escape(label),
        "legendgroup": label,
        "hoverongaps": False,
        "meta": {"step": step, "entity": label},
        "hovertemplate": f"{style.escape(label)}, step {step}<br>x %{{x}}, y %{{y}}<extra></extra>",
    }
