"""Parts that all figures share: colors, text, panels of exact size, and the choice of steps."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape as escape_html
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from elakit.checks import is_whole
from elakit.errors import RecordingError, SettingError
from elakit.guidance import method_title
from elakit.numbering import an_index, number_of

if TYPE_CHECKING:
    from elakit.attention import Recording
    from elakit.run import Run

# Distinguishable with every common kind of color blindness (Okabe & Ito, "Color Universal Design", 2008); the pair that
# differs most comes first.
ENTITY_COLORS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
# Colors of runs whose curves are compared: plain generation is gray, the methods follow.
RUN_COLORS = ("#767676", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
MAP_COLORS = "Viridis"
# Light to dark in one hue, so that printed values are legible on every color and gray prints keep the order.
SHARES = [[0, "#f7f9fb"], [0.25, "#c6d9e8"], [0.5, "#7faccb"], [0.75, "#35749f"], [1, "#0b3a5b"]]
DARK_FROM = 0.68  # share of the scale from which values are printed in white
INK, FAINT, RULE = "#1f2328", "#6e7781", "rgba(128, 128, 128, 0.28)"
# Largest default width of a figure, in pixels: JupyterLab leaves 868 on a screen of 1300 with its sidebar open.
WIDTH = 860
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', sans-serif"


def escape(text: object) -> str:
    """Text escaped for plotly, which reads titles, labels and hover texts as HTML, templates and TeX.

    Examples
    --------
    >>> escape("<start> 5$ %{x}")
    '&lt;start&gt; 5&#36; &#37;{x}'
    """
    return escape_html(str(text), quote=False).replace("$", "&#36;").replace("%", "&#37;")


def shorten(text: str, most: int) -> str:
    """Text cut to at most `most` characters. A text that is cut ends with an ellipsis, which counts as one character.

    Examples
    --------
    >>> shorten("hippopotamus", 8), shorten("cat", 8)
    ('hippopo…', 'cat')
    """
    return text if len(text) <= most else text[: max(1, most - 1)] + "…"


def entity_colors(entities: Sequence[str]) -> dict[str, str]:
    """Color of each entity, chosen by the position of the entity in the prompt.

    Every figure uses these colors. The colors repeat after seven entities.

    Examples
    --------
    >>> entity_colors(["cat", "frog"])
    {'cat': '#E69F00', 'frog': '#0072B2'}
    """
    return {label: ENTITY_COLORS[i % len(ENTITY_COLORS)] for i, label in enumerate(entities)}


def run_name(run: Run) -> str:
    """Name of a run in figures: "plain" for a plain run, otherwise the name of the method, such as "ELA"."""
    return method_title(run.label)


def run_names(runs: Sequence[Run]) -> list[str]:
    """Name of each run in figures: "plain" for a plain run, otherwise the name of the method, such as "ELA".

    If several runs have the same name, the seed is added to their names.
    """
    names = list(map(run_name, runs))
    return [n if names.count(n) == 1 else f"{n}, seed {run.seed}" for n, run in zip(names, runs, strict=True)]


def recorded(run: Run | Recording) -> Recording:
    """Recording of `run`. If `run` is itself a recording, `run` is returned unchanged.

    Raises
    ------
    RecordingError
        `run` is a run that was not recorded, or a recording of videos.
    """
    if not hasattr(run, "recording"):
        if run.frames:
            raise RecordingError(
                f"The recording has videos of {number_of(run.frames, 'frame')}, but figures show one frame. Pass "
                f"`recording.frame(index)` with {an_index(run.frames)}."
            )
        return run
    if run.recording is None:
        raise RecordingError("This run was not recorded. Generate it again with record=True.")
    return run.recording


def pick_steps(there: Sequence[int], wanted: int | Sequence[int], name: str = "steps") -> list[int]:
    """Select the steps that a figure shows from the available steps.

    Parameters
    ----------
    there : sequence of int
        Available steps in ascending order, counted from 0.
    wanted : int or sequence of int
        An int is the number of steps to select, evenly spaced from the first to the last, up to rounding. The number 1
        selects the last step. If fewer steps are available, all are selected. A list names the steps to select;
        negative numbers count back from the last available step.
    name : str
        Name of the argument, for error messages.

    Returns
    -------
    list of int
        The selected steps.

    Raises
    ------
    SettingError
        There is no available step, no step is requested, or a requested step is not available.

    Examples
    --------
    >>> pick_steps(range(20), 5), pick_steps(range(20), 1), pick_steps(range(20), [0, -1])
    ([0, 5, 10, 14, 19], [19], [0, 19])
    """
    steps = [int(step) for step in there]
    if not steps:
        raise SettingError("There is no complete step to show. Record a run that finishes at least one step.")
    if isinstance(wanted, bool) or (is_whole(wanted) and wanted < 1):
        raise SettingError(f"steps={wanted!r}: give the number of steps to show, 1 or more, or a list of steps.")
    if is_whole(wanted):
        if wanted == 1:
            return steps[-1:]
        places = np.floor(np.linspace(0, len(steps) - 1, min(wanted, len(steps))) + 0.5).astype(int)
        return [steps[place] for place in places]
    named = [int(step) if step >= 0 else steps[-1] + 1 + int(step) for step in wanted]
    if missing := [given for given, step in zip(wanted, named, strict=True) if step not in steps]:
        raise SettingError(
            f"{name}: {', '.join(map(str, missing))} {'is' if len(missing) == 1 else 'are'} not available. Choose from "
            f"{_span(steps)}; steps count from 0."
        )
    if not named:
        raise SettingError("steps=[]: give the number of steps to show, 1 or more, or a list of steps.")
    return named


def _span(steps: Sequence[int]) -> str:
    whole = len(steps) > 1 and list(steps) == list(range(steps[0], steps[-1] + 1))
    return f"{steps[0]} to {steps[-1]}" if whole else ", ".join(map(str, steps))


# Widths in pixels: of the narrowest figure, and of a letter of the title and of the caption.
_LEAST_WIDTH, _TITLE_LETTER, _CAPTION_LETTER = 320, 10, 6.2


def wrap(text: str, letters: float, least: int = 8) -> tuple[str, int]:
    """Break a text into lines that are separated by ``<br>``; return the new text and the number of lines.

    A line has at most `letters` or `least` characters, whichever is larger. A word that is longer than a line is not
    divided.
    """
    lines = textwrap.wrap(text, max(least, int(letters)), break_long_words=False, break_on_hyphens=False)
    return "<br>".join(lines), len(lines)


class Panels:
    """Builder of a plotly figure whose panels have equal sizes and are arranged in rows and columns.

    Traces and annotations are collected as dictionaries, and the method `figure` creates the figure at the end. This is
    faster, because every addition to a plotly figure copies and validates the whole figure. All sizes are in pixels.

    Parameters
    ----------
    rows, columns : int
        Numbers of rows and columns of panels.
    width, height : float
        Width and height of one panel.
    gap : (float, float)
        Distance between two columns, and distance between two rows.
    margin : (float, float, float, float)
        Left, right, top and bottom margin. The space for the title is added to the top margin, and the space for the
        caption to the bottom margin.
    title, caption : str
        Title at the top and caption at the bottom, or "" for none. Both must be escaped for plotly. Both are wrapped to
        the width of the figure.
    """

    def __init__(
        self,
        rows: int,
        columns: int,
        *,
        width: float,
        height: float,
        gap: tuple[float, float] = (8, 8),
        margin: tuple[float, float, float, float] = (56, 24, 20, 16),
        title: str = "",
        caption: str = "",
    ) -> None:
        left, right, top, bottom = margin
        self.columns = columns
        self.inner = columns * width + (columns - 1) * gap[0], rows * height + (rows - 1) * gap[1]
        self.panel, self.gap = (width, height), gap
        right = max(right, _LEAST_WIDTH - left - self.inner[0])
        full = left + self.inner[0] + right
        title, title_lines = wrap(title, (full - 32) / _TITLE_LETTER)
        caption, caption_lines = wrap(caption, (full - left - 8) / _CAPTION_LETTER)
        top += 18 + 22 * title_lines if title else 0
        bottom += 14 + 16 * caption_lines if caption else 0
        self.data: list[dict[str, Any]] = []
        self.notes: list[dict[str, Any]] = []
        self.shapes: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.layout: dict[str, Any] = {
            "template": "plotly_white",
            "width": round(self.inner[0] + left + right),
            "height": round(self.inner[1] + top + bottom),
            "margin": {"l": left, "r": right, "t": top, "b": bottom, "pad": 0},
            "font": {"family": FONT, "size": 12, "color": INK},
            "hoverlabel": {"font": {"family": FONT, "size": 12}},
            "showlegend": False,
        }
        if title:
            self.layout["title"] = {
                "text": f"<b>{title}</b>", "font": {"size": 16}, "x": 0, "xref": "container", "xanchor": "left",
                "pad": {"l": 16, "t": 14}, "y": 1, "yref": "container", "yanchor": "top",
            }  # fmt: skip
        if caption:
            self.notes.append(
                {
                    "text": caption, "showarrow": False, "font": {"size": 11}, "opacity": 0.75, "align": "left",
                    "x": 0, "xref": "paper", "xanchor": "left", "y": 0, "yref": "paper", "yanchor": "top",
                    "yshift": -(bottom - 10 - 16 * caption_lines),
                }
            )  # fmt: skip

    def axes(self, row: int, column: int, x: dict[str, Any], y: dict[str, Any]) -> None:
        """Set properties of the two axes of a panel: `x` for its x axis, `y` for its y axis.

        `row` and `column` give the place of the panel, counted from 1.
        """
        across, down = self.panel_axes(row, column)
        (width, height), (gap_x, gap_y) = self.panel, self.gap
        left, top = (column - 1) * (width + gap_x), (row - 1) * (height + gap_y)
        span_x = [left / self.inner[0], min(1.0, (left + width) / self.inner[0])]
        span_y = [max(0.0, 1 - (top + height) / self.inner[1]), 1 - top / self.inner[1]]
        self.layout[across.replace("x", "xaxis")] = {"domain": span_x, "anchor": down, **x}
        self.layout[down.replace("y", "yaxis")] = {"domain": span_y, "anchor": across, **y}

    def map_axes(self, row: int, column: int, rows: float, columns: float) -> None:
        """Set the axes of a panel that shows a map or an image: y downwards, no ticks, square locations.

        Parameters
        ----------
        row, column : int
            Position of the panel, counted from 1.
        rows, columns : float
            Height and width of the map in locations, or of the image in pixels.
        """
        bare: dict[str, Any] = {
            "showgrid": False, "zeroline": False, "showticklabels": False, "ticks": "", "constrain": "domain",
            "showline": True, "mirror": True, "linewidth": 1, "linecolor": RULE,
        }  # fmt: skip
        across, _ = self.panel_axes(row, column)
        self.axes(
            row,
            column,
            {**bare, "range": [-0.5, columns - 0.5]},
            {**bare, "range": [rows - 0.5, -0.5], "scaleanchor": across},
        )

    def add(self, row: int, column: int, trace: dict[str, Any]) -> None:
        """Add a trace to the panel at `row` and `column`, both counted from 1."""
        across, down = self.panel_axes(row, column)
        self.data.append({**trace, "xaxis": across, "yaxis": down})

    def add_nothing(self, row: int, column: int) -> None:
        """Add an empty trace to a panel, because plotly shows the axes of a panel only if the panel has a trace.

        `row` and `column` give the place of the panel, counted from 1.
        """
        self.add(row, column, {"type": "scatter", "x": [None], "y": [None], "hoverinfo": "skip", "showlegend": False})

    def note(self, row: int, column: int, text: str, x: float, y: float, **options: Any) -> None:
        """Add text to a panel at the position (`x`, `y`), in the units of the panel's axes.

        `row` and `column` give the place of the panel, counted from 1. `options` are further properties of the plotly
        annotation.
        """
        across, down = self.panel_axes(row, column)
        self.notes.append({"text": text, "showarrow": False, "x": x, "y": y, "xref": across, "yref": down, **options})

    def over(self, row: int, column: int, text: str) -> None:
        """Add a centered heading above the panel at `row` and `column`, both counted from 1."""
        across, down = self.panel_axes(row, column)
        self.notes.append(
            {
                "text": text, "showarrow": False, "x": 0.5, "xref": f"{across} domain", "y": 1,
                "yref": f"{down} domain", "yanchor": "bottom", "yshift": 4,
            }
        )  # fmt: skip

    def beside(self, row: int, column: int, text: str) -> None:
        """Add vertically centered text to the left of the panel at `row` and `column`, both counted from 1."""
        across, down = self.panel_axes(row, column)
        self.notes.append(
            {
                "text": text, "showarrow": False, "align": "right", "x": 0, "xref": f"{across} domain", "xshift": -8,
                "xanchor": "right", "y": 0.5, "yref": f"{down} domain",
            }
        )  # fmt: skip

    def shape(self, row: int, column: int, **options: Any) -> None:
        """Add a shape to the panel at `row` and `column`, both counted from 1.

        `options` are the properties of the plotly shape.
        """
        across, down = self.panel_axes(row, column)
        self.shapes.append({"xref": across, "yref": down, **options})

    def image(self, row: int, column: int, source: str, rows: float, columns: float) -> None:
        """Add an image to a panel, behind the traces of the panel. The image fills the axes that `map_axes` sets.

        Parameters
        ----------
        row, column : int
            Position of the panel, counted from 1.
        source : str
            Data URI of the image.
        rows, columns : float
            Height and width of the image in the units of the axes. Give the same values as to `map_axes`.
        """
        across, down = self.panel_axes(row, column)
        self.images.append(
            {
                "source": source, "layer": "below", "sizing": "stretch", "xref": across, "yref": down,
                "x": -0.5, "y": -0.5, "sizex": columns, "sizey": rows, "xanchor": "left", "yanchor": "top",
            }
        )  # fmt: skip

    def legend(self, names: Sequence[str] = ()) -> None:
        """Show a horizontal legend of the traces at the bottom of the figure.

        `names` are the names of the traces in the legend. The height of the figure grows if the names need more than
        one line. Without `names`, the figure keeps its height.
        """
        letters = sum(7 * len(name) + 50 for name in names)
        more = 20 * max(0, int(np.ceil(letters / (self.layout["width"] - 16))) - 1)
        self.layout["height"] += more
        self.layout["margin"]["b"] += more
        self.layout["showlegend"] = True
        self.layout["legend"] = {
            "orientation": "h", "x": 0, "xanchor": "left", "y": 0, "yref": "container", "yanchor": "bottom",
            "bgcolor": "rgba(0,0,0,0)",
        }  # fmt: skip

    def entity_legend(self, entities: Sequence[str]) -> None:
        """Add a legend with the color of each entity.

        A click on an entity in the legend hides the traces whose ``legendgroup`` is the label of this entity.
        """
        for label, color in entity_colors(entities).items():
            marker = {"symbol": "square", "size": 12, "color": color}
            name = escape(shorten(label, 28))
            self.add(
                1,
                1,
                {
                    "type": "scatter", "x": [None], "y": [None], "mode": "markers", "marker": marker, "name": name,
                    "legendgroup": label, "showlegend": True,
                },
            )  # fmt: skip
        self.legend([shorten(label, 28) for label in entities])

    def figure(self) -> go.Figure:
        """Create the plotly figure from all collected traces, annotations, shapes and images."""
        layout = {**self.layout, "annotations": self.notes, "shapes": self.shapes, "images": self.images}
        return go.Figure(data=self.data, layout=layout)

    def panel_axes(self, row: int, column: int) -> tuple[str, str]:
        """Plotly's names of the x axis and the y axis of a panel, such as ("x3", "y3").

        `row` and `column` give the place of the panel, counted from 1.
        """
        number = (row - 1) * self.columns + column
        end = "" if number == 1 else str(number)
        return f"x{end}", f"y{end}"


def rgba(color: str, alpha: float) -> str:
    """Convert a hexadecimal color and an opacity from 0 to 1 (`alpha`) to an "rgba" string.

    Examples
    --------
    >>> rgba("#E69F00", 0.5)
    'rgba(230, 159, 0, 0.5)'
    """
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {alpha:g})"
