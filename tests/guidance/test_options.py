"""Options out of range, without effect beside another option, or misspelled are refused at construction."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest
from method_options import HALVES
from tiny import tiny_pipeline

from elakit.errors import SettingError
from elakit.guidance import METHODS, FromMaps, LatentStep, build, method_options
from elakit.guidance.metadata import options_of
from elakit.models import adapter_for

REGIONS: dict[str, Any] = {"regions": HALVES}


def switches(*fields: str) -> list[tuple[str, str, str]]:
    """Methods with the options that have these field names, and the names of the classes that own them."""
    return [
        (name, option.name, option.owner.__name__)
        for name, kind in METHODS.items()
        for option in method_options(kind)
        if option.field_name in fields
    ]


def made(name: str, options: dict[str, Any]) -> Any:
    return build(METHODS[name], (REGIONS if METHODS[name].needs_regions else {}) | options)


@pytest.mark.parametrize("value", [-0.1, float("nan"), "20"], ids=str)
@pytest.mark.parametrize(("name", "option", "owner"), switches("step_size", "guided"))
def test_step_sizes_and_guided_shares_out_of_range_are_named(name: str, option: str, owner: str, value: Any) -> None:
    field = option.rpartition(".")[2]
    with pytest.raises(SettingError, match=rf"^{owner}\({field}={value!r}\): must be "):
        made(name, {option: value})
    if field == "guided":
        with pytest.raises(SettingError, match=rf"^{owner}\(guided=1\.5\): must be "):
            made(name, {option: 1.5})


@pytest.mark.parametrize(
    ("name", "options", "part"),
    [
        ("a-star", {"retention": -0.1}, r"retention=-0\.1"),
        ("attend-and-excite", {"refine": ((0.0, 0.05),)}, "refine=.*largest attention to reach"),
        ("attend-and-excite", {"refine": ((2.0, 0.05, 20),)}, "refine=.*share of the steps"),
        ("attend-and-excite", {"refine": ((0.0, 0.05, 2.5),)}, "refine=.*largest number of updates"),
        ("attend-and-excite", {"refine": ((0.0, 0.05, 20), (0.0, 0.5, 20))}, "refine=.*no share occurs twice"),
        ("attention-regulation", {"iterations": 0}, "iterations=0"),
        ("attention-regulation", {"memory": 2}, "memory=2"),
        ("attention-regulation", {"decay": -1}, "decay=-1"),
        ("attention-regulation", {"share_weight": -1}, "share_weight=-1"),
        ("bounded-attention", {"regions": None}, "regions=.*not a layout"),
        ("bounded-attention", {"clusters": 0}, "clusters=0"),
        ("boxdiff", {"share": 0}, "share=0"),
        ("boxdiff", {"share": -1}, "share=-1.*above 0 and at most 1"),
        ("boxdiff", {"edge": 0.5}, r"edge=0\.5"),
        ("boxdiff", {"regions": None}, "regions=.*one box per entity"),
        ("boxdiff", {"regions": [(0, 0, 2, 1)]}, "regions=.*not a box"),
        ("boxdiff", {"regions": [(0.5, 0, 0.2, 1)]}, "regions=.*left < right"),
        ("conform", {"temperature": 0}, "temperature=0"),
        ("conform", {"temperature": -1}, "temperature=-1.*above 0"),
        ("conform", {"refinements": 2.5}, r"refinements=2\.5"),
        ("deleaker", {"strength": -1}, "strength=-1"),
        ("deleaker", {"averaged": 2}, "averaged=2"),
        ("deleaker", {"cut_text": 1}, "cut_text=1"),
        ("densediffusion", {"regions": None}, "regions=.*not a layout"),
        ("densediffusion", {"strength": -1}, "strength=-1"),
        ("densediffusion", {"area": 2}, "area=2"),
        ("divide-and-bind", {"refine": 3}, "refine=.*total variation to reach"),
        ("divide-and-bind", {"binding": (1.0, 5.0)}, "binding=.*weight of 0 or more"),
        ("divide-and-bind", {"binding": ((0.0, -1.0),)}, "binding=.*weight of 0 or more"),
        ("ebama", {"intensity": -0.5}, "intensity=.*0 or more"),
        ("initno", {"rounds": 0}, "rounds=0"),
        ("initno", {"max_kl": -1}, "max_kl=-1"),
        ("layout-guidance", {"iterations": 0}, "iterations=0"),
        ("layout-guidance", {"regions": None}, "regions=.*one box per entity"),
        ("self-cross", {"gate": "open"}, "gate='open'"),
        ("self-cross", {"refinements": -1}, "refinements=-1"),
        ("spdiffusion", {"steps": 0}, "steps=0"),
        ("spdiffusion", {"cross_threshold": 1.5}, r"cross_threshold=1\.5"),
        ("spdiffusion", {"self_threshold": -1}, "self_threshold=-1"),
        ("syngen", {"lone_nouns": "no"}, "lone_nouns=.*True or False"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, options: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError, match=rf"^{METHODS[name].__name__}\({part}"):
        made(name, options)


@pytest.mark.parametrize(
    ("name", "option"),
    [("syngen", "step_size"), ("syngen", "guided"), ("boxdiff", "share"), ("conform", "temperature"),
     ("attention-regulation", "memory")],
)  # fmt: skip
def test_numbers_of_numpy_become_plain(name: str, option: str) -> None:
    value = getattr(made(name, {option: np.float32(0.5)}), option)
    assert (value, type(value)) == (0.5, float)


@pytest.mark.parametrize(
    ("part", "options", "named"),
    [
        (LatentStep, {"gradient": "adam"}, "gradient='adam'"),
        (LatentStep, {"every": 0}, "every=0"),
        (LatentStep, {"needed": -1}, "needed=-1"),
        (LatentStep, {"outside": 0, "presence": 0, "intrusion": 0, "attributes": 0}, "outside=0"),
        (FromMaps, {"lock_from": -2}, "lock_from=-2"),
        (FromMaps, {"differentiation": "nonsense"}, "differentiation='nonsense'"),
        (FromMaps, {"threshold": float("nan")}, "threshold=nan"),
        (FromMaps, {"min_area": -5}, "min_area=-5"),
        (FromMaps, {"smooth": -1}, "smooth=-1"),
    ],
)
def test_a_part_names_the_option_that_is_out_of_range(part: Any, options: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=re.escape(f"{part.__name__}({named})")):
        part(**options)


@pytest.mark.parametrize(("name", "option", "owner"), switches("size"))
def test_a_size_that_the_model_does_not_have_lists_those_it_has(name: str, option: str, owner: str) -> None:
    layers = adapter_for(tiny_pipeline()).layers()
    with pytest.raises(SettingError, match=r"size=16.*4 or 8 locations.*Set size to one of these numbers"):
        made(name, {option: 16}).select(layers, (8, 8))


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


def test_numbers_of_numpy_are_accepted_and_stored_as_plain_numbers() -> None:
    method = METHODS["attend-and-excite"](step_size=np.float32(10), guided=np.float64(0.25))
    assert (type(method.step_size), method.step_size) == (float, 10.0)
    assert json.loads(json.dumps(options_of(method)))["guided"] == 0.25
