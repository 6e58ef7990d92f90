"""Published figures in `data/published`: every value has a source, and values that can be checked agree."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from elakit.guidance import METHODS
from elakit.resources import data_path

REQUIRED = [
    *("paper", "year", "venue", "arxiv", "table", "model", "prompts", "group"),
    *("metric", "unit", "better", "method", "value", "read_as", "source"),
]
MOST = {"similarity": 1, "score": 1, "percent": 100}
BENCHMARK = "Attend-and-Excite"
FULL, MINIMUM, CAPTIONS = (
    "CLIP image-text, full prompt",
    "CLIP image-text, minimum object",
    "CLIP text-text, BLIP caption",
)


def published() -> pd.DataFrame:
    return pd.read_csv(data_path("published", "results.csv"), dtype={"arxiv": str, "note": str})


def verdicts() -> pd.DataFrame:
    return pd.read_csv(data_path("published", "self-cross-verdicts.csv"))


def test_every_value_has_a_source_and_is_named_once() -> None:
    table = published()
    assert list(table) == [*REQUIRED, "note"]
    assert len(table) > 300
    assert table[REQUIRED].notna().all(axis=None)
    assert table["source"].str.fullmatch(r"https://\S+").all()
    assert table["arxiv"].str.fullmatch(r"\d{4}\.\d{5}").all()
    assert set(table["read_as"]) == {"text", "authors", "figure", "transcription"}
    assert not table.duplicated(["paper", "model", "prompts", "group", "metric", "method"]).any()
    assert (table.groupby("paper")[["year", "venue", "arxiv"]].nunique() == 1).all(axis=None)
    files = table.loc[table["source"].str.startswith("https://github.com/"), "source"]
    assert files.str.contains(r"/blob/[0-9a-f]{40}/").all(), "an address of a file names its commit"


def test_values_are_in_the_range_of_their_unit() -> None:
    table = published()
    assert set(table["unit"]) == set(MOST)
    assert table["value"].ge(0).all()
    assert (table["value"] <= table["unit"].map(MOST)).all()
    assert (table.groupby("metric")["better"].nunique() == 1).all()
    assert set(table["better"]) == {"higher", "lower", "neither"}


def test_every_paper_measures_its_own_plain_model() -> None:
    table = published()
    of_plain = table[table["method"] == "plain"]
    relative = table["metric"].str.contains("leakage (?:mitigated|increased)|no change") | table["paper"].eq("DeLeaker")
    prompts = ["paper", "prompts", "group", "metric"]
    compared = table.loc[~relative & ~table["table"].eq("data of a figure"), prompts].drop_duplicates()
    assert len(compared.merge(of_plain[prompts].drop_duplicates(), on=prompts)) == len(compared)


def test_methods_have_the_names_of_elakit() -> None:
    def plain_name(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", name.lower())

    titles = {plain_name(kind.title): kind.title for kind in METHODS.values()}
    for name in set(published()["method"]):
        assert titles.get(plain_name(name), name) == name


def test_the_page_on_the_files_names_every_column_and_paper() -> None:
    page = data_path("published", "README.md").read_text(encoding="utf-8")
    table = published()
    assert all(f"`{column}`" in page for column in table)
    assert all(f"| `{kind}` |" in page for kind in set(table["read_as"]))
    elsewhere = table[~table["read_as"].eq("authors") | table["paper"].eq("EBAMA")]
    assert all(paper in page for paper in set(elsewhere["paper"]))


def test_shares_of_all_answers_add_up_to_100_percent() -> None:
    table = published()
    preferred = table.query("paper == 'A-STAR' and metric == 'preferred by respondents'")
    assert preferred.groupby("group")["value"].sum().tolist() == pytest.approx([100] * 3)
    changes = table[(table["paper"] == "DeLeaker") & (table["unit"] == "percent")]
    assert changes.groupby("method")["value"].sum().tolist() == pytest.approx([100] * 8, abs=0.035)  # as printed


def test_bars_of_a_star_have_the_gains_that_its_text_states() -> None:
    bars = published().query("read_as == 'figure'").pivot(index="method", columns=["metric", "group"], values="value")
    gain = {name: (bars.loc["A-STAR"] / bars.loc[name] - 1).groupby("metric").mean() for name in (BENCHMARK, "plain")}
    # "outperforms Attend-Excite by 2.9% and 1.4% ... over Stable Diffusion 7.1% and 10.8%"
    assert gain[BENCHMARK][FULL] == pytest.approx(0.029, abs=0.001)
    assert gain[BENCHMARK][MINIMUM] == pytest.approx(0.014, abs=0.001)
    assert gain["plain"][FULL] == pytest.approx(0.071, abs=0.001)
    assert gain["plain"][MINIMUM] == pytest.approx(0.108, abs=0.007)  # bars are rounded to .01


def test_plain_images_of_two_papers_agree_within_their_digits_and_once_do_not() -> None:
    table = published().query("prompts == @BENCHMARK and method == 'plain' and unit == 'similarity'")
    both = table.pivot(index=["metric", "group"], columns="paper", values="value")[["A-STAR", "EBAMA"]].dropna()
    assert len(both) == 9
    difference = (both["A-STAR"] - both["EBAMA"]).abs()
    # A-STAR gives two digits
    apart = difference[difference > 0.0075]
    assert apart.round(3).to_dict() == {(FULL, "animals-objects"): 0.01, (CAPTIONS, "animals-objects"): 0.013}


def test_right_images_follow_from_fixed_and_broken_ones() -> None:
    table = verdicts()
    assert table.groupby("method")["group"].apply(list).map(len).eq(4).all()
    ours = pd.read_csv(data_path("evidence", "comparison.csv"))
    plain = table[table["method"] == "plain"].set_index("group")["right"]
    theirs = table.assign(plain_right=table["group"].map(plain))
    for methods in (theirs, ours):
        guided = methods[methods["method"] != "plain"]
        expected = guided["plain_right"] * (1 - guided["broken"]) + (1 - guided["plain_right"]) * guided["fixed"]
        assert guided["right"].tolist() == pytest.approx(expected.tolist(), abs=0.0025)
    for name in ("right", "fixed", "broken"):
        known = table.dropna(subset=[name])
        assert (known[f"{name}_low"] <= known[name]).all()
        assert (known[name] <= known[f"{name}_high"]).all()


def test_verdicts_cover_the_whole_benchmark() -> None:
    counts = verdicts().groupby("group")["prompts"].first().to_dict()
    assert counts == {"animals": 66, "animals-objects": 144, "objects": 66, "all": 276}
