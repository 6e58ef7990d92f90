"""The labels of the blind audit are complete, belong to the images that `draw` makes, and support the model card."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import audit
from elakit.judge.labels import read_labels

ROOT = Path(__file__).parents[2]
AUDIT = ROOT / "benchmarks" / "audits" / "second-edition"


def printed(*arguments: str) -> list[str]:
    result = CliRunner().invoke(audit.app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


def test_every_image_of_the_draw_is_labeled_and_judged() -> None:
    labels, verdicts = read_labels(AUDIT / "labels.csv"), audit.read_verdicts(AUDIT / "verdicts.csv")
    jobs = audit.plan()
    assert list(labels) == list(verdicts) == list(range(1, len(jobs) + 1))
    assert [verdict[:3] for verdict in verdicts.values()] == jobs
    assert max(seed for _, _, seed in jobs) < 1000
    for number, label in labels.items():
        entities = len(re.split(" and | with ", jobs[number - 1][0]))
        assert len(label.nameable) == len(label.color) == entities, number
    assert sum(len(label.nameable) == 1 for label in labels.values()) == 100


def test_sixty_images_are_labeled_twice() -> None:
    labels, again = read_labels(AUDIT / "labels.csv"), read_labels(AUDIT / "again.csv")
    assert len(again) == 60
    assert all(len(labels[number].nameable) == len(label.nameable) for number, label in again.items())


def test_the_tables_of_the_model_card_are_those_that_the_commands_print() -> None:
    card = (ROOT / "data" / "picture-world" / "README.md").read_text(encoding="utf-8")
    section = card.split("## Blind audit\n")[1].split("\n## ")[0]
    lines = printed("agree", str(AUDIT)) + printed("repeat", str(AUDIT / "labels.csv"), str(AUDIT / "again.csv"))
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 30
    assert [row for row in rows if row not in lines] == []


@pytest.mark.parametrize("page", ["README.md", "docs/evidence.md", "data/picture-world/README.md"])
def test_figures_in_the_prose_are_those_that_the_command_prints(page: str) -> None:
    lines = "\n".join(printed("agree", str(AUDIT)))
    share = float(re.search(r"right, right by eye \| ([\d.]+)", lines)[1])
    kappa = re.search(r"Cohen's kappa \| 0([\d.]+)", lines)[1]
    text = " ".join((ROOT / page).read_text(encoding="utf-8").split())
    assert 0.45 < share < 0.55
    assert "half of the images of pairs that" in text
    if page != "README.md":
        assert f"{share:.3f}".lstrip("0") in text
        assert f"kappa {kappa}" in text
