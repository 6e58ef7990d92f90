"""Settings of methods are chosen on grids of the same size, on development seeds only."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks.tune import evaluate, grid, main, markdown
from elakit.errors import SettingError
from elakit.guidance import ELA, METHODS, build


def test_every_method_without_regions_has_a_grid_of_six_points_that_it_accepts() -> None:
    for name, kind in METHODS.items():
        if kind.needs_regions:
            with pytest.raises(SettingError, match=f"{name} needs regions"):
                grid(name)
            continue
        if name == "regional-prompter":  # it has no options
            with pytest.raises(SettingError, match="no step size"):
                grid(name)
            continue
        points = grid(name)
        assert len({str(build(kind, point)) for point in points}) == len(points) == 6


def test_the_grid_of_a_method_that_chooses_its_images_varies_that_choice_and_holds_the_default() -> None:
    usual = ELA()
    points = grid("ela")
    assert {"separate.step_size": usual.separate.step_size, "anchor.needed": usual.anchor.needed} in points
    assert {point["anchor.needed"] > usual.anchor.needed for point in points} == {True, False}


def test_the_setting_with_most_right_minus_broken_images_comes_first() -> None:
    success = {"plain": "yynn", '{"guided":0.25,"step_size":5.0}': "ynyn", '{"guided":0.5,"step_size":5.0}': "yyyn"}
    table = pd.DataFrame(
        {
            "prompt": "a cat",
            "seed": seed,
            "method": "plain" if options == "plain" else "m",
            "options": "{}" if options == "plain" else options,
            "success": right == "y",
            "seconds": 1.0 if options == "plain" else 1.5,
        }
        for options, images in success.items()
        for seed, right in enumerate(images)
    )
    found = evaluate(table, "m")
    assert found["right"].tolist() == [0.75, 0.5]
    assert found["fixed"].tolist() == [0.5, 0.5]
    assert found["broken"].tolist() == [0.0, 0.5]
    assert found["chosen_by"].tolist() == [0.75, 0.25]
    assert "| **0.5** | **5** | **4** | **0.500** | **0.750** |" in markdown(found, [{"step_size": 5, "guided": 0.5}])


@pytest.mark.parametrize("seeds", ["0,1", "1000"])
def test_settings_are_chosen_on_even_seeds_below_a_thousand(seeds: str) -> None:
    with pytest.raises(SettingError, match="even seeds below 1000"):
        main("ela", seeds=seeds)
