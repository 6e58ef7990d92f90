"""Two models can be compared by eye without knowing which one generated an image."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import audit_models
from elakit.errors import SettingError
from elakit.models import EMBEDDED

HEADER = "image,first_nameable,first_color,second_nameable,second_color,hybrid,extra"


def test_images_of_both_models_are_mixed_and_their_labels_compared(tmp_path: Path) -> None:
    model = str(EMBEDDED["picture-world"].path)
    command = ["draw", str(tmp_path), model, model, "--prompts", "1"]
    drawn = CliRunner().invoke(audit_models.app, command)
    assert drawn.exit_code == 0, drawn.output
    key = json.loads((tmp_path / "key.json").read_text())
    assert sorted(row["model"] for row in key.values()) == ["first", "first", "second", "second"]
    images = {
        (row["prompt"], row["model"]): (tmp_path / "images" / f"{int(n):04d}.png").read_bytes()
        for n, row in key.items()
    }
    assert len(set(images.values())) == 2  # the same noise and the same weights
    assert (tmp_path / "labels.csv").read_text().splitlines() == [HEADER, *(f"{n},,,,,," for n in range(1, 5))]
    assert [path.name for path in (tmp_path / "sheets").iterdir()] == ["0001-0004.png"]
    with pytest.raises(SettingError, match="No prompt is labeled for both models yet"):
        audit_models.compare(tmp_path)
    rows = []
    for number, row in key.items():
        two = " and " in row["prompt"] or " with " in row["prompt"]
        good = int(row["model"] == "second")
        rows.append(f"{number},1,1,{f'{good},1' if two else ','},0,0")
    (tmp_path / "labels.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    printed = CliRunner().invoke(audit_models.app, ["compare", str(tmp_path)]).output
    assert "| one entity: nameable | 1.000 (0.207 to 1.000, n = 1) | 1.000 (0.207 to 1.000, n = 1) | 0 | 0 |" in printed
    assert (
        "| two entities: each nameable | 0.500 (0.095 to 0.905, n = 2) | 1.000 (0.342 to 1.000, n = 2) | 0 | 1 |"
        in printed
    )
    assert (
        "| two entities: image right | 0.000 (0.000 to 0.793, n = 1) | 1.000 (0.207 to 1.000, n = 1) | 0 | 1 |"
        in printed
    )
    (tmp_path / "labels.csv").rename(tmp_path / "kept.csv")
    other = CliRunner().invoke(audit_models.app, ["draw", str(tmp_path), model, str(tmp_path), "--prompts", "1"])
    assert isinstance(other.exception, SettingError)  # images of other weights are not taken for this model's
    assert "another comparison" in str(other.exception)
    (tmp_path / "kept.csv").rename(tmp_path / "labels.csv")
    again = CliRunner().invoke(audit_models.app, command)
    assert isinstance(again.exception, SettingError)
    assert "already contains labels" in str(again.exception)


def test_a_folder_without_an_autoencoder_is_named_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="contains no autoencoder"):
        audit_models.limit(tmp_path / "out", vae=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_was_not_drawn_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Run `draw` first"):
        audit_models.compare(tmp_path)


def test_the_scenes_themselves_show_what_a_model_can_reach_at_most(tmp_path: Path) -> None:
    command = ["limit", str(tmp_path), "--prompts", "1", "--vae", str(EMBEDDED["picture-world"].path / "vae")]
    drawn = CliRunner().invoke(audit_models.app, command)
    assert drawn.exit_code == 0, drawn.output
    key = json.loads((tmp_path / "key.json").read_text())
    assert sorted(row["model"] for row in key.values()) == ["first", "first", "second", "second"]
    images = {
        (row["prompt"], row["model"]): np.asarray(Image.open(tmp_path / "images" / f"{int(n):04d}.png"), float)
        for n, row in key.items()
    }
    for prompt in {row["prompt"] for row in key.values()}:
        error = np.square(images[prompt, "first"] - images[prompt, "second"]).mean()
        assert 0 < error < 255**2 / 10**2.2  # the same scene, but not the same pixels: above 22 dB
