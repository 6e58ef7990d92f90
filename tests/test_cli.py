"""The command line as a new user meets it: help, results, and errors without a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import call

PAIR = "a [cat] and a [lion]"


@pytest.mark.parametrize(
    "words", [["--help"], ["diagnose", "--help"], ["run", "--help"], ["models"], ["lab", "--help"], ["--version"]]
)
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
    assert call(monkeypatch, "diagnose", PAIR, "--seeds", "0,1", "--steps", "2", "--out", str(out)) == 0
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
    assert "already exists" in capsys.readouterr().err


def test_run_takes_the_options_of_generation_and_prints_verdict_and_image(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import elakit

    folder = tmp_path / "run"
    words = [
        "run",
        PAIR,
        "--steps",
        "3",
        "--negative-prompt",
        "a dog",
        "--height",
        "128",
        "--width",
        "128",
        "--scale",
        "3",
    ]
    words += ["--scheduler", "EulerDiscreteScheduler", "--method", "ela", "--set", "ela.anchor.step_size=0.2"]
    assert call(monkeypatch, *words, "--out", str(folder)) == 0
    printed = capsys.readouterr().out
    run = elakit.open_run(folder)
    assert f"Image: {folder / 'image.png'}" in printed
    assert f"Verdict: {run.verdict}" in printed
    wanted = {"negative_prompt": "a dog", "height": 128, "guidance_scale": 3.0, "scheduler": "EulerDiscreteScheduler"}
    assert {name: run.settings[name] for name in wanted} == wanted
    assert run.guidance.options["anchor.step_size"] == 0.2


SETTINGS = ["--negative-prompt", "a dog", "--height", "64", "--width", "128", "--scheduler", "EulerDiscreteScheduler"]


def test_diagnose_takes_the_options_of_generation_and_reports_a_command_that_repeats_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import elakit

    folder, found = tmp_path / "runs", tmp_path / "found.json"
    options = [*SETTINGS, "--set", "ela.anchor.step_size=0.2", "--steps", "2", "--seeds", "0", "--remedies", "none"]
    files = ["--out", str(tmp_path / "report.html"), "--keep", str(folder), "--json", str(found)]
    assert call(monkeypatch, "diagnose", PAIR, *options, *files) == 0
    diagnosis = elakit.open_diagnosis(folder)
    guided = diagnosis.pairs[0].guided
    wanted = {"negative_prompt": "a dog", "height": 64, "width": 128, "scheduler": "EulerDiscreteScheduler"}
    assert {name: guided.settings[name] for name in wanted} == wanted
    assert (guided.image.size, guided.guidance.options["anchor.step_size"]) == ((128, 64), 0.2)
    command = shlex.split(json.loads(found.read_text())["command"])
    assert call(monkeypatch, *command[1:], "--keep", str(folder), "--out", str(tmp_path / "again.html")) == 0
    assert len(list((folder / "runs").glob("*.json"))) == 2  # the same runs, found again


def test_runs_with_another_negative_prompt_or_size_are_not_reused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    short = ["--steps", "1", "--seeds", "0", "--remedies", "none", "--keep", str(tmp_path / "runs")]
    for number, options in enumerate(([], ["--negative-prompt", "a dog"], ["--height", "64"])):
        call(monkeypatch, "diagnose", PAIR, *options, *short, "--out", str(tmp_path / "report.html"))
        assert len(list((tmp_path / "runs" / "runs").glob("*.json"))) == 2 * (number + 1)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--set", "syngen.guided=1"], "the method is ela"),
        (["--height", "0"], "height=0"),
        (["--scheduler", "Eular"], "EulerDiscreteScheduler"),
        (["--method", "elaa", "--set", "elaa.x=1"], "--method elaa"),
    ],
)
def test_diagnose_refuses_wrong_options_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    part: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "diagnose", PAIR, *words) == 2
    assert part in capsys.readouterr().err


def test_lora_weights_change_the_image_and_are_named_in_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import elakit

    peft = pytest.importorskip("peft")
    import torch
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    pipe = elakit.load("picture-world")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = convert_state_dict_to_diffusers(peft.get_peft_model_state_dict(pipe.unet))
    assert all(torch.isfinite(weight).all() for weight in layers.values())
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers)
    for name, options in (("plain", []), ("lora", ["--lora", str(tmp_path / "lora")])):
        assert call(monkeypatch, "run", PAIR, "--steps", "2", *options, "--out", str(tmp_path / f"run-{name}")) == 0
    plain, adapted = elakit.open_run(tmp_path / "run-plain"), elakit.open_run(tmp_path / "run-lora")
    assert (plain.settings["lora"], adapted.settings["lora"]) == (None, str(tmp_path / "lora"))
    assert plain.image.tobytes() != adapted.image.tobytes()


def test_a_folder_whose_name_is_no_text_is_written(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = os.fsdecode(b"run\xff")
    assert call(monkeypatch, "run", PAIR, "--steps", "1", "--out", str(tmp_path / name)) == 0
    assert (tmp_path / name / "image.png").is_file()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--seed", str(2**64)], ["--seed=18446744073709551616", "from 0 to"]),
        (["--steps", "1001"], ["steps=1001", "from 1 to 1000"]),
        (["--height", "0"], ["height=0", "1 or more"]),
        (["--out", "x" * 300], ["too long"]),
        (["--device", "mps"], ["mps"]),
        (["--scheduler", "Eular"], ["scheduler='Eular'", "EulerDiscreteScheduler"]),
        (["--lora", "no/such-weights"], ["LoRA weights 'no/such-weights' cannot be loaded"]),
        (["--method", "ela", "--set", "ela.strength"], ["METHOD.OPTION=VALUE"]),
        (["--method", "ela", "--set", "syngen.guided=1"], ["the method is ela"]),
        (["--method", "ela", "--set", "ela.strength=1"], ["no option 'strength'"]),
        (["--set", "ela.guided=1"], ["plain generation has no regions and no options"]),
        (["--method", "syngen", "--regions", "0,0,1,1"], ["syngen takes no regions", "boxdiff"]),
        (["--method", "boxdiff"], ["boxdiff needs regions"]),
        (["--variant", "fp99"], ["picture-world"]),
    ],
)
def test_run_refuses_wrong_options_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    words: list[str],
    parts: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in words else ["--out", "run"]
    assert call(monkeypatch, "run", PAIR, *words, *out) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert all(part in printed for part in parts), printed
    assert not list(tmp_path.iterdir())


def test_doctor_reports_versions_devices_and_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import elakit

    assert call(monkeypatch, "doctor", "--model", "picture-world") == 0
    printed = capsys.readouterr().out
    assert all(
        part in printed for part in ("torch", "spaCy model", "free disk space", "model picture-world", "complete")
    )
    pipe = elakit.load("picture-world")
    modules = [part for part in pipe.components.values() if hasattr(part, "parameters")]
    count = sum(parameter.numel() for module in modules for parameter in module.parameters())
    stated = float(re.search(r"([\d.]+) million parameters", printed)[1])
    assert stated == pytest.approx(count / 1e6, rel=0.02, abs=1)
    assert call(monkeypatch, "doctor", "--model", "no/such-model") == 2
    assert "not on this machine" in capsys.readouterr().err


def test_lab_of_an_installed_package_copies_the_notebooks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from elakit import lab

    package = tmp_path / "site-packages" / "elakit"
    shipped = package / "_notebooks"
    shipped.mkdir(parents=True)
    for name in ("01.ipynb", "02.ipynb"):
        (shipped / name).write_text("{}")
    calls: list[list[str]] = []
    monkeypatch.setattr(lab, "notebooks_path", lambda: shipped)
    monkeypatch.setattr(lab, "__file__", str(package / "lab.py"))
    monkeypatch.setattr(lab.subprocess, "call", lambda words: calls.append(words) or 0)
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "lab", "--no-browser", "--port", "8890", "--allow-root") == 0
    assert calls[0][1:4] == ["-m", "jupyterlab", "elakit-notebooks"]
    assert calls[0][4:] == [lab.HOOK, "--no-browser", "--port=8890", "--allow-root"]
    (tmp_path / "elakit-notebooks" / "01.ipynb").write_text("mine")
    (tmp_path / "elakit-notebooks" / "02.ipynb").unlink()
    assert call(monkeypatch, "lab") == 0
    assert (tmp_path / "elakit-notebooks" / "01.ipynb").read_text() == "mine"
    assert (tmp_path / "elakit-notebooks" / "02.ipynb").read_text() == "{}"


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["diagnose", ""], ["empty"]),
        (["diagnose", "a [cat and a dog"], ["["]),
        (["diagnose", "under and over"], ["brackets"]),
        (["diagnose", PAIR, "--model", "image-wold"], ["image-wold", "picture-world"]),
        (["diagnose", PAIR, "--steps", "-5"], ["steps=-5", "from 1 to 1000"]),
        (["diagnose", PAIR, "--seeds", "four"], ["--seeds four", "such as 0-3 or 1,3"]),
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
