"""Summary of a survey: tables, and a page with one entry per prompt."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet
from jinja2 import Environment, PackageLoader, StrictUndefined

from elakit.causes.findings import with_current_kinds
from elakit.diagnosis.report.views import Bar
from elakit.diagnosis.survey.cases import read_case
from elakit.errors import OutputError
from elakit.files import read_json, write_file, write_text
from elakit.numbering import number_of
from elakit.statistics import wilson
from elakit.sweep.report import csv_bytes

COLUMNS = (
    "prompt", "images", "right", "rate", "low", "high", "bleed", "failures", "failure", "causes", "cause", "best",
    "title", "best_right", "best_rate", "best_low", "best_high", "fixed", "broken", "cost", "seconds", "page", "error",
)  # fmt: skip
REMEDY_COLUMNS = (
    "prompt", "name", "title", "status", "images", "right", "rate", "fixed", "broken", "bleed", "cost", "why",
)  # fmt: skip


def table(folder: str | Path, order: Sequence[str] = ()) -> pd.DataFrame:
    """Read a survey as a table with one row per prompt.

    Parameters
    ----------
    folder : str or Path
        Folder written by `diagnose_many`.
    order : sequence of str
        Prompts that come first, in this order; all other prompts follow alphabetically.

    Returns
    -------
    pandas.DataFrame
        Column prompt, and the following columns:

        - images, right: number of plain images, and number of right plain images;
        - rate, low, high: share of right plain images, and its 95% interval;
        - bleed: mean bleeding of the plain images;
        - failures: kinds of all failures, separated by semicolons;
        - failure: the most frequent failure as a sentence;
        - causes, cause: the most likely cause, as its kind and as a sentence;
        - best, title: name and title of the best remedy;
        - best_right: number of right images of the best remedy;
        - best_rate, best_low, best_high: share of right images of the best remedy, and its 95% interval;
        - fixed, broken: number of images that the best remedy fixed, and number of images that it broke;
        - cost: generation time per image of the best remedy, divided by the generation time of a plain image;
        - seconds, page: time of the diagnosis in seconds, and path of the prompt's page in the folder;
        - error: error of the diagnosis; missing for finished prompts.

        The values of the best remedy are missing if no remedy did better than plain generation. A prompt whose
        diagnosis failed has only an error.
    """
    cases, _ = _cases(folder)
    return _table(folder, cases, order)


def remedies(folder: str | Path) -> pd.DataFrame:
    """Read the remedies of a survey as a table with one row per prompt and remedy.

    Parameters
    ----------
    folder : str or Path
        Folder written by `diagnose_many`.

    Returns
    -------
    pandas.DataFrame
        The following columns:

        - prompt, name, title: the prompt, and name and title of the remedy;
        - status, why: "tried", "failed" or "not tried", and the reason if the remedy failed or was not tried;
        - images, right, rate: number of images, number of right images, and share of right images;
        - fixed, broken: number of images that the remedy fixed, and number of images that it broke;
        - bleed: mean bleeding of the images;
        - cost: generation time per image, divided by the generation time of a plain image.
    """
    return _remedies(_cases(folder)[0])


def write(folder: str | Path, order: Sequence[str] = ()) -> Path:
    """Write the summary of a survey: an HTML page, a table of the prompts, and a table of the remedies.

    Each table is written as CSV and Parquet, and the table of the prompts also as JSON. Files in ``cases/`` that cannot
    be read are named on the page and left out of the tables.

    Parameters
    ----------
    folder : str or Path
        Folder of the survey.
    order : sequence of str
        Prompts of the survey. The table of the prompts has the same order. The page lists prompts that are neither
        finished nor failed as not diagnosed yet.

    Returns
    -------
    Path
        Path of the page.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    folder = Path(folder)
    cases, unreadable = _cases(folder)
    summary, tried = _table(folder, cases, order), _remedies(cases)
    for name, frame in (("summary", summary), ("remedies", tried)):
        write_file(folder / f"{name}.csv", csv_bytes(frame))
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
        write_file(folder / f"{name}.parquet", sink.getvalue().to_pybytes())
    write_text(folder / "summary.json", summary.to_json(orient="records", indent=1) or "[]")
    images = {case["given"]: case["images"] for case in cases}
    return write_text(folder / "index.html", _page(summary, tried, images, order, unreadable))


@dataclass(frozen=True)
class _Share:
    """One row of a bar chart on the summary page.

    Attributes
    ----------
    name : str
        Name of the row, such as the kind of a failure.
    score : str
        Count as text, such as "2 of 5 prompts".
    bar : Bar or None
        The same count as a share, with its 95% interval.
    facts : tuple of str
        Short phrases, such as "2 fixed".
    """

    name: str
    score: str
    bar: Bar | None
    facts: tuple[str, ...]


