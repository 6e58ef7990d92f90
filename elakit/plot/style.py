"""What the figures share: colours, text, panels of exact size, the choice of steps."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from elakit.errors import RecordingError, SettingError

if TYPE_CHECKING:
    from elakit.attention import Recording
    from elakit.generate import Run

# Okabe and Ito's colours, told apart with every common kind of colour blindness; the pair that differs most comes first.
# Okabe & Ito, "Color Universal Design", 2008.
ENTITY_COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# Of runs, where lines are compared: plain is grey, the methods follow.
RUN_COLOURS = ("#767676", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
MAP_COLOURS = "Viridis"
INK, FAINT, RULE = "#1f2328", "#6e7781", "rgba(128, 128, 128, 0.28)"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', sans-serif"
ANALYSIS_SIZE = 16

_METHOD_NAMES = {"ela": "ELA"}


def escape(text: object) -> str:
    """Text as plotly shows it literally: plotly reads titles, labels and hover texts as HTML, templates and TeX.

    Examples
    --------
    >>> escape("<start> 5$ %{x}")
    '&lt;start&gt; 5&#36; &#37;{x}'
    """
    return escape_html(str(text), quote=False).replace("$", "&#36;").replace("%", "&#37;")


def shorten(text: str, most: int) -> str:
    """Text of at most so many characters, with an ellipsis where some are left out.

    Examples
    --------
    >>> shorten("hippopotamus", 8), shorten("cat", 8)
    ('hippopo…', 'cat')
    """
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def entity_colours(entities: Sequence[str]) -> dict[str, str]:
    """Colour of each entity, by its place in the prompt, so that it is the same in every figure.

    Examples
    --------
    >>> entity_colours(["cat", "frog"])
    {'cat': '#E69F00', 'frog': '#0072B2'}
    """
    return {label: ENTITY_COLOURS[i % len(ENTITY_COLOURS)] for i, label in enumerate(entities)}


def run_name(run: Run) -> str:
    """What a run is called in figures: "plain", or the name of its method."""
    return method_name(run.label)


def method_name(label: str) -> str:
    """A method's name as people write it.

    Examples
    --------
    >>> method_name("ela"), method_name("plain")
    ('ELA', 'plain')
    """
    return _METHOD_NAMES.get(label, label)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Names that tell runs apart: the method's, with the seed where one method occurs twice."""
    names = [run_name(run) for run in runs]
    return [name if names.count(name) == 1 else f"{name}, seed {run.seed}" for name, run in zip(names, runs, strict=True)]


def recorded(run: Run | Recording) -> Recording:
    """The recording of a run, or a recording as it is.

    Raises
    ------
    RecordingError
        The run was not recorded.
    """
    if not hasattr(run, "recording"):
        return run
    if run.recording is None:
        raise RecordingError("This run was not recorded; generate it with record=True to see its attention.")
    return run.recording


def map_size(recording: Recording) -> int:
    """The recorded map size (larger side) nearest to 16, the one regions and measures are taken at."""
    sides = {max(size) for size in recording.sizes}
    return min(sides, key=lambda side: (abs(np.log(side / ANALYSIS_SIZE)), side))


def pick_steps(there: Sequence[int], wanted: int | Sequence[int]) -> list[int]:
    """Steps to show: so many, spread evenly with the first and the last; or the ones named.

    Parameters
    ----------
    there : sequence of int
        Steps that there are, in order.
    wanted : int or sequence of int
        How many, or which; negative ones count back from the last.

    Raises
    ------
    SettingError
        None is asked for, or one that is not there.

    Examples
    --------
    >>> pick_steps(range(20), 5), pick_steps(range(20), 1), pick_steps(range(20), [0, -1])
    ([0, 5, 10, 14, 19], [19], [0, 19])
    """
    steps = [int(step) for step in there]
    if isinstance(wanted, bool) or (isinstance(wanted, int) and wanted < 1) or not steps:
        raise SettingError(f"steps={wanted!r}: give how many steps to show, 1 or more, or a list of steps.")
    if isinstance(wanted, int):
        if wanted == 1:
            return steps[-1:]
        places = np.floor(np.linspace(0, len(steps) - 1, min(wanted, len(steps))) + 0.5).astype(int)
        return [steps[place] for place in places]
    named = [int(step) if step >= 0 else steps[-1] + 1 + int(step) for step in wanted]
    if missing := [step for step in named if step not in steps]:
        raise SettingError(f"steps={list(wanted)}: no step {missing} here; there are {_span(steps)}.")
    if not named:
        raise SettingError("steps=[]: give how many steps to show, 1 or more, or a list of steps.")
    return named


def _span(steps: Sequence[int]) -> str:
    whole = list(steps) == list(range(steps[0], steps[-1] + 1))
    return f"{steps[0]} to {steps[-1]}" if whole else ", ".join(map(str, steps))


