"""What a sweep shows: shares with intervals, tests against plain generation, and a page to show them on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from html import escape as escape_html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from scipy.stats import binomtest

from elakit.files import check_path
from elakit.plot.style import ENTITY_COLORS, FAINT, FONT, INK, RUN_COLORS, escape
from elakit.sweep.store import IMAGE, SETTINGS, failures, write_file
from elakit.sweep.store import table as read_table
from elakit.sweep.units import PLAIN, canonical

DRAWS, SEED, LEVEL = 2000, 0, 95  # of the bootstrap

# Measure, its heading, and what it means.
MEASURES: tuple[tuple[str, str, str], ...] = (
    ("success", "right", "share of images with every entity there, by itself and in its color"),
    ("neglect", "neglect", "share with an entity missing"),
    ("mixture", "mixture", "share with a hybrid of two entities"),
    ("wrong_color", "wrong color", "share with an entity in a wrong color"),
    ("fixed", "fixed", "share right of those that plain generation, from the same noise, draws wrong"),
    ("broken", "broken", "share wrong of those that plain generation draws right"),
    ("score", "clean drawing", "how sure the judge is of the things it sees, relative to plain generation"),
    ("seconds", "time", "relative to plain generation"),
)
SHARES = ("success", "neglect", "mixture", "wrong_color")
_FAILURES = (("neglect", "neglect"), ("mixture", "mixture"), ("wrong_color", "wrong color"))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How each method does, and whether that differs from plain generation.

    Parameters
    ----------
    table : DataFrame
        From `elakit.sweep.table`.

    Returns
    -------
    DataFrame
        One row a method, plain first; where a method was drawn with several options, or images with several settings,
        the label names them and each has a row. Columns: images; prompts; success, neglect, mixture, wrong_color
        (shares of the images judged); fixed (of those that plain draws wrong), broken (of those it draws right);
        score and seconds (relative to plain); each with _low and _high, its bootstrap interval; fixed_count and
        broken_count; p (McNemar's exact test of success against plain), p_holm (corrected over the methods). NaN where
        there is nothing to tell from.

    Notes
    -----
    The bootstrap resamples prompts with all their images, because images of one prompt are alike: 2000 draws, 95 %
    percentile intervals. McNemar's test counts each image by itself, so with many seeds a prompt it is bolder than
    the intervals.

    Examples
    --------
    >>> methods, success = ["plain", "ela"] * 3, [0, 1, 0, 1, 1, 1]
    >>> table = pd.DataFrame({"prompt": list("aabbcc"), "method": methods, "success": success})
    >>> summary(table)[["success", "fixed", "broken", "p"]].round(2)
            success  fixed  broken    p
    method
    plain      0.33     NaN     NaN  NaN
    ela        1.00     1.0     0.0  0.5
    """
    frame = _against_plain(table)
    plain = frame.groupby("variant")["plain"].any()
    names = sorted(plain.index, key=lambda name: (not plain[name], name))
    rows = [_measure(frame[frame["variant"] == name]) for name in names]
    found = pd.DataFrame(rows, index=pd.Index(names, name="method"))
    found["p_holm"] = _holm(found["p"].to_numpy())
    return found