def _page(
    summary: pd.DataFrame,
    tried: pd.DataFrame,
    images: dict[str, Any],
    order: Sequence[str],
    unreadable: dict[str, str],
) -> str:
    done = summary[summary["error"].isna()]
    rows = done.sort_values("rate", kind="stable", na_position="last").to_dict("records")
    failed = summary[summary["error"].notna()]
    waiting = [prompt for prompt in order if prompt not in set(summary["prompt"])]
    return (
        _environment()
        .get_template("survey.html.jinja")
        .render(
            rows=[
                row
                | {
                    "plain": _bar(row["rate"], row["low"], row["high"]),
                    "best_bar": _bar(row["best_rate"], row["best_low"], row["best_high"]),
                    "shown": {"plain": None, "best": None} | _safe_images(images[row["prompt"]]),
                    "link": row["page"] if _PAGE.fullmatch(str(row["page"])) else None,
                }
                for row in rows
            ],
            failed=failed[["prompt", "error"]].to_dict("records"),
            waiting=waiting,
            unreadable=unreadable,
            statements=_statements(done, failed, waiting, unreadable),
            failures=_failures(done),
            remedies=_remedy_shares(tried),
        )
    )


# A case file may have been edited: only relative links to pages, and only embedded images, become part of the page.
_PAGE = re.compile(r"pages/[a-z0-9-]+\.html")
_IMAGE = re.compile(r"data:image/[a-z]+;base64,[A-Za-z0-9+/=]*")


def _safe_images(images: Any) -> dict[str, str]:
    pairs = images.items() if isinstance(images, dict) else ()
    return {str(name): uri for name, uri in pairs if isinstance(uri, str) and _IMAGE.fullmatch(uri)}


def _statements(
    done: pd.DataFrame, failed: pd.DataFrame, waiting: Sequence[str], unreadable: dict[str, str]
) -> list[str]:
    said = []
    judged = done[done["right"].notna()]
    if len(judged):
        right, of = int(judged["right"].sum()), int(judged["images"].sum())
        low, high = wilson(right, of)
        all_right = int((judged["right"] == judged["images"]).sum())
        said.append(
            f"Without guidance, {right} of {of} images of {_prompts(len(judged))} show everything the prompt asks for "
            f"(95% interval {low:.0%} to {high:.0%}). All images are right for {all_right} of {_prompts(len(judged))}."
        )
        fails = judged[judged["right"] < judged["images"]]
        if len(fails):
            better = int(fails["best"].notna().sum())
            said.append(
                f"A remedy did better than generation without guidance for {better} of the other "
                f"{_prompts(len(fails))}."
            )
    if len(done) > len(judged):
        said.append(f"{_prompts(len(done) - len(judged))} could not be judged; only the attention was measured.")
    if len(failed):
        said.append(f"{_prompts(len(failed))} could not be diagnosed; the errors are listed below.")
    if unreadable:
        said.append(f"{number_of(len(unreadable), 'file')} in cases/ cannot be read; see below.")
    if waiting:
        said.append(
            f"{_prompts(len(waiting))} {'is' if len(waiting) == 1 else 'are'} not diagnosed yet. Run the same command "
            "again."
        )
    return said or ["No prompt is finished yet."]


def _prompts(count: int) -> str:
    return number_of(count, "prompt")


def _failures(done: pd.DataFrame) -> list[_Share]:
    """Rows of the chart of failures and causes on the page.

    There is one row per kind of failure, with the number of prompts in which the failure occurs. Then there is one row
    per kind of cause, with the number of prompts for which the cause is the most likely one.
    """
    counts = Counter(kind for kinds in done["failures"].dropna() for kind in set(kinds.split("; ")) if kind)
    causes = done.groupby("causes")["prompt"].count() if len(done) else pd.Series(dtype=int)
    shares = [
        _Share(kind, f"{count} of {_prompts(len(done))}", Bar(count / len(done), *wilson(count, len(done))), ())
        for kind, count in counts.most_common()
    ]
    return shares + [
        _Share(
            f"cause: {kind}", f"{count} of {_prompts(len(done))}", Bar(count / len(done), *wilson(count, len(done))), ()
        )
        for kind, count in causes.sort_values(ascending=False).items()
        if kind
    ]


