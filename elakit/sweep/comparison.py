"""Comparison of the methods of a sweep.

The share of right images and the shares of failures have bootstrap intervals. A statistical test compares each method
with plain generation.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pandas as pd

from elakit.statistics import bootstrap, holm, mcnemar
from elakit.sweep.options import PLAIN, canonical
from elakit.sweep.store import IMAGE, SCHEMA, SETTINGS

RESAMPLES, LEVEL = 2000, 95  # number of bootstrap resamples, confidence level in percent
SHARES = ("success", "neglect", "mixture", "wrong_color")


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Summarize each method, and test whether it differs from plain generation.

    Parameters
    ----------
    table : DataFrame
        Table of a sweep, as `elakit.sweep.table` returns it.

    Returns
    -------
    pandas.DataFrame
        One row per method, plain first. The index is the name of the method. A method that was run with several options
        or settings has one row for each combination, and the index also names the options and settings that differ.
        Unknown values are NaN. Columns:

        - images: number of images; prompts: number of different prompts.
        - blocked: number of images that the safety checker replaced. These images are not judged.
        - success: share of the judged images that are right.
        - neglect, mixture, wrong_color: share of the judged images that have this failure.
        - fixed: share of images that the method fixed. Only images that are wrong when plain are counted.
        - broken: share of images that the method broke. Only images that are right when plain are counted.
        - score: mean confidence of the judge in the things that it finds, divided by the mean for the plain images from
          the same noise.
        - seconds: mean generation time per image, divided by the mean for the plain images from the same noise. Only
          images that were generated on the same kind of device are compared.
        - success_low and success_high: ends of the bootstrap interval of success. The other seven columns from neglect
          to seconds also have intervals, with the same suffixes.
        - fixed_count, broken_count: numbers of fixed and broken images.
        - p: p-value of McNemar's exact test, which compares the success of the method with that of plain generation.
        - p_holm: the p-value after Holm's correction for the number of methods.

    Notes
    -----
    Images of one prompt are correlated. The bootstrap therefore resamples prompts, each with all its images. It makes
    2,000 resamples and computes 95% percentile intervals. McNemar's test, by contrast, treats images as independent.
    With many seeds per prompt, its p-values are too small; rely on the intervals.

    Examples
    --------
    The table has three prompts, "a", "b" and "c", and one image per prompt and method. With plain generation, only the
    image of "c" is right. With ELA, all images are right: two images are fixed, and no image is broken. The p-value of
    two fixed images and no broken image is 2 * 0.5**2:

    >>> methods, success = ["plain", "ela"] * 3, [0, 1, 0, 1, 1, 1]
    >>> table = pd.DataFrame({"prompt": list("aabbcc"), "method": methods, "success": success})
    >>> summary(table)[["success", "fixed", "broken", "p"]].round(2)
            success  fixed  broken    p
    method
    plain      0.33     NaN     NaN  NaN
    ela        1.00     1.0     0.0  0.5
    """
    frame = _with_plain(table)
    plain = frame.groupby("label")["plain"].any()
    names = sorted(plain.index, key=lambda name: (not plain[name], name))
    rows = [_row(frame[frame["label"] == name]) for name in names]
    found = pd.DataFrame(rows, index=pd.Index(names, name="method"))
    found["p_holm"] = holm(found["p"].to_numpy())
    return found