def figures(table: pd.DataFrame) -> dict[str, go.Figure]:
    """Figures of a sweep.

    Parameters
    ----------
    table : DataFrame
        From `elakit.sweep.table`.

    Returns
    -------
    dict of str to plotly.graph_objects.Figure
        "success": by method, with intervals; "failures": what they consist of (an image may count twice); "time":
        success against time.
    """
    return _figures(summary(table))


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a sweep: a page that needs nothing but itself, and the same as Markdown and as CSV beside it.

    Parameters
    ----------
    folder : str or Path
        Of the sweep.
    out : str or Path, optional
        The page; by default ``report.html`` in the folder.

    Returns
    -------
    Path
        Of the page, absolute.

    Raises
    ------
    OutputError
        There is no finished unit, or `out` cannot be written.
    """
    table = read_table(folder)
    page = check_path(out if out is not None else Path(folder) / "report.html").with_suffix(".html")
    parts = [("All prompts", summary(table))]
    suites = [str(name) for name in table["suite"].unique()]
    if len(suites) > 1:
        parts += [(name or "own prompts", summary(table[table["suite"] == name])) for name in suites]
    sections = [(heading, _cells(found)) for heading, found in parts]
    shown = {
        "settings": _settings(table),
        "headings": ["method", "images", *(heading for _, heading, _ in MEASURES), "p (Holm)"],
        "meanings": [(heading, meaning) for _, heading, meaning in MEASURES],
        "failed": len(failures(folder)),
        "level": LEVEL,
        "draws": DRAWS,
    }
    plots = [
        Markup(figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False}))
        for figure, first in zip(_figures(parts[0][1]).values(), (True, False, False), strict=True)
    ]
    csv = pd.concat(dict(parts), names=["prompts of"]).to_csv()
    write_file(page.with_suffix(".csv"), csv.encode())
    marked = [(_marked(heading), [[_marked(cell) for cell in row] for row in rows]) for heading, rows in sections]
    settings = [(name, _marked(value)) for name, value in _settings(table)]
    text = _environment().get_template("sweep.md.jinja").render(**{**shown, "settings": settings}, sections=marked)
    write_file(page.with_suffix(".md"), text.encode())
    text = _environment().get_template("sweep.html.jinja").render(**shown, sections=sections, plots=plots)
    write_file(page, text.encode())
    return page


# --- measures -----------------------------------------------------------------------------------------------


def _against_plain(table: pd.DataFrame) -> pd.DataFrame:
    """The table with each image's label, and what plain generation made of the same noise."""
    frame = table.reset_index(drop=True).copy()
    for column in (*IMAGE, "options", *SHARES, "score", "seconds"):
        if column not in frame:
            frame[column] = np.nan
    for column in (*SHARES, "score", "seconds", "steps", "guidance_scale", "seed"):
        frame[column] = frame[column].to_numpy(dtype=float, na_value=np.nan)
    # what is not set must be equal to itself
    for column in ("suite", "model", "detector", "device", "dtype", "options"):
        frame[column] = frame[column].astype(object).where(frame[column].notna(), "")
    frame["plain"] = frame["method"] == PLAIN
    frame["variant"] = _labels(frame)
    beside = frame.loc[frame["plain"], [*IMAGE, "success", "score", "seconds"]].drop_duplicates(list(IMAGE))
    return frame.merge(beside, on=list(IMAGE), how="left", suffixes=("", "_plain"))


def _labels(frame: pd.DataFrame) -> list[str]:
    """Method, with the options and settings in which it was drawn more than one way."""
    options = {text: json.loads(text or "{}") for text in frame["options"].unique()}
    told: dict[str, list[str]] = {}
    for method, texts in frame.groupby("method")["options"].unique().items():
        every = [options[text] for text in texts]
        names = sorted({name for some in every for name in some})
        told[str(method)] = [n for n in names if len({(n in some, canonical(some.get(n))) for some in every}) > 1]
    varied = [name for name in SETTINGS if frame[name].nunique(dropna=False) > 1]

    def label(row: Any) -> str:
        own = options[row.options]
        chosen = ", ".join(f"{name}={own[name]}" for name in told[row.method] if name in own)
        where = [f"{name.replace('_', ' ')} {_short(getattr(row, name))}" for name in varied]
        return ", ".join([f"{row.method}({chosen})" if chosen else str(row.method), *where])

    return [label(row) for row in frame.itertuples()]


