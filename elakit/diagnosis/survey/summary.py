"""Many diagnoses summed up: tables, and a page with a line a prompt."""

from __future__ import annotations

import json
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

from elakit.causes import wilson
from elakit.diagnosis.report.views import Bar
from elakit.diagnosis.sentences import plural
from elakit.files import write_file

COLUMNS = (
    "prompt", "images", "right", "rate", "low", "high", "bleed", "failures", "wrong", "cause", "why", "best", "title",
    "best_right", "best_rate", "best_low", "best_high", "fixed", "broken", "cost", "seconds", "page", "error",
)  # fmt: skip
REMEDY_COLUMNS = (
    "prompt", "name", "title", "status", "images", "right", "rate", "fixed", "broken", "bleed", "cost", "why",
)  # fmt: skip


def table(folder: str | Path, order: Sequence[str] = ()) -> pd.DataFrame:
    """One row a prompt of a folder of diagnoses.

    Parameters
    ----------
    folder : str or Path
        That `elakit.diagnose_many` wrote.
    order : sequence of str
        Prompts that come first, in this order; the others follow by the alphabet.

    Returns
    -------
    DataFrame
        Columns prompt; images, right, rate, low, high (of the plain ones, with the 95 % interval), bleed; failures
        (kinds, with semicolons), wrong (the most frequent one in words), cause (kind of the likeliest), why; best (name
        of the best remedy), title, best_right, best_rate, best_low, best_high, fixed, broken, cost; seconds; page;
        error (of a prompt that failed, where all else is missing).
    """
    rows = [_row(told) for told in _told(folder)]
    rows += [{"prompt": prompt, "error": error} for prompt, error in _failed(folder).items()]
    place = {prompt: i for i, prompt in enumerate(order)}
    rows.sort(key=lambda row: (place.get(row["prompt"], len(place)), row["prompt"]))
    return _counted(pd.DataFrame(rows, columns=list(COLUMNS)))


def remedies(folder: str | Path) -> pd.DataFrame:
    """One row a prompt and remedy of a folder of diagnoses: what `Diagnosis.remedies_frame` tells of each.

    Parameters
    ----------
    folder : str or Path
    """
    rows = []
    for told in _told(folder):
        for one in told["remedies"]:
            counts = {name: None if one[name] is None else len(one[name]) for name in ("fixed", "broken")}
            rows.append({"prompt": told["given"], **{n: one[n] for n in REMEDY_COLUMNS[1:]}, **counts})
    return _counted(pd.DataFrame(rows, columns=list(REMEDY_COLUMNS)))


