"""Figure of the agreement between attention and the finished image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from skimage.measure import approximate_polygon, find_contours

from elakit.bleeding import truth_masks
from elakit.errors import SettingError
from elakit.measures.masks import downscale, otsu_masks
from elakit.numbering import step_name, step_number
from elakit.plot import style
from elakit.plot.image_figures import figure_uri, light_gray
from elakit.plot.maps import tint

if TYPE_CHECKING:
    import pandas as pd

    from elakit.judge import Verdict
    from elakit.run import Run

_MEASURES = {
    "truth_iou": "IoU (Otsu mask, outline)",
    "truth_auc": "AUC (0.5 is chance)",
    "pointing": "pointing (peak inside)",
}
# Outlines are traced on at most this many pixels per side, which is finer than a panel.
_TRACED = 128
_HEADING, _CURVE_GAP = 50, 24  # pixels above and between the plots of curves


def agreement(
    run: Run,
    truth: Verdict | xr.DataArray | None = None,
    *,
    steps: int | Sequence[int] = 4,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Compare the attention map of each entity, at several steps, with the entity's mask in the finished image.

    Each row shows one entity. The first panel of a row is the image with the outline of the entity's mask. Every
    further panel shows the entity's map at one step, over the image in gray, with the same outline. A dotted line
    encloses the locations above Otsu's threshold, and a dot marks the maximum of the map.

    Curves below the rows show three measures at every step. IoU is the intersection over union of the mask and the
    locations above Otsu's threshold. AUC is the area under the ROC curve of the map as a predictor of the mask.
    Pointing is 1 if the maximum lies in the mask, else 0.

    Parameters
    ----------
    run : Run
        A recorded run.
    truth : Verdict or DataArray, bool (entity, y, x), optional
        Mask of each entity in the finished image, at any resolution. Default: the masks that the judge found
        (``run.verdict``).
    steps : int or sequence of int
        An int is the number of steps to show, evenly spaced from the first to the last. If fewer steps are available,
        all are shown. A list names the steps to show, counted from 0.
    panel : int, optional
        Width of a panel in pixels; by default a row is at most 860 pixels wide.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that names the figure and the method.

    Returns
    -------
    plotly.graph_objects.Figure
        The figure contains one heatmap per entity and step, named after the entity.

    Raises
    ------
    RecordingError
        The run was not recorded.
    SettingError
        The masks of the judge are needed, but the judge cannot judge the image; `truth` has other entities or another
        aspect ratio than the run; or a step was not recorded.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> [trace.name for trace in agreement(run).data if trace.type == "heatmap"]
    ['cat', 'cat', 'lion', 'lion']
    """
    known = run.verdict if truth is None else truth
    if known is None:
        raise SettingError(
            "The built-in judge cannot judge the image of this run. It needs a built-in model and a prompt with known "
            "nouns and colors only. Black images and images replaced by the safety checker are not judged. Pass "
            "truth=...: a Verdict, or the masks of the entities as a boolean DataArray (entity, y, x)."
        )
    maps = run.entity_maps()
    frame = run.measure(known).to_frame()
    entities = [str(label) for label in maps.token.values]
    chosen = style.pick_steps(maps.step.values, steps)
    rows, columns = maps.sizes["y"], maps.sizes["x"]
    seen = truth_masks(known, entities, (rows, columns))

    across = max(1 + len(chosen), len(_MEASURES))
    panel = panel or int(min(180, (style.WIDTH - 110) / across - 10))
    height = panel * run.image.height / run.image.width
    default = f"Agreement of attention with the image, {style.run_name(run)}"
    made = style.Panels(
        len(entities) + 1, across, width=panel, height=height, gap=(10, 28), margin=(94, 16, 26, 44),
        title=style.escape(default if title is None else title),
        caption="Black line: the entity's mask in the image. Color: its attention, from 0 to the maximum (dot); dotted "
        "line: Otsu's threshold.",
    )  # fmt: skip
    colors = style.entity_colors(entities)
    image, pale = figure_uri(run.image), figure_uri(light_gray(run.image))
    for i, (label, mask) in enumerate(zip(entities, seen, strict=True), start=1):
        outline = _outline(mask, rows, columns)
        name = style.escape(style.shorten(label, 12))
        made.beside(i, 1, f"<span style='color:{colors[label]}'>■</span> {name}")
        made.map_axes(i, 1, rows, columns)
        made.image(i, 1, image, rows, columns)
        _draw_outline(made, i, 1, outline, label)
        _below(made, i, 1, _share(mask), rows, columns)
        for j, step in enumerate(chosen, start=2):
            values = maps.sel(step=step, token=label).values
            made.map_axes(i, j, rows, columns)
            made.image(i, j, pale, rows, columns)
            # scaled to its own maximum, because agreement does not depend on strength
            about, meta = f"{label}, {step_name(step)}", {"step": step, "entity": label}
            made.add(i, j, tint(values, float(values.max()), colors[label], label, about, meta=meta))
            _draw_otsu(made, i, j, values, colors[label])
            _draw_outline(made, i, j, outline, label)
            _draw_peak(made, i, j, values, colors[label])
            _below(made, i, j, _numbers(frame, step, label, panel), rows, columns)
    for j, heading in enumerate(["image", *map(step_name, chosen)], start=1):
        made.over(1, j, heading)
    _draw_curves(made, len(entities) + 1, frame, colors, chosen, height)
    return made.figure()