def _measure(part: pd.DataFrame) -> dict[str, float]:
    """A row of the summary."""
    right, was = part["success"], part["success_plain"]
    judged, compared = right.notna(), right.notna() & was.notna() & ~part["plain"]
    columns = {name: (part[name] == 1, judged) for name in SHARES}
    columns["fixed"] = (compared & (was == 0) & (right == 1), compared & (was == 0))
    columns["broken"] = (compared & (was == 1) & (right == 0), compared & (was == 1))
    for name in ("score", "seconds"):
        both = part[name].notna() & part[f"{name}_plain"].notna()
        columns[name] = (part[name].where(both, 0), part[f"{name}_plain"].where(both, 0))
    row: dict[str, float] = {"images": len(part), "prompts": part["prompt"].nunique()}
    sums = [
        pd.DataFrame({name: pair[i].astype(float) for name, pair in columns.items()}).groupby(part["prompt"]).sum()
        for i in (0, 1)
    ]
    for name, (value, low, high) in zip(columns, _shares(*(each.to_numpy() for each in sums)), strict=True):
        row |= {name: value, f"{name}_low": low, f"{name}_high": high}
    row["fixed_count"], row["broken_count"] = (int(columns[name][0].sum()) for name in ("fixed", "broken"))
    changed = row["fixed_count"] + row["broken_count"]
    if not compared.any():
        row["p"] = np.nan
    else:
        row["p"] = float(binomtest(int(row["fixed_count"]), int(changed)).pvalue) if changed else 1.0
    return row


def _shares(parts: np.ndarray, wholes: np.ndarray) -> Iterator[tuple[float, float, float]]:
    """Value, lower and upper end of each column's sum of parts over sum of wholes; rows (prompts) are resampled."""
    count = len(parts)
    weights = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=DRAWS)
    for part, whole in zip(parts.T, wholes.T, strict=True):
        if not whole.sum() > 0:
            yield np.nan, np.nan, np.nan
            continue
        drawn = weights @ whole
        ends = np.percentile((weights @ part)[drawn > 0] / drawn[drawn > 0], [50 - LEVEL / 2, 50 + LEVEL / 2])
        yield float(part.sum() / whole.sum()), float(ends[0]), float(ends[1])


def _holm(p: np.ndarray) -> np.ndarray:
    """Holm's correction; NaN counts for no test.

    Examples
    --------
    >>> _holm(np.array([np.nan, 0.01, 0.04, 0.03])).tolist()
    [nan, 0.03, 0.06, 0.06]
    """
    corrected = np.full(len(p), np.nan)
    tests = np.flatnonzero(~np.isnan(p))
    order = tests[np.argsort(p[tests], kind="stable")]
    corrected[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1)
    return corrected


# --- what is shown ------------------------------------------------------------------------------------------


def _figures(found: pd.DataFrame) -> dict[str, go.Figure]:
    names = [escape(name) for name in found.index]
    # the first row of a table is read first, and plotly counts from the bottom
    rows = {"categoryorder": "array", "categoryarray": names[::-1], "automargin": True}
    shares = {"title": "share of images", "tickformat": ".0%", "rangemode": "tozero"}
    colors = [RUN_COLORS[i % len(RUN_COLORS)] for i in range(len(names))]
    success = go.Figure(
        go.Scatter(
            x=found["success"], y=names, error_x=_whiskers(found, "success"), mode="markers",
            marker={"size": 11, "color": colors}, hovertemplate="%{y}: %{x:.1%}<extra></extra>",
        )
    )  # fmt: skip
    success.update_layout(_layout("Images that are right", len(names), xaxis=shares, yaxis=rows))
    wrong = go.Figure(
        [
            go.Bar(
                x=found[column], y=names, name=heading, orientation="h", error_x=_whiskers(found, column),
                marker_color=color, hovertemplate=f"%{{y}}, {heading}: %{{x:.1%}}<extra></extra>",
            )
            for (column, heading), color in zip(_FAILURES, ENTITY_COLORS, strict=False)
        ]
    )  # fmt: skip
    wrong.update_layout(
        _layout("What is wrong with the others", 2 * len(names), xaxis=shares, yaxis=rows, barmode="group")
    )
    cost = go.Figure(
        go.Scatter(
            x=found["seconds"], y=found["success"], error_x=_whiskers(found, "seconds"),
            error_y=_whiskers(found, "success"), mode="markers+text", text=names,
            textposition=_label_places(found["seconds"], found["success"]),
            marker={"size": 11, "color": colors}, hovertemplate="%{text}: %{y:.1%}, %{x:.2f}<extra></extra>",
        )
    )  # fmt: skip
    times = {"title": "time of an image, relative to plain generation", "rangemode": "tozero"}
    cost.update_layout(_layout("Right images against time", 9, xaxis=times, yaxis=shares))
    return {"success": success, "failures": wrong, "time": cost}


