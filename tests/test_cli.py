"""The command line as a new user meets it: help, results, and errors without a traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from commands import call

PAIR = "a [cat] and a [lion]"


@pytest.mark.parametrize("words", [["--help"], ["diagnose", "--help"], ["run", "--help"], ["models"], ["--version"]])
def test_help_is_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert call(monkeypatch, *words) == 0
    assert len(capsys.readouterr().out) > 10


@pytest.mark.parametrize("command", ["run", "diagnose"])
def test_help_shows_how_brackets_are_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    call(monkeypatch, command, "--help")
    assert "a [red car] and a [bird]" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_diagnose_ends_with_a_report_and_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "report.html"
    assert call(monkeypatch, "diagnose", PAIR, "--seeds", "2", "--steps", "3", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert printed.strip().endswith(f"Report: {out}")
    assert "2 seeds" in printed
    assert out.read_text(encoding="utf-8").startswith("<!")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_run_saves_what_open_run_opens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import elakit

    folder = tmp_path / "run"
    assert call(monkeypatch, "run", PAIR, "--method", "ela", "--steps", "3", "--out", str(folder)) == 0
    assert elakit.open_run(folder).guidance.method == "ela"
    assert call(monkeypatch, "run", PAIR, "--steps", "3", "--out", str(folder)) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["diagnose", ""], ["empty"]),
        (["diagnose", "a [cat and a dog"], ["["]),
        (["diagnose", "under and over"], ["brackets"]),
        (["diagnose", PAIR, "--model", "image-wold"], ["image-wold", "picture-world"]),
        (["diagnose", PAIR, "--steps", "-5"], ["steps=-5", "from 1 to 1000"]),
        (["diagnose", PAIR, "--seeds", "0"], ["--seeds=0", "from 1 to"]),
        (["diagnose", PAIR, "--method", "magic"], ["magic", "ela"]),
        (["diagnose", PAIR, "--out", "no/such/folder/r.html"], ["no/such/folder", "there is no folder"]),
        (["diagnose", PAIR, "--device", "tpu9"], ["tpu9"]),
        (["diagnose", PAIR, "--dtype", "int8"], ["int8", "float32"]),
    ],
)
def test_wrong_input_names_the_value_and_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err + printed.out
    assert all(part in printed.err for part in parts), printed.err
    assert not list(tmp_path.iterdir())


def test_a_real_process_prints_no_traceback(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elakit.cli", "diagnose", "   "],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("elakit: ")
    assert len(done.stderr.strip().splitlines()) == 1