def score_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Mean of each score of each method of a sweep, with a bootstrap interval.

    Scores are the columns that `elakit.sweep.score` added to the table. Columns of text are left out. The bootstrap
    resamples prompts, each with all its images.

    Parameters
    ----------
    table : DataFrame
        Table of a sweep, as `elakit.sweep.table` returns it.

    Returns
    -------
    pandas.DataFrame
        One row per method and score; empty if the sweep has no scores. Columns: method (its name, with the options and
        settings that differ), score (name of the score), images (number of images with this score), value (mean score),
        low and high (ends of the 95% interval).
    """
    own = [name for name in table.columns if name not in SCHEMA.names and name != "label"]
    numeric = [
        name for name in own if pd.api.types.is_numeric_dtype(table[name]) or table[name].dropna().isin([0, 1]).all()
    ]
    labels = pd.Series(variants(table), index=table.index)
    rows = []
    for label in sorted(labels.unique(), key=lambda name: (not str(name).startswith(PLAIN), name)):
        for name in numeric:
            values = table.loc[labels == label, ["prompt", name]].dropna()
            if len(values):
                found = bootstrap(
                    values[name].to_numpy(float), None, values["prompt"].to_numpy(str), resamples=RESAMPLES
                )
                rows.append((label, name, len(values), *found))
            else:
                rows.append((label, name, 0, np.nan, np.nan, np.nan))
    return pd.DataFrame(rows, columns=["method", "score", "images", "value", "low", "high"])


def variants(table: pd.DataFrame) -> list[str]:
    """Label of each row of a sweep's table: the method, its varying options, and the varying settings.

    An option varies if it differs between rows of the same method; a setting varies if it differs between any two rows.
    """
    return _labels(_filled(table))


def _filled(table: pd.DataFrame) -> pd.DataFrame:
    """Return a copy of a sweep's table with all columns that the comparison needs.

    Missing columns are added. Missing texts become "", so that two rows without a setting compare equal.
    """
    frame = table.reset_index(drop=True).copy()
    for column in (*IMAGE, "options", *SHARES, "score", "seconds", "device", "blocked"):
        if column not in frame:
            frame[column] = np.nan
    numbers = ("seconds", "steps", "guidance_scale", "height", "width", "seed", "blocked")
    for column in (*SHARES, "score", *numbers):
        frame[column] = frame[column].to_numpy(dtype=float, na_value=np.nan)
    words = (
        "suite",
        "model",
        "detector",
        "device",
        "dtype",
        "options",
        "negative_prompt",
        "scheduler",
        "lora",
        "variant",
    )
    for column in words:
        frame[column] = frame[column].astype(object).where(frame[column].notna(), "")
    return frame


def _with_plain(table: pd.DataFrame) -> pd.DataFrame:
    """Add to each row of a sweep's table the results of the plain image from the same noise.

    Columns with the suffix _plain contain the success, score, time and device of the plain image. The column "plain" is
    True for the plain images themselves. The column "label" contains the result of `variants`.
    """
    frame = _filled(table)
    frame["plain"] = frame["method"] == PLAIN
    frame["label"] = _labels(frame)
    columns = ["success", "score", "seconds", "device"]
    beside = frame.loc[frame["plain"], [*IMAGE, *columns]].drop_duplicates(list(IMAGE))
    joined = frame.merge(beside, on=list(IMAGE), how="left", suffixes=("", "_plain"))
    joined["seconds_plain"] = joined["seconds_plain"].where(joined["device"] == joined["device_plain"])
    return joined


def _labels(frame: pd.DataFrame) -> list[str]:
    options = {text: json.loads(text or "{}") for text in frame["options"].unique()}
    differing: dict[str, list[str]] = {}
    for method, texts in frame.groupby("method")["options"].unique().items():
        every = [options[text] for text in texts]
        names = sorted({name for some in every for name in some})
        differing[str(method)] = [n for n in names if len({(n in some, canonical(some.get(n))) for some in every}) > 1]
    varied = [name for name in SETTINGS if frame[name].nunique(dropna=False) > 1]

    def label(row: Any) -> str:
        own = options[row.options]
        chosen = ", ".join(f"{name}={own[name]}" for name in differing[row.method] if name in own)
        settings = [f"{name.replace('_', ' ')} {short(getattr(row, name))}" for name in varied]
        return ", ".join([f"{row.method}({chosen})" if chosen else str(row.method), *settings])

    return [label(row) for row in frame.itertuples()]


def short(value: Any) -> str:
    """Value of a setting as text for labels and tables: "default" if it is missing."""
    if value == "" or value != value:  # NaN differs from itself
        return "default"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _row(part: pd.DataFrame) -> dict[str, float]:
    """Compute one row of the summary.

    `part` has the images of one method with the same options and settings, in the form that `_with_plain` returns.
    """
    right, before = part["success"], part["success_plain"]
    judged, compared = right.notna(), right.notna() & before.notna() & ~part["plain"]
    columns = {name: (part[name] == 1, judged) for name in SHARES}
    columns["fixed"] = (compared & (before == 0) & (right == 1), compared & (before == 0))
    columns["broken"] = (compared & (before == 1) & (right == 0), compared & (before == 1))
    for name in ("score", "seconds"):
        both = part[name].notna() & part[f"{name}_plain"].notna()
        columns[name] = (part[name].where(both, 0), part[f"{name}_plain"].where(both, 0))
    row: dict[str, float] = {
        "images": len(part), "prompts": part["prompt"].nunique(), "blocked": int((part["blocked"] == 1).sum()),
    }  # fmt: skip
    parts, wholes = (np.stack([pair[i].to_numpy(float) for pair in columns.values()], axis=1) for i in (0, 1))
    interval = bootstrap(parts, wholes, part["prompt"].to_numpy(str), resamples=RESAMPLES)
    for name, value, low, high in zip(columns, *interval, strict=True):
        row |= {name: float(value), f"{name}_low": float(low), f"{name}_high": float(high)}
    row["fixed_count"], row["broken_count"] = (int(columns[name][0].sum()) for name in ("fixed", "broken"))
    counts = int(row["fixed_count"]), int(row["broken_count"])
    row["p"] = mcnemar(*counts) if compared.any() else np.nan
    return row
