"""Figure of the attention maps of tokens over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from elakit.errors import SettingError
from elakit.numbering import step_name
from elakit.plot import style
from elakit.tokens import token_title

if TYPE_CHECKING:
    from elakit.attention import Recording
    from elakit.attention.recording import Normalize
    from elakit.run import Run

Scale = Literal["token", "all", "map"]

# If more tokens than this are recorded, only start-of-text, the words of the entities and the end mass are shown by
# default.
MOST_COLUMNS = 14
_SHARED: dict[str, tuple[str, str]] = {
    "token": ("maximum<br>of column", "Each column has its own color scale, from 0 to the number above it."),
    "map": ("maximum<br>of map", "Each map has its own color scale, from 0 to its maximum."),
    "all": ("", "One color scale for all maps."),
}


def token_maps(
    run: Run | Recording,
    *,
    tokens: Any = None,
    steps: int | Sequence[int] = 5,
    layers: str | Sequence[str] | None = None,
    size: int | None = None,
    normalize: Normalize = None,
    scale: Scale = "token",
    colors: str = style.MAP_COLORS,
    panel: int | None = None,
    title: str | None = None,
) -> go.Figure:
    """Attention maps of tokens at several steps: one row per step, one column per token.

    Parameters
    ----------
    run : Run or Recording
        A recorded run, or its recording.
    tokens : optional
        Tokens to show: "entities", "attributes", a word, or a list of words. `Recording.maps` documents further forms.
        Default: all recorded tokens. If more than 14 tokens were recorded, the default is only start-of-text, the words
        of the entities, and the sum of end-of-text and padding.
    steps : int or sequence of int
        An int is the number of steps to show, evenly spaced from the first to the last. If fewer steps are available,
        all are shown. A list names the steps to show, counted from 0.
    layers : str or sequence of str, optional
        Layers whose maps are averaged: "up" (decoder), "down" (encoder), "mid", "all", a pattern of layer names such as
        "up_blocks.1.*", or a list of these. Default: the decoder of a U-Net, or all layers of a transformer.
    size : int, optional
        Number of locations along the longer side of the maps. Default: the map size of `layers` nearest to
        16.
    normalize : {None, "sum", "max", "minmax", "tokens", "start"}
        None: raw probabilities. "sum" or "max": each map is divided by its sum or by its maximum. "minmax": each map is
        scaled to the range from 0 to 1. "tokens": a softmax over the words is taken at each location. "start": each
        map is divided by the map of start-of-text.
    scale : {"token", "all", "map"}
        "token": each column has its own color scale. "all": one color scale for the whole figure. "map": each map has
        its own color scale. The default is "token", because start-of-text has far more attention than the words.
    colors : str
        Name of a plotly color scale.
    panel : int, optional
        Width of a map in pixels. Default: between 46 and 110, depending on the number of tokens.
    title : str, optional
        Title of the figure, or "" for no title. Default: a title that names the prompt.

    Returns
    -------
    plotly.graph_objects.Figure

    Raises
    ------
    SettingError
        An option is invalid, or a step was not recorded.
    RecordingError
        The run was not recorded, or a token, a layer or a size is missing in the recording.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> figure = token_maps(run, tokens=["cat", "lion"])
    >>> len([trace for trace in figure.data if trace.type == "heatmap"])
    4
    """
    if scale not in get_args(Scale):
        raise SettingError(f"scale={scale!r}: choose 'token', 'all' or 'map'.")
    recording = style.recorded(run)
    chosen = style.pick_steps(recording.steps, steps)
    wanted, caption = tokens, _SHARED[scale][1]
    if tokens is None:
        wanted, left_out = _default_tokens(recording, normalize)
        caption += " Words outside the entities are left out." if left_out else ""
    layers = layers or recording.decoder
    size = recording.usual_size(layers) if size is None else size
    maps = recording.maps(wanted, layers, size, steps=chosen, normalize=normalize)
    labels = [str(label) for label in maps.token.values]
    height, width = maps.sizes["y"], maps.sizes["x"]
    panel = panel or int(np.clip((style.WIDTH - 150) / len(labels) - 6, 46, 110))
    what = "probability" if normalize is None else f"attention ({normalize})"
    text = style.shorten(recording.prompt.text, 60)
    made = style.Panels(
        len(chosen), len(labels), width=panel, height=panel * height / width, gap=(6, 6),
        margin=(64, 86, 42 if scale == "token" else 26, 10),
        title=style.escape(f"Token maps of “{text}”" if title is None else title), caption=caption,
    )  # fmt: skip
    for j, label in enumerate(labels, start=1):
        column_top = float(maps.sel(token=label).max())
        for i, step in enumerate(chosen, start=1):
            values = maps.sel(step=step, token=label).values
            top = {"token": column_top, "all": float(maps.max()), "map": float(values.max())}[scale]
            made.add(i, j, _heatmap(values, top, colors, maps, step, label, what))
            made.map_axes(i, j, height, width)
        heading = style.escape(_heading(label, max(4, panel // 7)))
        if scale == "token":
            heading += f"<br><span style='font-size:10px'>{_number(column_top)}</span>"
        made.over(1, j, heading)
    for i, step in enumerate(chosen, start=1):
        made.beside(i, 1, step_name(step))
    made.add(1, 1, _color_bar(colors, scale, float(maps.max())))
    return made.figure()


def _default_tokens(recording: Recording, normalize: Normalize) -> tuple[Any, bool]:
    """Labels of the tokens that are shown by default, and True if some words are left out.

    None instead of the labels means that all recorded tokens are shown.
    """
    if len(recording.tokens) <= MOST_COLUMNS:
        return None, False
    words = {index for e in recording.prompt.entities for index in (*e.attribute_indices, *e.token_indices)}
    labels = [token.label for token in recording.prompt.tokens if token.index in words]
    kept = [label for label in labels if label in recording.tokens]
    ends = [] if normalize == "tokens" else recording.tokens
    return [*[end for end in ends if end == "<start>"], *kept, *[end for end in ends if end == "<end>"]], True


def _heatmap(
    values: np.ndarray, top: float, colors: str, maps: xr.DataArray, step: int, label: str, what: str
) -> dict[str, Any]:
    timestep, name = float(maps.timestep.sel(step=step)), style.escape(token_title(label))
    return {
        "type": "heatmap",
        "z": values,
        "zmin": 0,
        "zmax": top or 1.0,
        "colorscale": colors,
        "showscale": False,
        "name": name,
        "meta": {"step": step, "token": label},
        "hovertemplate": f"{name}, {step_name(step)} (t = {timestep:g})<br>x %{{x}}, y %{{y}}<br>"
        f"{what} %{{z:.4g}}<extra></extra>",
    }


def _color_bar(colors: str, scale: Scale, top: float) -> dict[str, Any]:
    """Empty plotly trace that has the color bar of the figure.

    No map can have the color bar, because the color scales of the maps may differ. If all maps share one color scale,
    the upper end of the bar is labeled with `top`. Otherwise, a text such as "maximum of map" is its label.
    """
    ends = ["0", _number(top) if scale == "all" else _SHARED[scale][0]]
    bar = {
        "thickness": 10, "len": 110, "lenmode": "pixels", "x": 1, "xpad": 14, "y": 1, "yanchor": "top", "ypad": 0,
        "tickvals": [0, 1], "ticktext": ends, "tickfont": {"size": 10}, "outlinewidth": 0,
    }  # fmt: skip
    marker = {"color": [0], "cmin": 0, "cmax": 1, "colorscale": colors, "showscale": True, "colorbar": bar}
    return {"type": "scatter", "x": [None], "y": [None], "mode": "markers", "marker": marker, "hoverinfo": "skip"}


def _number(value: float) -> str:
    """Format a value as text with few digits.

    Values of 10 or more have no decimals. Values from 0.1 to 10 have two decimals. Smaller values have two significant
    digits.

    Examples
    --------
    >>> _number(12.34), _number(1.234), _number(0.01234)
    ('12', '1.23', '0.012')
    """
    if value >= 10:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


# Headings of columns that are too narrow for the full titles, which are in the hover text.
_SHORT_TITLES = {"<start>": "start", "<end>": "end+pad", "<eot>": "end"}


def _heading(label: str, width: int) -> str:
    """Return the column heading of the token with the given label, in at most `width` characters.

    Special tokens, such as start-of-text, have a short heading for narrow columns. Other long headings are cut.
    """
    title = token_title(label)
    return style.shorten(title if len(title) <= width else _SHORT_TITLES.get(label, title), width)
