"""Inputs that once gave wrong tables, tracebacks or silence."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from commands import call
from PIL import Image

import elakit
from elakit.errors import OutputError, SettingError
from elakit.guidance.registry import NEED_REGIONS
from elakit.sweep import BENCHMARKS, generation, plan, read_prompts, report, run, store, suite, summary, table
from elakit.sweep.units import Unit


def pretend(unit: Unit) -> list[dict[str, Any]]:
    return [{**unit.labels(), "seed": seed, "success": True} for seed in unit.seeds]


def finished(folder: Path, prompts: Any = ("a cat and a lion", "a cat and a dog")) -> list[Unit]:
    units = plan(prompts, [1])
    with ThreadPoolExecutor(1) as pool:
        run(units, folder, pool, generate=pretend)
    return units


def test_a_single_string_is_not_a_list_of_letters() -> None:
    with pytest.raises(SettingError, match=r"is a single string.*\['a cat and a lion'\]"):
        plan("a cat and a lion", [1])
    with pytest.raises(SettingError, match="is a single string"):
        plan({"mine": "a cat and a lion"}, [1])
    with pytest.raises(SettingError, match=r"methods='ela' is a single string.*\['ela'\]"):
        plan(["a cat and a lion"], [1], "ela")


@pytest.mark.parametrize("seed", [2**64, -1, 1.5, True, "x"])
def test_seeds_that_no_table_can_hold_are_refused(seed: Any) -> None:
    with pytest.raises(SettingError, match="seeds"):
        plan(["a cat"], [seed])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "run", "--out", "x", "--seeds", str(2**64)], str(2**64)),
        (["sweep", "run", "--out", "x", "--seeds", "99999999999999999999"], "99999999999999999999"),
        (["sweep", "run", "--out", "x", "--steps", "1001"], "steps=1001"),
        (["sweep", "run", "--out", "x" * 300], "too long"),
        (["sweep", "run", "--out", "\udcff"], "not valid UTF-8"),
        (["sweep", "run", "--out", "x", "--shard", "4/3"], "--shard 4/3"),
        (["sweep", "run", "--out", "x", "--suite", "geneval2"], "geneval2_data.jsonl"),
        (["sweep", "score", "x"], "--scorer"),
        (["sweep", "score"], "clip"),
        (["sweep", "export", "x"], "no finished unit"),
        (["diagnose", "a [cat]", "--seeds", "99999999999999999999"], "--seeds=99999999999999999999"),
        (["diagnose", "a [cat]", "--seeds", "0-20000"], "20,001 seeds; at most 10,000"),
        (["diagnose", "a [cat]", "--steps", "1001"], "steps=1001"),
        (["diagnose", "a [cat]", "--out", "x" * 300], "too long"),
        (["diagnose", "a [cat]", "--keep", "x" * 300], "too long"),
    ],
)
def test_wrong_words_give_one_line_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert "Traceback" not in printed.err + printed.out
    assert not list(tmp_path.iterdir())


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path: Path) -> None:
    for name, text in (
        ("mine.txt", "a cat\na dog\n"),
        ("mine.json", '["a cat", "a dog"]'),
        ("mine.csv", "prompt,seed\na cat,1\na dog,2\n"),
    ):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert read_prompts(tmp_path / name) == ("a cat", "a dog")


def test_benchmarks_are_read_in_the_formats_they_come_in(tmp_path: Path) -> None:
    prompts = ("a green bench and a blue bowl", "two dogs")
    (tmp_path / "geneval2_data.jsonl").write_text(
        "\n".join(json.dumps({"prompt": text, "atom_count": 2}) for text in prompts)
    )
    (tmp_path / "groups.json").write_text(json.dumps({"a": [prompts[0]], "b": [{"prompt": prompts[1]}]}))
    (tmp_path / "color_val.txt").write_text("\n".join(prompts) + "\n")
    pd.DataFrame({"text": prompts, "n": 1}).to_csv(tmp_path / "table.tsv", sep="\t", index=False)
    (tmp_path / "slim").mkdir()
    pd.DataFrame({"prompt": prompts, "leakage": True}).to_parquet(tmp_path / "slim" / "train-0.parquet")
    for name in ("geneval2_data.jsonl", "groups.json", "color_val.txt", "table.tsv", "slim"):
        assert read_prompts(tmp_path / name) == prompts
    (tmp_path / "wrong.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SettingError, match="no column 'prompt'"):
        read_prompts(tmp_path / "wrong.csv")
    for name in BENCHMARKS:
        with pytest.raises(SettingError, match=r"elakit sweep run --prompts"):
            suite(name)


def test_units_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    units = finished(tmp_path)
    names = [f"{unit.key}.parquet" for unit in units[:2]]
    for name in names:
        (tmp_path / "units" / name).write_bytes(b"PAR1 and then nothing")
    with pytest.raises(OutputError, match="2 of 4 files") as raised:
        table(tmp_path)
    assert all(name in str(raised.value) for name in names)


def test_a_damaged_note_of_a_failure_does_not_end_the_report(tmp_path: Path) -> None:
    finished(tmp_path)
    (tmp_path / "failed" / "abc.json").write_text("{")
    assert "abc.json cannot be read" in store.failures(tmp_path)["abc"]
    (tmp_path / "failed" / "abc.json").write_text("{}")
    assert store.failures(tmp_path)["abc"].endswith("cannot be read: the key 'error' is missing.")
    report.write(tmp_path)


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    finished(tmp_path, {"=1+1": ["a cat"], "@evil": ["a dog"], "-2": ["a bird"], "+3": ["a frog"]})
    page = report.write(tmp_path)
    frame = pd.read_csv(page.with_suffix(".csv"))
    assert set(frame["prompts of"]) == {"All prompts", "'=1+1", "'@evil", "'-2", "'+3"}
    for line in page.with_suffix(".csv").read_text().splitlines():
        assert not line.startswith(("=", "+", "-", "@"))


@pytest.mark.parametrize("reported", [True, False])
def test_a_black_image_is_not_judged(monkeypatch: pytest.MonkeyPatch, reported: bool) -> None:
    pipe = elakit.load("picture-world")
    run_ = elakit.generate(pipe, "a [cat] and a [lion]", seed=1, steps=2, progress=False)
    run_.nsfw = reported
    run_.image = Image.new("RGB", run_.image.size)
    monkeypatch.setattr("elakit.generation.generate", lambda *_, **__: [run_])
    (row,) = generation.generate_unit(Unit("picture-world", "a [cat] and a [lion]", (1,), steps=2))
    assert row["blocked"] is reported
    assert "success" not in row
    assert "neglect" not in row


def test_blocked_images_count_in_no_share() -> None:
    frame = pd.DataFrame(
        {"prompt": list("abc"), "method": "plain", "success": [1, 0, None], "neglect": [0, 1, None]}
        | {"blocked": [False, False, True]}
    )
    found = summary(frame).loc["plain"]
    assert found[["images", "blocked", "success", "neglect"]].tolist() == [3, 1, 0.5, 0.5]
    full = pd.DataFrame({name: [None] * 3 for name in store.SCHEMA.names}).assign(**frame)
    assert "safety checker replaced 1 of 3" in " ".join(report._notes(full, 0))


def test_a_killed_sweep_in_a_container_does_not_block_the_next(tmp_path: Path) -> None:
    units = plan(["a cat and a lion"], [1])
    (tmp_path / "units").mkdir()
    # what a killed process with the same process id left behind
    (tmp_path / "units" / f".{units[0].key}.parquet.{os.getpid()}.part").write_bytes(b"half")
    with ThreadPoolExecutor(1) as pool:
        assert run(units, tmp_path, pool, generate=pretend).generated == 2
    assert len(table(tmp_path)) == 2


def test_every_method_that_is_listed_can_be_planned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "sweep", "methods") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines if "(needs regions" in line} == set(NEED_REGIONS)
    listed = [line.split()[0] for line in lines if "(needs regions" not in line]
    assert listed[0] == "plain"
    assert {"ela", "regional-attention", "attend-and-excite"} <= set(listed)
    units = plan(["a cat"], [1], listed)
    assert [unit.method for unit in units] == listed
    assert all(unit.guidance() is not None for unit in units[1:])
    assert "boxdiff" not in listed