def _share(mask: np.ndarray) -> str:
    if not mask.any():
        return "not in the image"
    return f"{mask.mean():.0%} of the image" if mask.mean() >= 0.005 else "under 1% of the image"


def _numbers(frame: pd.DataFrame, step: int, label: str, panel: int) -> str:
    """Text with the IoU of a map and, if the panel is wide enough, the AUC.

    The text is empty for an entity that is not in the image.
    """
    part = frame[(frame["step"] == step) & (frame["entity"] == label)].set_index("measure")["value"]
    numbers = [("IoU", part["truth_iou"]), ("AUC", part["truth_auc"])][: 2 if panel >= 110 else 1]
    return ", ".join(f"{name} {value:.2f}" for name, value in numbers if not np.isnan(value))


def _below(made: style.Panels, row: int, column: int, text: str, rows: int, columns: int) -> None:
    """Add centered text below a panel. The panel shows a map of `rows` x `columns` locations.

    `row` and `column` give the place of the panel in the figure, counted from 1.
    """
    options: dict[str, Any] = {"yanchor": "top", "yshift": -1, "font": {"size": 11}, "opacity": 0.75}
    if text:
        made.note(row, column, text, (columns - 1) / 2, rows - 0.5, **options)


def _outline(mask: np.ndarray, rows: int, columns: int) -> tuple[list[float | None], list[float | None]]:
    """Outline of a mask as closed lines, in the coordinates of a map of `rows` x `columns` locations.

    The result is a list of x and a list of y. In both lists, the value None separates two lines.
    """
    high, wide = mask.shape
    if max(high, wide) > _TRACED:
        factor = _TRACED / max(high, wide)
        mask = downscale(mask, (max(1, round(high * factor)), max(1, round(wide * factor))))
        high, wide = mask.shape
    x: list[float | None] = []
    y: list[float | None] = []
    # Padded with empty pixels, so that lines close at the edge of the image too, and then clipped to the image.
    for line in find_contours(np.pad(mask.astype(float), 1), 0.5):
        points = approximate_polygon(line, 0.3) - 0.5
        down, right = (np.clip(points[:, axis], 0, side) for axis, side in ((0, high), (1, wide)))
        x += [*(right * columns / wide - 0.5).round(3).tolist(), None]
        y += [*(down * rows / high - 0.5).round(3).tolist(), None]
    return x[:-1], y[:-1]


def _draw_outline(
    made: style.Panels, row: int, column: int, outline: tuple[list[float | None], list[float | None]], label: str
) -> None:
    # A white line behind the black one makes it visible on every image.
    for color, width in (("#ffffff", 4.5), ("#000000", 1.8)):
        made.add(
            row,
            column,
            {
                "type": "scatter", "mode": "lines", "x": outline[0] or [None], "y": outline[1] or [None],
                "line": {"color": color, "width": width}, "hoverinfo": "skip", "showlegend": False,
                "name": style.escape(label), "meta": {"outline": label},
            },
        )  # fmt: skip


