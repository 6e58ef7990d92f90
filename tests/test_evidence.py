"""The tables in `data/evidence` are those of the page on evidence, which notebook 10 shows beside published figures."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from elakit.guidance import METHODS
from elakit.resources import data_path

PAGE = Path(__file__).parents[1] / "docs" / "evidence.md"
COMPARISON = {
    "method": "method",
    "right": "right",
    "fixed": "fixed",
    "broken": "broken",
    "detection score, relative to plain": "detection",
    "time, relative to plain": "time",
    "neglect": "neglect",
    "mixture": "mixture",
    "wrong color": "wrong_color",
}
BY_KIND = {
    "prompts": "prompts",
    "images": "images",
    "plain right": "plain_right",
    "regional attention right": "right",
    "fixed": "fixed",
    "broken": "broken",
}

TUNED = {
    "method": "method",
    "best point": "options",
    "right": "right",
    "fixed": "fixed",
    "broken": "broken",
    "right minus broken images": "right_minus_broken",
}


def table(columns: dict[str, str]) -> pd.DataFrame:
    """The first table of the page with these columns; a value with an interval becomes three columns."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| {' | '.join(columns)} |")
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row: dict[str, object] = {}
        for name, text in zip(columns.values(), line.strip("|").split("|"), strict=True):
            text = text.strip().strip("*")
            numbers = re.fullmatch(r"([\d.]+)(?: \(([\d.]+) to ([\d.]+)\))?", text)
            if not numbers:
                row[name] = text or None
                continue
            row[name] = float(numbers[1])
            if numbers[2]:
                row |= {f"{name}_low": float(numbers[2]), f"{name}_high": float(numbers[3])}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(("file", "columns"), [("comparison.csv", COMPARISON), ("by-kind.csv", BY_KIND)])
def test_the_file_has_the_table_of_the_page(file: str, columns: dict[str, str]) -> None:
    saved, page = pd.read_csv(data_path("evidence", file)), table(columns)
    if "method" in page:
        # "InitNO (368 images, plain .639)": the note has two columns of its own
        (usual,) = set(re.findall(r"([\d,]+) images per row", PAGE.read_text(encoding="utf-8")))
        notes = page["method"].str.extract(r"\((\d+) images, plain ([.\d]+)\)").astype(float)
        page["method"] = page["method"].str.replace(r" \(\d+ images.*", "", regex=True)
        page["images"] = notes[0].fillna(int(usual.replace(",", "")))
        page["plain_right"] = notes[1].fillna(page["right"][0])
    pd.testing.assert_frame_equal(
        saved[sorted(saved)], page[sorted(page)], check_dtype=False, obj=f"{file} and the page: copy the page's figures"
    )


def test_the_page_has_the_best_point_of_each_tuned_method() -> None:
    points, page = pd.read_csv(data_path("evidence", "tuned.csv")), table(TUNED)
    assert (points.groupby("method").size() == 6).all()
    best = (
        points.sort_values("right_minus_broken", ascending=False, kind="stable").groupby("method", sort=False).head(1)
    )
    best["method"] = [METHODS[name].title for name in best["method"]]
    rows = page[page["method"] != "plain"]
    rows = rows.assign(options=rows["options"].str.replace("`", ""))
    pd.testing.assert_frame_equal(
        rows.sort_values("method", ignore_index=True), best.sort_values("method", ignore_index=True)[list(rows)]
    )
