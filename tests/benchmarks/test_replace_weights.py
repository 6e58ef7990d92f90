"""Weights are replaced by two commands: one installs a trained model, one repeats what depends on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import replace_weights
from benchmarks.replace_weights import PARTS, Task, fingerprint, install, is_done, perform, run, tasks
from elakit.errors import SettingError


def trained(folder: Path) -> Path:
    """Folder that looks like the result of a training."""
    for part in PARTS[1:]:
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(f'{{"part": "{part}"}}')
    (folder / PARTS[0]).write_text('{"parts": 5}')
    return folder


def test_an_installed_model_replaces_all_files_of_its_parts_and_no_others(tmp_path: Path) -> None:
    target = tmp_path / "shipped"
    for name in ("judge/model.safetensors", "vae/of_an_older_edition.json", "README.md"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("old")
    install(trained(tmp_path / "model"), target=target)
    files = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    parts = {f"{part}/config.json": f'{{"part": "{part}"}}' for part in PARTS[1:]}
    assert files == parts | {PARTS[0]: '{"parts": 5}', "judge/model.safetensors": "old", "README.md": "old"}


def test_an_unfinished_training_is_refused_before_anything_is_replaced(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"has no judge\. Name the folder of a finished training"):
        install(trained(tmp_path / "model"), judge=True, target=tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()


def test_a_finished_task_is_not_repeated_until_the_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = tmp_path / "count.txt"
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    save_file({"w": torch.zeros(2)}, shipped / "a.safetensors")
    script = f"open({str(count)!r}, 'a').write('x')"
    monkeypatch.setattr(replace_weights, "tasks", lambda: [Task("one", "a test", (f'python -c "{script}"',))])
    monkeypatch.setattr(replace_weights, "SHIPPED", shipped)
    for _ in range(2):
        run(work=tmp_path / "work")
    assert count.read_text() == "x"
    save_file({"w": torch.ones(2)}, shipped / "a.safetensors")
    run(work=tmp_path / "work")
    assert count.read_text() == "xx"


def test_a_task_that_fails_is_logged_and_not_noted_as_finished(tmp_path: Path) -> None:
    task = Task("broken", "a test", ("python -c \"print('half'); raise SystemExit(3)\"", "python -c 'print(1)'"))
    assert not perform(task, tmp_path, "weights")
    log = (tmp_path / "broken.log").read_text()
    assert "half" in log
    assert log.count("$ ") == 1
    assert not is_done(tmp_path, "broken", "weights")


def test_a_misspelled_task_is_refused_with_the_names_of_all(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"Unknown task 'galery'\. Choose from predictor, sheet, gallery"):
        run(["galery"], work=tmp_path)


def test_every_notebook_has_a_task_and_every_module_of_a_command_exists() -> None:
    every = tasks()
    notebooks = {path.stem for path in (replace_weights.ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks <= {task.name for task in every}
    for command in (command for task in every for command in task.commands):
        words = replace_weights.arguments(command, Path("work"))
        if words[0] == sys.executable:
            path = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1]
            assert (replace_weights.ROOT / path).is_file()


def test_the_fingerprint_is_that_of_the_weights_alone(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(2)}, tmp_path / "a.safetensors")
    before = fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("a card")
    assert fingerprint(tmp_path) == before
