"""Published answers about images become the shares that the page on evidence defines."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from benchmarks import self_cross_verdicts as benchmark
from elakit.errors import SettingError


def answers(first: bool = True, second: bool = True, mixture: bool = False, **attributes: bool) -> dict[str, bool]:
    return {"A_appear": first, "B_appear": second, "content_mixture": mixture, **attributes}


def written(folder: Path, images: dict[str, list[dict[str, bool]]]) -> Path:
    """Verdicts on animals for each method, seed after seed; the other files have one image, which is right."""
    for method, (name, prefix) in benchmark.FOLDERS.items():
        for group, (kind, attributes) in benchmark.GROUPS.items():
            path = folder / "eval_results" / name / f"{prefix}_{kind}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            shown = images[method] if group == "animals" else [answers(**dict.fromkeys(attributes, True))]
            path.write_text(yaml.safe_dump({f"cat_frog_{seed}": image for seed, image in enumerate(shown)}))
    return folder


def test_an_image_is_right_if_both_appear_with_their_attributes_and_are_not_mixed() -> None:
    asked = ("A_attribute", "B_attribute")
    good = answers(A_attribute=True, B_attribute=True)
    outcomes = {
        "right": good,
        "wrong_attribute": good | {"B_attribute": False},
        "neglect": good | {"B_appear": False, "B_attribute": False},
        "mixture": good | {"content_mixture": True},
    }
    for name, image in outcomes.items():
        found = benchmark.outcome(image, asked)
        assert [kind for kind, true in found.items() if true] == [name]
    assert benchmark.outcome(answers(A_attribute=True), asked) is None


def test_fixed_and_broken_compare_images_of_one_seed(tmp_path: Path) -> None:
    right, wrong = answers(), answers(second=False)
    missing = {"A_appear": True}
    plain = [right, right, wrong, wrong, wrong, right]
    other = [right, wrong, right, right, wrong, missing]
    images = {method: plain if method == "plain" else other for method in benchmark.FOLDERS}
    table = benchmark.summary(benchmark.read(written(tmp_path, images))).set_index(["group", "method"])
    row = table.loc["animals", "InitNO"]
    assert (row["prompts"], row["images"]) == (1, 5)
    assert row["right"] == pytest.approx(3 / 5)
    assert row["fixed"] == pytest.approx(2 / 3)
    assert row["broken"] == pytest.approx(1 / 2)
    assert row["neglect"] == pytest.approx(2 / 5)
    assert (table.loc["all", "InitNO"]["prompts"], table.loc["all", "InitNO"]["right"]) == (3, pytest.approx(5 / 7))
    assert table.loc["animals", "plain"]["right"] == pytest.approx(1 / 2)


def test_a_folder_without_verdicts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="clone of selfcross-guidance"):
        benchmark.read(tmp_path)