def _draw_otsu(made: style.Panels, row: int, column: int, values: np.ndarray, color: str) -> None:
    """Add a dotted line around the locations of a map whose values are above Otsu's threshold."""
    x: list[float | None] = []
    y: list[float | None] = []
    mask = np.pad(otsu_masks(values), 1)
    for i, j in np.argwhere(mask[1:] != mask[:-1]).tolist():  # between a location and the one below it
        x += [j - 1.5, j - 0.5, None]
        y += [i - 0.5, i - 0.5, None]
    for i, j in np.argwhere(mask[:, 1:] != mask[:, :-1]).tolist():  # between a location and the one to its right
        x += [j - 0.5, j - 0.5, None]
        y += [i - 1.5, i - 0.5, None]
    trace = {
        "type": "scatter", "mode": "lines", "x": x or [None], "y": y or [None], "hoverinfo": "skip",
        "line": {"color": color, "width": 1.5, "dash": "dot"}, "showlegend": False, "meta": {"otsu": True},
    }  # fmt: skip
    made.add(row, column, trace)


def _draw_peak(made: style.Panels, row: int, column: int, values: np.ndarray, color: str) -> None:
    """Add a dot on each location that has the maximum of the map. A constant map gets no dot."""
    peaks = np.argwhere(values == values.max()) if np.ptp(values) > 0 else np.empty((0, 2))
    marker = {"size": 9, "color": color, "line": {"color": "#ffffff", "width": 2}}
    trace = {
        "type": "scatter", "mode": "markers", "x": peaks[:, 1].tolist(), "y": peaks[:, 0].tolist(), "marker": marker,
        "hoverinfo": "skip", "showlegend": False, "meta": {"peak": True},
    }  # fmt: skip
    made.add(row, column, trace)


def _draw_curves(
    made: style.Panels, row: int, frame: pd.DataFrame, colors: dict[str, str], chosen: Sequence[int], height: float
) -> None:
    """Plot the curves of each measure over the steps, one panel per measure, side by side in the row `row`.

    A panel has one curve per entity. Dotted vertical lines mark the steps in `chosen`, whose maps the figure shows.
    """
    inner, whole = made.inner
    width = (inner - (len(_MEASURES) - 1) * _CURVE_GAP) / len(_MEASURES)
    up = [0, max(0.4 * height, height - _HEADING) / whole]
    for column, (measure, heading) in enumerate(_MEASURES.items(), start=1):
        left = (column - 1) * (width + _CURVE_GAP)
        part = frame[frame["measure"] == measure]
        for below, (label, color) in enumerate(reversed(colors.items())):
            curve = part[part["entity"] == label]
            name = style.escape(label)
            # Lines drawn later are thinner, so that coinciding lines are all visible.
            thick = 2.2 + 1.8 * min(len(colors) - 1 - below, 3)
            trace = {
                "type": "scatter", "mode": "lines+markers", "x": [step_number(step) for step in curve["step"]],
                "y": curve["value"].to_numpy(), "name": name, "showlegend": False,
                "line": {"color": color, "width": thick}, "marker": {"size": thick + 2.5, "color": color},
                "meta": {"measure": measure, "entity": label},
                "hovertemplate": f"{name}, step %{{x}}: %{{y:.3f}}<extra></extra>",
            }  # fmt: skip
            made.add(row, column, trace)
        made.over(row, column, heading)
        dotted = {"color": style.FAINT, "width": 1, "dash": "dot"}
        for at in map(step_number, chosen):
            made.shape(row, column, type="line", x0=at, x1=at, y0=0, y1=1, line=dotted, layer="below")
        first, last = step_number(part["step"].min()), step_number(part["step"].max())
        made.axes(
            row,
            column,
            {
                "domain": [left / inner, min(1.0, (left + width) / inner)], "zeroline": False, "showgrid": False,
                "range": [first - 0.5, last + 0.5],
                "title": {"text": "step", "font": {"size": 11}, "standoff": 4},
            },
            {
                "domain": up, "range": [-0.04, 1.04], "gridcolor": style.RULE, "zerolinecolor": style.RULE,
                "showticklabels": column == 1, "tickvals": [0, 0.5, 1],
            },
        )  # fmt: skip