def write(folder: str | Path, order: Sequence[str] = ()) -> Path:
    """Write the summary of a folder of diagnoses: the page, and its tables as CSV, Parquet and JSON.

    Parameters
    ----------
    folder : str or Path
    order : sequence of str
        As in `table`.

    Returns
    -------
    Path
        Of the page.

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    folder = Path(folder)
    summed, tried = table(folder, order), remedies(folder)
    for name, frame in (("summary", summed), ("remedies", tried)):
        write_file(folder / f"{name}.csv", frame.to_csv(index=False).encode())
        sink = pa.BufferOutputStream()
        pa.parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
        write_file(folder / f"{name}.parquet", sink.getvalue().to_pybytes())
    write_file(folder / "summary.json", (summed.to_json(orient="records", indent=1) or "[]").encode())
    images = {told["given"]: told["images"] for told in _told(folder)}
    page = folder / "index.html"
    write_file(page, _page(summed, tried, images, order).encode())
    return page


# --- the page -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Share:
    """Something counted over all prompts."""

    name: str
    score: str
    bar: Bar | None
    facts: tuple[str, ...]


def _page(summed: pd.DataFrame, tried: pd.DataFrame, images: dict[str, Any], order: Sequence[str]) -> str:
    done = summed[summed["error"].isna()]
    rows = done.sort_values("rate", kind="stable", na_position="last").to_dict("records")
    failed = summed[summed["error"].notna()]
    waiting = [prompt for prompt in order if prompt not in set(summed["prompt"])]
    return (
        _environment()
        .get_template("survey.html.jinja")
        .render(
            rows=[
                row
                | {
                    "plain": _bar(row["rate"], row["low"], row["high"]),
                    "fixed_bar": _bar(row["best_rate"], row["best_low"], row["best_high"]),
                    "images_shown": {"plain": None, "best": None} | images[row["prompt"]],
                }
                for row in rows
            ],
            failed=failed[["prompt", "error"]].to_dict("records"),
            waiting=waiting,
            said=_said(done, failed, waiting),
            failures=_failures(done),
            remedies=_remedies(tried),
        )
    )


def _said(done: pd.DataFrame, failed: pd.DataFrame, waiting: Sequence[str]) -> list[str]:
    said = []
    judged = done[done["right"].notna()]
    if len(judged):
        right, of = int(judged["right"].sum()), int(judged["images"].sum())
        low, high = (round(100 * end) for end in wilson(right, of))
        whole = int((judged["right"] == judged["images"]).sum())
        said.append(
            f"Drawn plainly, {right} of {of} images of {_prompts(len(judged))} show everything that is asked for "
            f"({low} to {high} %); from every seed right: {_prompts(whole)}."
        )
        fails = judged[judged["right"] < judged["images"]]
        helped = fails[fails["best"].notna()]
        if len(fails):
            said.append(f"A remedy that was tried did better for {len(helped)} of the {len(fails)} others.")
    if len(done) > len(judged):
        said.append(f"Not judged, and told by measures of attention only: {_prompts(len(done) - len(judged))}.")
    if len(failed):
        said.append(f"Not diagnosed, with the errors below: {_prompts(len(failed))}.")
    if waiting:
        said.append(f"Still to come when the same command is run again: {_prompts(len(waiting))}.")
    return said or ["Nothing is finished yet."]


def _prompts(count: int) -> str:
    return f"{count} {plural('prompt', count)}"


def _failures(done: pd.DataFrame) -> list[_Share]:
    """In how many prompts each kind of failure occurs, and each cause is the likeliest."""
    counts = Counter(kind for kinds in done["failures"].dropna() for kind in set(kinds.split("; ")) if kind)
    causes = done.groupby("cause")["prompt"].count() if len(done) else pd.Series(dtype=int)
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


def _remedies(tried: pd.DataFrame) -> list[_Share]:
    """How each remedy did over all prompts it was tried on and judged."""
    shares = []
    judged = tried[(tried["status"] == "tried") & tried["right"].notna()]
    for title, part in judged.groupby("title"):
        right, of = int(part["right"].sum()), int(part["images"].sum())
        facts = (
            _prompts(len(part)),
            f"fixed {int(part['fixed'].sum())}",
            f"broken {int(part['broken'].sum())}",
            f"{float(np.median(part['cost'].astype(float))):.1f} × the time",
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


# --- what lies in the folder --------------------------------------------------------------------------------


def _told(folder: str | Path) -> list[dict[str, Any]]:
    """What was found of each finished prompt."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted((Path(folder) / "cases").glob("*.json"))]


def _failed(folder: str | Path) -> dict[str, str]:
    """Prompts that failed and have not been finished since, with their errors."""
    notes = [json.loads(path.read_text("utf-8")) for path in sorted((Path(folder) / "failed").glob("*.json"))]
    done = {told["given"] for told in _told(folder)}
    return {note["prompt"]: note["error"] for note in notes if note["prompt"] not in done}


def _counted(frame: pd.DataFrame) -> pd.DataFrame:
    """Counts as whole numbers, though some are missing."""
    counts = [name for name in ("images", "right", "best_right", "fixed", "broken") if name in frame]
    return frame.astype(dict.fromkeys(counts, "Int64"))


def _row(told: dict[str, Any]) -> dict[str, Any]:
    plain = told["plain"]
    findings = told["findings"] or {"failures": [], "causes": []}
    causes = findings["causes"]
    best = next((one for one in told["remedies"] if one["name"] == told["best"]), None)
    low, high = plain["interval"] or (None, None)
    row = {
        "prompt": told["given"],
        **{name: plain[name] for name in ("images", "right", "rate", "bleed")},
        "low": low,
        "high": high,
        "failures": "; ".join(dict.fromkeys(one["kind"] for one in findings["failures"])),
        "wrong": findings["failures"][0]["sentence"] if findings["failures"] else "",
        "cause": causes[0]["kind"] if causes else "",
        "why": causes[0]["sentence"] if causes else "",
        "seconds": told["seconds"],
        "page": told["page"],
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