def _label_places(x: pd.Series, y: pd.Series) -> list[str]:
    """Beside each point, the side that is farthest from other points and from labels placed before."""
    shifts = {"top center": (0, 0.07), "bottom center": (0, -0.07), "middle right": (0.1, 0), "middle left": (-0.1, 0)}
    points = np.nan_to_num(np.stack([x / max(x.max(), 1e-9), y / max(y.max(), 1e-9)], 1))
    labels: list[np.ndarray] = []
    places = []
    for i, point in enumerate(points):
        taken = [*np.delete(points, i, 0), *labels]

        def room(name: str, at: np.ndarray = point, taken: Sequence[np.ndarray] = taken) -> float:
            label = at + shifts[name]
            within = 0 <= label[0] <= 1.05
            return min((float(np.hypot(*(label - other))) for other in taken), default=1.0) if within else 0.0

        best = max(shifts, key=room)
        labels.append(point + shifts[best])
        places.append(best)
    return places


def _layout(title: str, rows: int, **axes: Any) -> dict[str, Any]:
    return {
        "template": "plotly_white", "title": {"text": f"<b>{title}</b>"}, "height": 170 + 34 * rows,
        "font": {"family": FONT, "size": 13, "color": INK}, "legend": {"orientation": "h", "y": -0.25}, **axes,
    }  # fmt: skip


def _whiskers(found: pd.DataFrame, name: str) -> dict[str, Any]:
    return {
        "type": "data", "symmetric": False, "color": FAINT, "thickness": 1.5,
        "array": found[f"{name}_high"] - found[name], "arrayminus": found[name] - found[f"{name}_low"],
    }  # fmt: skip


def _cells(found: pd.DataFrame) -> list[list[str]]:
    """The summary as text, a row a method."""
    rows = []
    for name, row in zip(found.index, found.to_dict("records"), strict=True):
        cells = [str(name), f"{row['images']:.0f}"]
        for measure, _, _ in MEASURES:
            value, low, high = (row[f"{measure}{end}"] for end in ("", "_low", "_high"))
            if np.isnan(value):
                cells.append("–")
            elif measure in ("score", "seconds"):
                cells.append(f"{value:.2f} ({low:.2f}–{high:.2f})")
            else:
                cells.append(f"{value:.1%} ({low:.1%}–{high:.1%})")
        p = row["p_holm"]
        rows.append([*cells, "–" if np.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"])
    return rows


def _settings(table: pd.DataFrame) -> list[tuple[str, str]]:
    """What was drawn."""
    rows = [("prompts", str(table["prompt"].nunique())), ("seeds", _listed(table["seed"]))]
    rows += [(name.replace("_", " "), _listed(table[name])) for name in ("suite", *SETTINGS)]
    options = table[["method", "options"]].drop_duplicates().itertuples(index=False)
    rows += [(method, text) for method, text in options if method != PLAIN]
    return [(name, value) for name, value in rows if value]


def _listed(column: pd.Series) -> str:
    return ", ".join(_short(value) for value in sorted(column.dropna().unique()) if value != "")


def _short(value: Any) -> str:
    if value == "":
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _marked(text: str) -> str:
    """Text that Markdown shows as it is, in a table too."""
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return escape_html(text, quote=False).replace("\n", " ")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    # Markdown is escaped by `_marked`, everything else by the template
    return Environment(
        loader=PackageLoader("elakit.sweep"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