def panels(
    rows: int,
    columns: int,
    *,
    width: float,
    height: float,
    gap: tuple[float, float] = (8, 8),
    margin: tuple[float, float, float, float] = (56, 24, 20, 16),
    title: str = "",
    caption: str = "",
    **subplots: Any,
) -> go.Figure:
    """A figure of equal panels whose sizes are pixels.

    Parameters
    ----------
    rows, columns : int
    width, height : float
        Of a panel.
    gap : (float, float)
        Between columns and between rows.
    margin : (float, float, float, float)
        Left, right, top and bottom, without title and caption, for which room is made when they are given.
    title, caption : str
        Escaped already.
    **subplots
        As `plotly.subplots.make_subplots` takes them.
    """
    left, right, top, bottom = margin
    inner_width = columns * width + (columns - 1) * gap[0]
    inner_height = rows * height + (rows - 1) * gap[1]
    figure = make_subplots(
        rows, columns, horizontal_spacing=gap[0] / inner_width, vertical_spacing=gap[1] / inner_height, **subplots
    )
    # A title wider than the panels would be cut off at the figure's edge; bold letters are about 9 pixels wide.
    right = max(right, 16 + 9 * len(title) - left - inner_width) if title else right
    top += 40 if title else 0
    bottom += 30 if caption else 0
    figure.update_layout(
        template="plotly_white",
        width=round(inner_width + left + right),
        height=round(inner_height + top + bottom),
        margin={"l": left, "r": right, "t": top, "b": bottom, "pad": 0},
        font={"family": FONT, "size": 12, "color": INK},
        hoverlabel={"font": {"family": FONT, "size": 12}},
        showlegend=False,
    )
    if title:
        figure.update_layout(
            title={
                "text": f"<b>{title}</b>", "font": {"size": 16}, "x": 0, "xref": "container", "xanchor": "left",
                "pad": {"l": 16, "t": 14}, "y": 1, "yref": "container", "yanchor": "top",
            }
        )  # fmt: skip
    if caption:
        figure.add_annotation(
            text=caption, showarrow=False, font={"size": 11}, opacity=0.75, align="left",
            x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-(bottom - 24),
        )  # fmt: skip
    return figure


def map_axes(figure: go.Figure, row: int, column: int, rows: float, columns: float) -> None:
    """Axes of a panel that shows a map of so many cells: y downwards, no ticks, cells square."""
    bare: dict[str, Any] = {
        "showgrid": False, "zeroline": False, "showticklabels": False, "ticks": "", "constrain": "domain",
    }  # fmt: skip
    figure.update_xaxes(**bare, range=[-0.5, columns - 0.5], row=row, col=column)
    across = figure.get_subplot(row, column).xaxis.plotly_name.replace("xaxis", "x")
    figure.update_yaxes(**bare, range=[rows - 0.5, -0.5], scaleanchor=across, row=row, col=column)


def over(figure: go.Figure, row: int, column: int, text: str, *, size: int = 12, shift: float = 4) -> None:
    """Write above a panel, in its middle."""
    x, y = _domains(figure, row, column)
    figure.add_annotation(
        text=text, showarrow=False, font={"size": size}, x=0.5, xref=x, y=1, yref=y, yanchor="bottom", yshift=shift
    )


def beside(figure: go.Figure, row: int, column: int, text: str, *, size: int = 12) -> None:
    """Write to the left of a panel, at half its height."""
    x, y = _domains(figure, row, column)
    figure.add_annotation(
        text=text, showarrow=False, font={"size": size}, x=0, xref=x, xanchor="right", xshift=-8, y=0.5, yref=y,
        align="right",
    )  # fmt: skip


def under(figure: go.Figure, row: int, column: int, text: str, *, size: int = 11, shift: float = 4) -> None:
    """Write below a panel, in its middle."""
    x, y = _domains(figure, row, column)
    figure.add_annotation(
        text=text, showarrow=False, font={"size": size}, x=0.5, xref=x, y=0, yref=y, yanchor="top", yshift=-shift
    )


def _domains(figure: go.Figure, row: int, column: int) -> tuple[str, str]:
    subplot = figure.get_subplot(row, column)
    return (
        subplot.xaxis.plotly_name.replace("xaxis", "x") + " domain",
        subplot.yaxis.plotly_name.replace("yaxis", "y") + " domain",
    )


def entity_legend(figure: go.Figure, entities: Sequence[str]) -> None:
    """A legend that names the entities' colours; a click on one hides what is of its legend group."""
    for label, colour in entity_colours(entities).items():
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=escape(shorten(label, 28)), legendgroup=label,
            marker={"symbol": "square", "size": 12, "color": colour}, showlegend=True, row=1, col=1,
        )  # fmt: skip


def rgba(colour: str, alpha: float) -> str:
    """A hex colour with an opacity.

    Examples
    --------
    >>> rgba("#E69F00", 0.5)
    'rgba(230, 159, 0, 0.5)'
    """
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha:g})"
