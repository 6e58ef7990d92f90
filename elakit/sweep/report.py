"""Report of a sweep as HTML and Markdown, and its numbers as CSV."""

from __future__ import annotations

import json
from functools import lru_cache
from html import escape as escape_html
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from elakit.files import check_path, write_file, write_text
from elakit.guidance.registry import method_title
from elakit.sweep.charts import summary_figures
from elakit.sweep.comparison import LEVEL, RESAMPLES, score_summary, short, summary
from elakit.sweep.options import PLAIN
from elakit.sweep.store import SETTINGS, failures
from elakit.sweep.store import table as read_table

# Measure, its heading, and its meaning.
MEASURES: tuple[tuple[str, str, str], ...] = (
    ("success", "right", "share of the judged images with every entity present, separate and in its color"),
    ("neglect", "neglect", "share with a missing entity"),
    ("mixture", "mixture", "share with a hybrid of two entities"),
    ("wrong_color", "wrong color", "share with an entity in a wrong color"),
    ("fixed", "fixed", "share of right images among those that are wrong when plain, from the same noise"),
    ("broken", "broken", "share of wrong images among those that are right when plain"),
    ("score", "detection score", "mean confidence of the judge in the things it detects, relative to plain"),
    ("seconds", "time", "generation time relative to plain"),
)


def write(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a sweep as a self-contained HTML page, with Markdown and CSV next to it.

    Parameters
    ----------
    folder : str or Path
        Folder of the sweep.
    out : str or Path, optional
        Path of the page; by default ``report.html`` in `folder`. Another suffix is replaced by ``.html``.

    Returns
    -------
    Path
        Absolute path of the page.

    Raises
    ------
    OutputError
        The folder contains no finished unit, or `out` cannot be written.
    """
    table = read_table(folder)
    page = check_path(out if out is not None else Path(folder) / "report.html").with_suffix(".html")
    parts = [("All prompts", summary(table))]
    suites = [str(name) for name in table["suite"].unique()]
    if len(suites) > 1:
        parts += [(name or "Own prompts", summary(table[table["suite"] == name])) for name in suites]
    sections = [(heading, _cells(found)) for heading, found in parts]
    scores = score_summary(table)
    shown: dict[str, Any] = {
        "settings": _settings(table),
        "headings": ["method", "images", *(heading for _, heading, _ in MEASURES), "p (Holm)"],
        "meanings": [(heading, meaning) for _, heading, meaning in MEASURES],
        "scores": _score_cells(scores),
        "score_headings": ["method", *dict.fromkeys(scores["score"])],
        "notes": _notes(table, len(failures(folder))),
        "level": LEVEL,
        "resamples": f"{RESAMPLES:,}",
    }
    plots = [
        Markup(figure.to_html(full_html=False, include_plotlyjs=first, config={"displaylogo": False}))
        for figure, first in zip(summary_figures(parts[0][1]).values(), (True, False, False), strict=True)
    ]
    write_file(page.with_suffix(".csv"), csv_bytes(pd.concat(dict(parts), names=["prompts of"]).reset_index()))
    marked = [(_marked(heading), [[_marked(cell) for cell in row] for row in rows]) for heading, rows in sections]
    settings = [(name, _marked(value)) for name, value in _settings(table)]
    plain = {"settings": settings, "scores": [[_marked(cell) for cell in row] for row in shown["scores"]]}
    text = _environment().get_template("sweep.md.jinja").render(**{**shown, **plain}, sections=marked)
    write_text(page.with_suffix(".md"), text)
    text = _environment().get_template("sweep.html.jinja").render(**shown, sections=sections, plots=plots)
    write_text(page, text)
    return page


def csv_bytes(frame: pd.DataFrame) -> bytes:
    """Encode a table as CSV, and change texts that a spreadsheet program would read as formulas.

    An apostrophe is put before each text that begins with =, +, -, @, a tab or a carriage return. Numbers are not
    changed.

    Examples
    --------
    >>> csv_bytes(pd.DataFrame({"prompt": ["=1+1", "a cat"], "share": [-0.5, 1.0]})).decode().splitlines()
    ['prompt,share', "'=1+1,-0.5", 'a cat,1.0']
    """

    def safe(value: Any) -> Any:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    texts = {name: column.map(safe) for name, column in frame.items() if column.dtype.kind not in "biufc"}
    return frame.assign(**{str(name): column for name, column in texts.items()}).to_csv(index=False).encode()


def _notes(table: pd.DataFrame, failed: int) -> list[str]:
    notes = []
    if failed:
        notes.append(f"{failed} failed {'unit is' if failed == 1 else 'units are'} not included. Run the sweep again.")
    if blocked := int(table["blocked"].fillna(False).sum()):
        they = "It is" if blocked == 1 else "They are"
        notes.append(f"The safety checker replaced {blocked} of {len(table)} images. {they} not judged.")
    unjudged = int(table["success"].isna().sum()) - blocked
    if unjudged:
        were, them = ("was", "it") if unjudged == 1 else ("were", "them")
        notes.append(f"{unjudged} of {len(table)} images {were} not judged: pass --detector to judge {them}.")
    return notes


def _cells(found: pd.DataFrame) -> list[list[str]]:
    """Format the result of `elakit.sweep.summary` as rows of text for the report, one row per method."""
    rows = []
    for name, row in zip(found.index, found.to_dict("records"), strict=True):
        cells = [method_title(str(name)), f"{row['images']:.0f}"]
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


def _score_cells(scores: pd.DataFrame) -> list[list[str]]:
    """Format the result of `score_summary` as rows of text for the report.

    There is one row per method. A row has the name of the method, followed by each score with its interval.
    """
    names = list(dict.fromkeys(scores["score"]))
    rows = []
    for method in dict.fromkeys(scores["method"]):
        own = scores[scores["method"] == method].set_index("score")
        cells = [f"{v.value:.3f} ({v.low:.3f}–{v.high:.3f})" for v in (own.loc[name] for name in names)]
        rows.append([method_title(str(method)), *("–" if cell.startswith("nan") else cell for cell in cells)])
    return rows


def _settings(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Settings of a sweep, as pairs: the name of a setting, and all its values in the table, as one text."""
    rows = [("prompts", str(table["prompt"].nunique())), ("seeds", _listed(table["seed"]))]
    rows += [(name.replace("_", " "), _listed(table[name])) for name in ("suite", *SETTINGS, "device")]
    options = table[["method", "options"]].drop_duplicates().itertuples(index=False)
    rows += [(method_title(method), _options(text)) for method, text in options if method != PLAIN]
    return [(name, value) for name, value in rows if value]


def _options(text: str) -> str:
    """Options of a method as text such as "name=value, name=value", without options that are None.

    `text` is a JSON object of the options.
    """
    return ", ".join(f"{name}={value}" for name, value in json.loads(text).items() if value is not None)


def _listed(column: pd.Series) -> str:
    return ", ".join(short(value) for value in sorted(column.dropna().unique()) if value != "")


def _marked(text: str) -> str:
    """Escape a text for a table in Markdown: the table shows the characters of the text, without any markup."""
    for sign in "\\`*_[]|":
        text = text.replace(sign, f"\\{sign}")
    return escape_html(text, quote=False).replace("\n", " ")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    # Markdown is escaped by `_marked`, HTML by the template
    return Environment(
        loader=PackageLoader("elakit.sweep"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
