"""Options that other options switch off, and misspelled ones, are refused at construction."""

from __future__ import annotations

from typing import Any

import pytest
from test_every_method import HALVES

from elakit.errors import SettingError
from elakit.guidance import METHODS, build, method_options


@pytest.mark.parametrize(
    ("name", "options", "inert"),
    [
        ("self-cross", {"weight": 0, "gate": 0.3}, "gate=0.3"),
        ("self-cross", {"refinements": 0, "until": 0.3}, "until=0.3"),
        ("initno", {"guided": 0, "step_size": 10}, "step_size=10"),
        ("initno", {"guided": 0, "refinements": 5}, "refinements=5"),
        ("deleaker", {"cut_image": False, "image_threshold": 2}, "image_threshold=2"),
        ("densediffusion", {"regions": HALVES, "strength": 0, "self_strength": 0, "area": 0}, "area=0"),
        ("bounded-attention", {"regions": HALVES, "guided": 0, "iterations": 3}, "iterations=3"),
        ("bounded-attention", {"regions": HALVES, "guided": 1, "clusters": 2}, "clusters=2"),
        ("bounded-attention", {"regions": HALVES, "iterations": 1, "until": 0.5}, "until=0.5"),
        ("attention-regulation", {"iterations": 1, "step_size": 5}, "step_size=5"),
        ("attention-regulation", {"iterations": 1, "weight_cost": 0}, "weight_cost=0"),
        ("regional-attention", {"regions": HALVES, "layout": "maps"}, "layout='maps'"),
        ("ela", {"regions": HALVES, "anchor.needed": 0.5}, r"anchor\.needed=0\.5"),
        ("ela", {"regions": HALVES, "localize.smooth": 1}, "localize"),
        ("ela", {"localize.binarization": "otsu", "localize.threshold": 0.2}, "threshold=0.2"),
        ("ela", {"localize.binarization": "otsu", "localize.background": "start"}, "background='start'"),
        ("ela", {"localize.quantile": 0.3}, "quantile=0.3"),
    ],
)
def test_an_option_that_another_one_switches_off_is_refused(name: str, options: dict[str, Any], inert: str) -> None:
    with pytest.raises(SettingError, match=inert):
        build(METHODS[name], options)


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelled_option_is_refused_with_the_right_ones(name: str) -> None:
    known = [option.name for option in method_options(METHODS[name])]
    with pytest.raises(SettingError, match=f"has no option '{known[0]}s'.*{known[-1]}"):
        build(METHODS[name], {f"{known[0]}s": 1})
