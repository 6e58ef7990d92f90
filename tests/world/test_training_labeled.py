"""Labels that were given by eye teach the judge which shapes a person can name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from elakit.errors import SettingError
from elakit.judge.labels import COLUMNS, named_nouns
from elakit.judge.segmenter import CLASSES
from elakit.resources import data_path
from elakit.world.training.config import read_config
from elakit.world.training.labeled import Labeled, labeled_loss, read_labeled
from elakit.world.vocabulary import NOUNS

CAT, BOWL = (1 + NOUNS.index(noun) for noun in ("cat", "bowl"))


def write(folder: Path, *rows: str) -> None:
    (folder / "images").mkdir()
    for number, gray in ((1, 10), (2, 200)):
        Image.new("RGB", (32, 32), (gray, gray, gray)).save(folder / "images" / f"{number:04d}.png")
    prompts = {"1": "a red cat and a bowl", "2": "a bowl", "3": "a cat"}
    (folder / "key.json").write_text(json.dumps({n: {"prompt": p} for n, p in prompts.items()}))
    (folder / "labels.csv").write_text("\n".join([",".join(COLUMNS), *rows]) + "\n")


def test_labels_are_read_with_the_nouns_of_the_prompt(tmp_path: Path) -> None:
    write(tmp_path, "1,1,0,0,0,1,0", "2,1,1,,,0,1", "3,,,,,,")
    found = read_labeled([tmp_path], 16)
    assert found.images.shape == (2, 3, 16, 16)
    assert found.images.float().mean((1, 2, 3)).tolist() == [10, 200]
    assert found.nouns.tolist() == [[CAT, BOWL], [BOWL, 0]]
    assert found.nameable.tolist() == [[True, False], [True, False]]
    assert (found.hybrid.tolist(), found.extra.tolist()) == ([True, False], [False, True])
    assert found.rows(torch.tensor([1])).nouns.tolist() == [[BOWL, 0]]


def test_labels_without_images_or_images_without_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"labels\.csv cannot be read.*Write the file with"):
        read_labeled([tmp_path], 16)
    write(tmp_path, "3,1,1,,,0,0")
    with pytest.raises(SettingError, match="no image 3"):
        read_labeled([tmp_path], 16)
    (tmp_path / "labels.csv").write_text(",".join(COLUMNS) + "\n1,,,,,,\n")
    with pytest.raises(SettingError, match=r"Fill in labels\.csv in this folder"):
        read_labeled([tmp_path], 16)


def seen(cat: float, spoiled: float, hybrid: float) -> torch.Tensor:
    """Scores of a judge that sees a cat in the left half, and nothing in the right one."""
    scores = torch.zeros(1, CLASSES + 2, 16, 16)
    scores[:, CAT, :, :8] = cat
    scores[:, 0, :, 8:] = 10.0
    scores[:, CLASSES, :, :8], scores[:, CLASSES + 1, :, :8] = hybrid, spoiled
    return scores


@pytest.mark.parametrize("nameable", [True, False])
@pytest.mark.parametrize("hybrid", [True, False])
def test_the_loss_is_smallest_for_a_judge_that_agrees_with_the_label(nameable: bool, hybrid: bool) -> None:
    labels = Labeled(
        torch.zeros(1, 3, 32, 32),
        torch.tensor([[CAT, 0]]),
        torch.tensor([[nameable, False]]),
        torch.tensor([hybrid]),
        torch.tensor([False]),
    )
    losses = {
        (spoiled, mixed): float(labeled_loss(seen(10.0, 4 * spoiled, 4 * mixed), labels))
        for spoiled in (-1, 1)
        for mixed in (-1, 1)
    }
    assert losses[-1 if nameable else 1, 1 if hybrid else -1] == pytest.approx(min(losses.values()))
    if not nameable:  # whether a shape without a name is a hybrid is no question
        assert losses[1, -1] == pytest.approx(losses[1, 1])


def test_a_nameable_thing_must_be_seen_and_nothing_that_was_not_asked_for() -> None:
    def loss(scores: torch.Tensor, nouns: list[int], extra: bool = False) -> float:
        flags = torch.tensor([[True, bool(nouns[1])]])
        images = torch.zeros(1, 3, 32, 32)
        return float(
            labeled_loss(
                scores, Labeled(images, torch.tensor([nouns]), flags, torch.tensor([False]), torch.tensor([extra]))
            )
        )

    clear = seen(10.0, -9.0, -9.0)
    assert loss(clear, [CAT, 0]) < 0.01
    assert loss(clear, [CAT, BOWL]) > 1  # the bowl is not seen
    assert loss(clear, [BOWL, 0]) > loss(clear, [BOWL, 0], extra=True) + 1  # a cat that was not asked for


def test_a_thing_that_the_judge_does_not_see_says_nothing_about_its_pixels() -> None:
    scores = torch.zeros(1, CLASSES + 2, 16, 16)
    scores[:, 0] = 10.0
    scores.requires_grad_(True)
    images, no = torch.zeros(1, 3, 32, 32), torch.tensor([False])
    labels = Labeled(images, torch.tensor([[CAT, BOWL]]), torch.tensor([[False, False]]), no, no)
    labeled_loss(scores, labels).backward()
    assert scores.grad is not None
    assert not scores.grad[:, CLASSES:].any()
    assert np.isfinite(scores.grad.numpy()).all()


def test_the_shipped_labels_are_of_development_seeds_and_not_of_the_audit() -> None:
    folders = [data_path(*name.split("/")) for name in read_config().judge.labels]
    found = read_labeled(folders, 128)
    assert len(found) == 770
    assert found.images.float().std() > 20
    keys = [made for folder in folders for made in json.loads((folder / "key.json").read_text()).values()]
    assert {made["seed"] for made in keys} <= set(range(100, 800))  # the audit has those from 800 on
    assert [len(named_nouns(made["prompt"])) for made in keys] == (found.nouns > 0).sum(1).tolist()