def _remedy_shares(tried: pd.DataFrame) -> list[_Share]:
    """Rows of the chart of remedies on the page: for each remedy, the share of its images that are right.

    A prompt counts for a remedy only if the remedy was tried and its images were judged.
    """
    shares = []
    judged = tried[(tried["status"] == "tried") & tried["right"].notna()]
    for title, part in judged.groupby("title"):
        right, of = int(part["right"].sum()), int(part["images"].sum())
        facts = (
            _prompts(len(part)),
            f"{int(part['fixed'].sum())} fixed",
            f"{int(part['broken'].sum())} broken",
            f"time × {float(np.median(part['cost'].astype(float))):.1f}",
        )
        shares.append(_Share(str(title), f"{right} of {of} right", Bar(right / of, *wilson(right, of)), facts))
    return sorted(shares, key=lambda one: -one.bar.value if one.bar else 0)


def _bar(value: Any, low: Any, high: Any) -> Bar | None:
    return None if pd.isna(value) else Bar(float(value), float(low), float(high))


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("elakit.diagnosis.survey"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["known"] = lambda value: not pd.isna(value)
    return environment


def _cases(folder: str | Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results of all finished prompts, and the errors of result files that cannot be read, by file name."""
    cases, unreadable = [], {}
    for path in sorted((Path(folder) / "cases").glob("*.json")):
        try:
            case = read_case(path)
            _row(case), _remedies([case])
            cases.append(case)
        except (OutputError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            unreadable[f"cases/{path.name}"] = f"{type(error).__name__}: {error}"
    return cases, unreadable


def _failed(folder: str | Path, done: set[str]) -> dict[str, str]:
    """Error of each prompt that failed and has not been finished since, by prompt; `done` are finished prompts."""
    failed = {}
    for path in sorted((Path(folder) / "failed").glob("*.json")):
        try:
            note = read_json(path)
            prompt, error = str(note["prompt"]), str(note["error"])
        except (OutputError, KeyError, TypeError) as damage:
            prompt, error = f"failed/{path.name}", f"The note of a failed prompt cannot be read: {damage}"
        if prompt not in done:
            failed[prompt] = error
    return failed


def _table(folder: str | Path, cases: list[dict[str, Any]], order: Sequence[str]) -> pd.DataFrame:
    rows = [_row(case) for case in cases]
    done = {row["prompt"] for row in rows}
    rows += [{"prompt": prompt, "error": error} for prompt, error in _failed(folder, done).items()]
    position = {prompt: i for i, prompt in enumerate(order)}
    rows.sort(key=lambda row: (position.get(row["prompt"], len(position)), row["prompt"]))
    return _counted(pd.DataFrame(rows, columns=list(COLUMNS)))


def _remedies(cases: Sequence[dict[str, Any]]) -> pd.DataFrame:
    rows = []
    for case in cases:
        for one in case["remedies"]:
            counts = {name: None if one[name] is None else len(one[name]) for name in ("fixed", "broken")}
            rows.append({"prompt": case["given"], **{n: one[n] for n in REMEDY_COLUMNS[1:]}, **counts})
    return _counted(pd.DataFrame(rows, columns=list(REMEDY_COLUMNS)))


def _counted(frame: pd.DataFrame) -> pd.DataFrame:
    """Convert the columns of counts to integers that can be missing (Int64)."""
    counts = [name for name in ("images", "right", "best_right", "fixed", "broken") if name in frame]
    return frame.astype(dict.fromkeys(counts, "Int64"))


def _row(case: dict[str, Any]) -> dict[str, Any]:
    plain = case["plain"]
    findings = with_current_kinds(case["findings"] or {"failures": [], "causes": []})
    failures = findings["failures"] if case["judged"] else []
    causes = [cause for cause in findings["causes"] if cause["explains"] or not case["judged"]]
    best = next((one for one in case["remedies"] if one["name"] == case["best"]), None)
    low, high = plain["interval"] or (None, None)
    row = {
        "prompt": case["given"],
        **{name: plain[name] for name in ("images", "right", "rate", "bleed")},
        "low": low,
        "high": high,
        "failures": "; ".join(dict.fromkeys(one["kind"] for one in failures)),
        "failure": failures[0]["sentence"] if failures else "",
        "causes": causes[0]["kind"] if causes else "",
        "cause": causes[0]["sentence"] if causes else "",
        "seconds": case["seconds"],
        "page": case["page"],
    }
    if best is not None:
        best_low, best_high = best["interval"] or (None, None)
        row |= {
            "best": best["name"],
            "title": best["title"],
            "best_right": best["right"],
            "best_rate": best["rate"],
            "best_low": best_low,
            "best_high": best_high,
            "fixed": None if best["fixed"] is None else len(best["fixed"]),
            "broken": None if best["broken"] is None else len(best["broken"]),
            "cost": best["cost"],
        }
    return row
