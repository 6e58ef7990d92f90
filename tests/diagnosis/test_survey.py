"""Surveys: one page per prompt, the summary, resuming after a kill, and prompts that cannot be parsed."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import pytest
from commands import call, surveys_in_this_process
from pages import Page

from elakit.cli import main
from elakit.diagnosis.survey import diagnose_many, plan_cases, table
from elakit.diagnosis.survey.summary import write
from elakit.errors import OutputError, SettingError

EVIL = "a <b>[car]</b> and a [bird]"
PROMPTS = ["a [bear] and a [blue clock]", "a [cat", EVIL, "a [cat] and a [frog]"]


def command(words: list[str]) -> None:
    sys.argv = ["elakit", *words]
    main()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A survey whose processes were killed after its first prompt, resumed in this process."""
    place = tmp_path_factory.mktemp("survey")
    prompts, out = place / "prompts.txt", place / "out"
    prompts.write_text("\n".join(PROMPTS), encoding="utf-8")
    words = ["diagnose", "--prompts", str(prompts), "--out", str(out), "--seeds", "0", "--steps", "1"]
    words += ["--workers", "1", "--remedies", "swapped"]
    # a copy of this process, which has imported torch; the worker that it starts is a process like any other
    first = get_context("fork").Process(target=command, args=(words,))
    first.start()
    deadline = time.monotonic() + 540
    while not list((out / "units").glob("*.parquet")) and time.monotonic() < deadline and first.is_alive():
        time.sleep(0.05)
    first.kill()
    first.join()
    assert first.exitcode == -signal.SIGKILL  # not ended by itself
    finished = {path: path.stat().st_mtime_ns for path in (out / "units").glob("*.parquet")}
    assert finished
    with surveys_in_this_process(), pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said:
        assert call(patch, *words) == 1  # one prompt cannot be read
    assert "3 of 4 prompts are diagnosed" in said.getvalue()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished  # not generated again
    return out


def test_every_prompt_has_a_row_and_every_finished_prompt_a_page(folder: Path) -> None:
    found = table(folder, PROMPTS)
    assert found["prompt"].tolist() == PROMPTS
    assert found["error"].notna().tolist() == [False, True, False, False]
    assert "never closed" in found["error"][1]
    for page in found["page"].dropna():
        assert (folder / page).read_text(encoding="utf-8").startswith("<!doctype html>")
    # what the killed process had half written is left under a name that nothing reads
    assert all(path.name.startswith(".") for path in folder.rglob("*.part"))


def test_the_tables_are_the_same_in_every_format(folder: Path) -> None:
    found = table(folder, PROMPTS)
    csv, parquet = pd.read_csv(folder / "summary.csv"), pd.read_parquet(folder / "summary.parquet")
    rows = json.loads((folder / "summary.json").read_text())
    for name in ("prompt", "best", "page"):
        assert found[name].fillna("").tolist() == csv[name].fillna("").tolist() == parquet[name].fillna("").tolist()
        assert [row[name] or "" for row in rows] == found[name].fillna("").tolist()
    told = [json.loads(path.read_text()) for path in (folder / "cases").glob("*.json")]
    finished = found[found["error"].isna()].set_index("prompt")["bleed"].to_dict()
    assert {one["given"]: one["plain"]["bleed"] for one in told} == pytest.approx(finished)
    tried = pd.read_parquet(folder / "remedies.parquet")
    assert set(tried["name"]) <= {"ela", "swapped"}


def test_the_summary_runs_no_script_and_links_to_the_pages(folder: Path) -> None:
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert not page.scripts
    links = [link["href"] or "" for link in page.all("a")]
    assert len(links) == 3
    assert all((folder / link).is_file() for link in links)
    assert "a <b>car</b> and a bird" in page.text.replace("[", "").replace("]", "")
    assert not page.all("b")
    assert "never closed" in page.text
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)


def test_unfinished_prompts_are_listed(folder: Path) -> None:
    page = write(folder, [*PROMPTS, "a [dog]"])
    try:
        assert "Not diagnosed yet" in page.read_text(encoding="utf-8")
    finally:
        write(folder, PROMPTS)


def test_wrong_settings_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no prompt"):
        diagnose_many([], tmp_path / "out")
    with pytest.raises(SettingError, match="no remedy 'magic'"):
        diagnose_many(["a [cat]"], tmp_path / "out", remedies=["magic"])
    with pytest.raises(SettingError, match="more than once"):
        plan_cases(["a [cat]"], [1, 1])
    assert not (tmp_path / "out").exists()
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="do not belong to a survey"):
        diagnose_many(["a [cat]"], tmp_path)
