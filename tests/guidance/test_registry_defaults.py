"""Defaults of methods are their authors', and one table of the documentation lists every exception."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from elakit.guidance import METHODS, method_options

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "guide.md"
OURS = {"ela", "regional-attention"}  # the paper leaves ELA's settings open; the other method is ours
WHAT, WHERE = {"regions"}, {"layers", "size"}  # what the user gives, and layers, which are the authors' by default
NONE = "none is given"
REFINED = ((0.0, 0.05, 20), (0.2, 0.5, 20), (0.4, 0.8, 20))

# Values of the released codes, or of the papers where there is no code; steps are shares of the authors' number.
AUTHORS: dict[str, dict[str, Any]] = {
    "attend-and-excite": {"step_size": 20, "guided": 0.5, "refine": REFINED, "normalize_eot": "True for SD 2.x"},
    "syngen": {"step_size": 20, "guided": 0.5, "lone_nouns": False},
    "divide-and-bind": {
        "step_size": 20,
        "guided": 0.5,
        "binding": ((0.0, 1.0), (0.2, 5.0), (0.4, 10.0)),
        "refine": ((0.0, 0.05, 50), (0.2, 0.2, 20), (0.4, 0.3, 20)),
        "variation": "released",
    },
    "a-star": {"step_size": NONE, "guided": 1, "segregation": 1, "retention": 1},
    "ebama": {"step_size": 20, "guided": 26 / 50, "intensity": 0.5},
    "conform": {"step_size": 20, "guided": "0.6 in the notebook", "refinements": 20, "temperature": 0.5},
    "self-cross": {
        "step_size": 20,
        "guided": "0.8 for SD 2.1",
        "refinements": 20,
        "until": 0.2,
        "top": 16,
        "weight": 1,
        "gate": 0.5,
        "clean": 0.1,
    },
    "initno": {
        "learning_rate": 0.01,
        "rounds": 5,
        "iterations": 10,
        "last_iterations": 50,
        "stop_cross": 0.2,
        "stop_conflict": 0.3,
        "max_kl": 0.001,
        "step_size": 20,
        "guided": 0.5,
        "refinements": 20,
    },
    "deleaker": {
        "strength": 1.2,
        "threshold": 1,
        "image_threshold": 1,
        "cut_text": True,
        "cut_image": True,
        "start": 0.31,  # from block 18 of 57
        "average_from": 0.2,  # from block 12 of 57
        "averaged": 12 / 20,
        "guided": 1,
    },
    "predicated-diffusion": {
        "step_size": 20,
        "guided": 0.5,
        "refinements": 5,
        "existence": 0.1,
        "separation": 0.3,
    },
    "spdiffusion": {"steps": 2, "cross_threshold": 0.9, "self_threshold": 0.1, "guided": 1},
    "regional-prompter": {},
    "attention-regulation": {
        "step_size": 100,
        "iterations": 20,
        "guided": 25 / 50,
        "share_weight": 80,
        "weight_cost": 0.09,
        "memory": 0.25,
        "decay": 0.99,
    },
    "focus": {"strength": "1 in the script, 10 in the notebook of SD 3.5", "guided": 1},
    "layout-guidance": {"step_size": 30, "guided": 10 / 50, "iterations": 5, "until": 0.2},
    "boxdiff": {
        "step_size": 20,
        "guided": 0.5,
        "share": 0.2,
        "edge": 1,
        "refine": REFINED,
        "normalize_eot": "True for SD 2.x",
    },
    "bounded-attention": {
        "step_size": "18 for SDXL",
        "last_step_size": "5 for SDXL",
        "guided": 15 / 50,
        "iterations": 5,
        "until": 0.2,
        "cross": 1.5,
        "own": 0.5,
        "clusters": 3,
    },
    "densediffusion": {"strength": 1, "self_strength": 0.3, "area": 1, "guided": 0.3},
}


def defaults(name: str) -> dict[str, Any]:
    """Options of a method that its authors have set, with their defaults here."""
    return {option.name: option.default for option in method_options(METHODS[name]) if option.name not in WHAT | WHERE}


def test_the_settings_of_all_authors_are_known() -> None:
    assert {name: set(defaults(name)) for name in METHODS if name not in OURS} == {
        name: set(values) for name, values in AUTHORS.items()
    }


def test_one_table_lists_every_default_that_is_not_the_authors() -> None:
    expected = {
        (f"{name}.{option}", str(value), str(AUTHORS[name][option]))
        for name in AUTHORS
        for option, value in defaults(name).items()
        if value != AUTHORS[name][option]
    }
    text = PAGE.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+\.\w+)` \| ([^|]+) \| ([^|]+) \|", text, flags=re.M)
    assert set(rows) == expected
    assert len(rows) == len(expected)
