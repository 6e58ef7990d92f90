"""The audit's figures are those that a hand computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from benchmarks import audit
from elakit.errors import SettingError
from elakit.judge.labels import COLUMNS, Label
from elakit.judge.segmenter import Component
from elakit.judge.things import Thing
from elakit.resources import data_path
from elakit.world.scenes import Subject, World, compose

HEADER = ",".join(COLUMNS)


def labels(folder: Path, *rows: str) -> Path:
    path = folder / "labels.csv"
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def test_the_help_page_has_no_markup() -> None:
    page = CliRunner().invoke(audit.app, ["--help"]).output
    assert "Label file" in page
    assert not any(mark in page for mark in ("``", "**", "::"))


def test_kappa_of_a_table_worked_out_by_hand() -> None:
    # 20 both right, 5 judge only, 10 eye only, 15 both wrong: agreement .7, by chance .5 * .6 + .5 * .4 = .5
    eye = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    said = [True] * 25 + [False] * 25
    assert audit.kappa(eye, said) == pytest.approx((0.7 - 0.5) / 0.5)
    low, high = audit.kappa_interval(eye, said)
    assert 0.1 < low < 0.4 < high < 0.65
    assert np.isnan(audit.kappa([True, True], [True, True]))
    assert audit.kappa([True, False], [False, True]) == -1


def test_the_interval_of_kappa_is_wider_if_the_images_of_a_prompt_are_alike() -> None:
    eye = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
    said = [True] * 25 + [False] * 25
    low, high = audit.kappa_interval(eye, said)
    # every image counted four times: the same information, if the copies are one group
    fourfold = [value for value in eye for _ in range(4)], [value for value in said for _ in range(4)]
    grouped = audit.kappa_interval(*fourfold, groups=[str(i) for i in range(50) for _ in range(4)])
    assert grouped == pytest.approx((low, high), abs=0.03)
    alone = audit.kappa_interval(*fourfold)
    assert alone[1] - alone[0] < 0.6 * (high - low)


def test_the_table_counts_both_kinds_of_mistake() -> None:
    lines = audit.agreement([True, True, False, False, False], [True, False, True, False, False])
    text = "\n".join(lines)
    assert "judge and eye agree | 0.600 (0.231 to 0.882, n = 5)" in text
    assert "right by eye | 0.500" in text
    assert "wrong by eye | 0.667" in text
    assert "| eye: right | 1 | 1 |" in text
    assert "| eye: wrong | 1 | 2 |" in text


def test_a_method_that_does_not_exist_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    drawn = CliRunner().invoke(audit.app, ["draw", str(tmp_path / "audit"), "--methods", "plain,elaa"])
    assert isinstance(drawn.exception, SettingError)
    assert "elaa" in str(drawn.exception)
    assert not (tmp_path / "audit").exists()


def test_verdicts_are_read_as_strictly_as_labels(tmp_path: Path) -> None:
    path, header = tmp_path / "verdicts.csv", ",".join((*audit.ORIGIN, *COLUMNS[1:]))
    with pytest.raises(SettingError, match="Run `judge` first"):
        audit.read_verdicts(path)
    path.write_text(f"{header}\n3,a cat,ela,800,1,0,,,0,1\n")
    label = Label((True,), (False,), hybrid=False, extra=True)
    assert audit.read_verdicts(path) == {3: audit.Judged("a cat", "ela", 800, label)}
    path.write_text(f"{header}\n3,a cat,ela,none,1,0,,,0,1\n")
    with pytest.raises(SettingError, match=r"verdicts\.csv, line 2: seed='none': must be a whole number.*Run `judge`"):
        audit.read_verdicts(path)
    path.write_text(f"{header}\n3,a cat,ela,800,2,0,,,0,1\n")
    with pytest.raises(SettingError, match=r"verdicts\.csv, line 2: first_nameable='2': must be 0 or 1"):
        audit.read_verdicts(path)


def test_two_sets_of_labels_are_compared_column_by_column(tmp_path: Path) -> None:
    first = labels(tmp_path, "1,1,1,1,1,0,0", "2,1,1,0,0,0,0", "3,1,0,1,1,0,1", "4,1,1,,,0,0")
    again = tmp_path / "again.csv"
    again.write_text("\n".join([HEADER, "3,1,1,0,0,0,1", "1,1,1,1,1,1,0", "4,1,1,,,0,0"]) + "\n")
    result = CliRunner().invoke(audit.app, ["repeat", str(first), str(again)])
    assert result.exit_code == 0, result.output
    assert "2 pairs" in result.output
    assert "1 single things" in result.output
    assert "| nameable, each entity | 3 of 4 (0.750) |" in result.output
    assert "| color, each entity nameable to both | 2 of 3 (0.667) |" in result.output
    assert "| hybrid | 1 of 2 (0.500) |" in result.output
    assert "| right | 1 of 2 (0.500) |" in result.output
    again.write_text(HEADER + "\n9,1,1,,,0,0\n")
    with pytest.raises(SettingError, match="Label some images of one file again"):
        audit.repeat(first, again)


def test_disagreements_are_listed_with_their_reason(tmp_path: Path) -> None:
    labels(tmp_path, "1,1,1,0,1,0,0", "2,1,1,1,1,0,0", "3,1,1,1,1,0,0", "4,1,1,1,0,1,0")
    verdicts = ["1,1,1,1,0,0", "1,1,0,0,0,0", "1,1,1,1,1,0", "1,1,1,1,0,0"]
    rows = [f"{number},a cat and a dog,ela,800,{row}" for number, row in enumerate(verdicts, 1)]
    header = ",".join((*audit.ORIGIN, *COLUMNS[1:]))
    (tmp_path / "verdicts.csv").write_text("\n".join([header, *rows]) + "\n")
    printed = CliRunner().invoke(audit.app, ["agree", str(tmp_path)]).output
    assert "| judge: right, eye: wrong | not nameable | 1 | 1 |" in printed
    assert "| judge: right, eye: wrong | wrong color | 1 | 4 |" in printed
    assert "| judge: right, eye: wrong | hybrid | 1 | 4 |" in printed
    assert "| judge: wrong, eye: right | not nameable | 1 | 2 |" in printed
    assert "| judge: wrong, eye: right | wrong color | 0 |  |" in printed
    assert "| judge: wrong, eye: right | hybrid | 1 | 3 |" in printed


def test_images_are_compared_with_the_judge_of_today(tmp_path: Path) -> None:
    # a clean pair that the judge accepts, a lone lion that it cannot accept for a pair, and a single apple
    world, rng = World(artists=("noto",), backgrounds=("plain",)), np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    pair = compose((Subject("lion"), Subject("apple", "green")), world, rng, "row")
    for number, scene in ((1, pair), (2, compose((Subject("lion"),), world, rng)), (3, pair)):
        Image.fromarray(scene.image).save(tmp_path / "images" / f"{number:04d}.png")
    prompts = {1: "a lion and a green apple", 2: "a lion and a green apple", 3: "a green apple"}
    key = {number: {"prompt": prompt, "method": "plain", "seed": 0} for number, prompt in prompts.items()}
    (tmp_path / "key.json").write_text(json.dumps(key))
    labels(tmp_path, "1,1,1,1,1,0,0", "2,1,1,0,0,0,0", "3,1,1,,,0,1")
    with pytest.raises(SettingError, match="Run `judge` first"):
        audit.agree(tmp_path)
    judged = CliRunner().invoke(audit.app, ["judge", str(tmp_path)])
    assert judged.exit_code == 0, judged.output
    assert "3 verdicts on 2 different images" in judged.output
    assert (tmp_path / "verdicts.csv").read_text().splitlines()[1] == "1,a lion and a green apple,plain,0,1,1,1,1,0,0"
    verdicts = (tmp_path / "verdicts.csv").read_bytes()
    by_folder = CliRunner().invoke(audit.app, ["judge", str(tmp_path), "--model", str(data_path("picture-world"))])
    assert (by_folder.exit_code, (tmp_path / "verdicts.csv").read_bytes()) == (0, verdicts)
    result = CliRunner().invoke(audit.app, ["agree", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "single things: nameable by eye | 1.000" in result.output
    assert "single things: nameable by the judge | 1.000" in result.output
    assert "plain: right by the judge | 0.500" in result.output
    assert "judge and eye agree | 1.000" in result.output
    labels(tmp_path, "3,1,1,1,1,0,1")
    wrong = CliRunner().invoke(audit.app, ["agree", str(tmp_path)])
    assert isinstance(wrong.exception, SettingError)
    assert "1 entity, but its row has labels for 2." in str(wrong.exception)


def test_thresholds_are_compared_on_one_prediction_per_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "images").mkdir()
    for number in (1, 2, 3, 4):
        Image.new("RGB", (32, 32), (9, 9, number)).save(tmp_path / "images" / f"{number:04d}.png")
    prompts = {1: "a lion and an apple", 2: "a lion and an apple", 3: "a cat and a dog", 4: "a cat"}
    key = {number: {"prompt": prompt, "seed": 0} for number, prompt in prompts.items()}
    (tmp_path / "key.json").write_text(json.dumps(key))
    labels(tmp_path, "1,1,1,1,1,0,0", "2,1,1,0,1,0,0", "3,1,1,1,1,1,0", "4,1,1,,,0,0")
    # (hybrid, unrecognizable) of the second thing: the labels ask for thresholds .2 to .5 and .3 to .7
    scores = {1: ("apple", 0.15, 0.25), 2: ("apple", 0.15, 0.75), 3: ("dog", 0.55, 0.25)}
    seen = []

    def components(image: Image.Image, model: Path | None) -> list[Component]:
        number = image.getpixel((0, 0))[2]
        seen.append((number, model))
        noun, mixed, unrecognizable = scores[number]
        first, second = np.zeros((2, 32, 32), bool)
        first[:, :16], second[:, 16:] = True, True
        beside = "lion" if noun == "apple" else "cat"
        one = Thing(beside, first, 0.9, "brown"), Thing(noun, second, 0.9, "red")
        blobs = frozenset({1})
        return [
            Component(thing=one[0], mixed=0.05, unrecognizable=0.05, second="cow", blobs=blobs),
            Component(thing=one[1], mixed=mixed, unrecognizable=unrecognizable, second="cow", blobs=blobs),
        ]

    monkeypatch.setattr(audit, "find_components", components)
    result = CliRunner().invoke(audit.app, ["thresholds", str(tmp_path), "--model", "elsewhere"])
    assert result.exit_code == 0, result.output
    assert seen == [(number, Path("elsewhere")) for number in (1, 2, 3)]  # pairs, each once
    rows = [line.strip("| ").split(" | ") for line in result.output.splitlines() if line.startswith("| 0.")]
    assert len(rows) == 81
    best = {(float(row[0]), float(row[1])) for row in rows if row[-1] == "best"}
    assert best == {(m, u) for m in (0.2, 0.3, 0.4, 0.5) for u in (0.3, 0.4, 0.5, 0.6, 0.7)}
    assert "| 0.3 | 0.5 | 1.000 | 1.000 (1 of 1) | 1.000 (2 of 2) | best |" in result.output
    assert "| 0.6 | 0.5 | 0.400 | 0.500 (1 of 2) | 1.000 (1 of 1) |  |" in result.output
    assert "| 0.1 | 0.1 | 0.000 | no image | 0.667 (2 of 3) |  |" in result.output
    assert "Thresholds 0.3 and 0.5 (of the built-in judge): kappa 1.000" in result.output


def test_thresholds_are_not_chosen_on_the_seeds_of_the_audit(tmp_path: Path) -> None:
    (tmp_path / "key.json").write_text(json.dumps({"1": {"prompt": "a cat and a dog", "seed": 800}}))
    with pytest.raises(SettingError, match=r"image 1: seed=800: must be a whole number from 0 to 799\. The"):
        audit.thresholds([tmp_path])
    (tmp_path / "key.json").write_text(json.dumps({"1": {"prompt": "a cat and a dog", "seed": 100}}))
    labels(tmp_path, "1,,,,,,")
    with pytest.raises(SettingError, match="no image of a pair is labeled"):
        audit.thresholds([tmp_path])


def test_sheets_and_the_label_file_tell_nothing_of_method_or_verdict(tmp_path: Path) -> None:
    out = tmp_path / "audit"
    command = ["draw", str(out), "--pairs", "1", "--singles", "1", "--methods", "plain,ela"]
    drawn = CliRunner().invoke(audit.app, command)
    assert drawn.exit_code == 0, drawn.output
    key = json.loads((out / "key.json").read_text())
    assert sorted(row["method"] for row in key.values()) == ["ela", "plain", "plain"]
    assert all(row["seed"] < 1000 for row in key.values())
    assert (out / "labels.csv").read_text().splitlines() == [HEADER, "1,,,,,,", "2,,,,,,", "3,,,,,,"]
    assert [path.name for path in (out / "sheets").iterdir()] == ["0001-0003.png"]
    assert len(list((out / "images").iterdir())) == 3
    again = CliRunner().invoke(audit.app, ["draw", str(out)])
    assert isinstance(again.exception, SettingError)
    assert audit.plan(1, 1) != audit.plan(1, 1, first_seed=801)
    for number, job in enumerate(audit.plan(1, 1, ["plain", "ela"]), 1):
        assert key[str(number)] == dict(zip(("prompt", "method", "seed"), job, strict=True))
    audit.judge_images(out)
    with pytest.raises(SettingError, match="No image is labeled yet"):
        audit.agree(out)
    # a draw that was interrupted keeps the images that it made, and refuses to be continued as another draw
    (out / "labels.csv").unlink()
    (out / "images" / "0003.png").unlink()
    made = [(out / "images" / name).stat().st_mtime_ns for name in ("0001.png", "0002.png")]
    other = CliRunner().invoke(audit.app, [*command, "--first-seed", "801"])
    assert isinstance(other.exception, SettingError)
    assert "another draw" in str(other.exception)
    assert CliRunner().invoke(audit.app, command).exit_code == 0
    assert [(out / "images" / name).stat().st_mtime_ns for name in ("0001.png", "0002.png")] == made
    assert (out / "images" / "0003.png").exists()
    assert "Label file" in CliRunner().invoke(audit.app, ["--help"]).output
