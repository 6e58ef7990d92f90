"""The model of the live panel, without widgets: choices are made and refused, a run is steered, messages disappear."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import elakit.widgets.live
from elakit.errors import ElakitError, PromptError, SettingError
from elakit.guidance import ELA, BoxDiff, LatentStep
from elakit.prompt import Prompt, parse
from elakit.widgets.live import next_run, wording
from elakit.widgets.live.choices import PLAIN, Choices
from elakit.widgets.live.model import PanelModel
from elakit.widgets.live.run_state import RunState

pytestmark = pytest.mark.unit

PAIR = "a [red car] and a [blue bird]"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
ALL = ELA(anchor=LatentStep(guided=1, start=0))  # guides every step
START = Choices(seed=1, steps=6, guidance_scale=3.0)
PATIENCE = 60  # seconds that a run may take at most


@pytest.fixture
def model(pipe: Any) -> Iterator[PanelModel]:
    """A model whose method guides all of six steps."""
    model = PanelModel(pipe, START.with_guidance(ALL).with_text(PAIR, partial(parse, pipe=pipe)))
    yield model
    model.cancel()
    model.session.wait(PATIENCE)


@pytest.fixture
def chosen(prompt: Prompt) -> Choices:
    """Choices with a prompt of a car and a bird."""
    return START.with_prompt(prompt)


def attempt(model: PanelModel, action: Any) -> str:
    """The message shown after a click on a button."""
    try:
        action()
    except ElakitError as error:
        model.refuse(error)
    return wording.message(model.error)


# -- the user's way to a run -------------------------------------------------------------------------------------------


def test_from_a_mistyped_prompt_to_a_run_that_is_steered(model: PanelModel) -> None:
    model.enter_text("a [red car] and a [blue bird")
    assert "never closed" in wording.message(model.error)
    model.enter_text(PAIR)
    assert wording.message(model.error) == ""

    model.choose_method("boxdiff")
    assert "car, bird have none" in attempt(model, model.start)
    model.move_boxes([LEFT, None])
    assert "bird has none" in wording.message(model.error)  # what is still missing
    model.move_boxes([LEFT, RIGHT])
    assert wording.message(model.error) == ""
    assert next_run.guidance(model.choices) == BoxDiff([LEFT, RIGHT])

    model.choose_method("ela")
    model.step(2)
    assert model.session.wait(PATIENCE) == "paused"
    assert model.frame is not None
    assert (model.frame.about["step"], model.frame.about["finished"], model.frame.about["verdict"]) == (1, False, "")
    assert "from the next guided step on" in wording.guidance(model.choices, model.now)["note"]
    model.move_boxes([RIGHT, RIGHT])
    model.pause_or_resume()
    assert model.session.wait(PATIENCE) == "done"
    (run,) = model.runs
    assert run.guidance is not None
    half = np.zeros(run.guidance.regions.shape[2:], bool)
    half[:, : half.shape[1] // 2] = True
    lefts, rights = ([bool((step[0] == mask).all()) for step in run.guidance.regions.values] for mask in (half, ~half))
    assert lefts == [True, True, False, False, False, False]
    assert rights == [False, False, True, True, True, True]
    assert model.frame.about["finished"]


def test_every_change_is_announced_once_and_no_change_is_not(model: PanelModel) -> None:
    seen: list[str] = []
    model.on_choices = lambda: seen.append("choices")
    model.enter_number("seed", 7)
    model.enter_number("seed", 7)
    model.move_boxes([None, None])
    model.choose_method("ela")
    assert seen == ["choices"]
    model.toggle_word(1)
    model.enter_option("ela", "anchor.decay", 0.25)
    model.restore_defaults("ela")
    assert seen == ["choices"] * 4


def test_during_a_run_regions_can_be_changed_and_the_prompt_cannot(model: PanelModel) -> None:
    model.step()
    model.session.wait(PATIENCE)
    before = model.choices.prompt
    assert "a run is in progress" in attempt(model, lambda: model.enter_text("a [cat]"))
    model.toggle_word(1)
    assert model.choices.prompt is before
    model.move_boxes([None, RIGHT])
    assert model.choices.by_hand == {"bird": RIGHT}
    model.clear_regions(1)
    assert model.choices.by_hand == {}


def test_another_prompt_clears_what_is_shown_of_the_last_run(model: PanelModel) -> None:
    model.enter_number("steps", 1)
    model.start()
    model.session.wait(PATIENCE)
    assert model.frame is not None
    model.toggle_word(1)
    model.enter_text("a red car and a blue bird")
    assert model.frame is not None  # only the brackets are gone
    assert model.choices.prompt is not None
    assert model.choices.prompt.entities[0].attributes == ()
    shown = model.frame
    model.enter_prompt(model.choices.prompt)
    assert model.frame is shown
    model.error = RuntimeError("out of memory")  # as of a run that failed
    model.enter_text("a [cat]")
    assert (model.frame, model.error) == (None, None)
    model.frame = shown
    model.enter_prompt(parse("a [dog]", model.session.pipe))
    assert model.frame is None
    assert len(model.runs) == 1


def test_the_bar_of_a_canceled_run_has_the_steps_that_it_was_started_with(model: PanelModel) -> None:
    model.step(2)
    model.session.wait(PATIENCE)
    model.enter_number("steps", 50)  # for the next run
    model.cancel()
    assert model.session.wait(PATIENCE) == "canceled"
    assert model.frame is not None
    assert model.frame.about["steps"] == 6


# -- what is wrong, and why --------------------------------------------------------------------------------------------


def test_all_wrong_inputs_are_named_at_once(chosen: Choices) -> None:
    wrong = chosen.with_method("boxdiff").with_number("guidance_scale", -1.0).with_entry("boxdiff", "share", 2.0)
    found = next_run.problems(wrong.with_region("bird", RIGHT))
    assert {name: re.split("[:.] ", str(problem))[0] for name, problem in found.items()} == {
        "guidance_scale": "guidance_scale=-1.0",
        "options": "BoxDiff(share=2.0)",
        "regions": "boxdiff needs a region for each entity; car has none",
    }
    with pytest.raises(SettingError, match="guidance_scale"):
        next_run.call(wrong)
    assert next_run.problems(chosen) == {}


def test_a_panel_without_a_prompt_asks_for_one() -> None:
    (problem,) = next_run.problems(START).values()
    assert isinstance(problem, PromptError)
    assert "There is no prompt yet" in str(problem)


def test_a_typed_number_out_of_range_starts_no_run(model: PanelModel) -> None:
    model.enter_number("guidance_scale", -1.0)
    assert attempt(model, model.start) == "guidance_scale=-1.0: must be a finite number, 0 or more."
    assert model.now.state == "idle"
    model.enter_number("guidance_scale", 2.0)
    assert model.error is None


def test_an_error_of_a_run_stays_when_a_choice_changes(model: PanelModel) -> None:
    """Only the message about a choice goes away with that choice."""
    model.error = RuntimeError("out of memory")
    model.enter_number("seed", 3)
    assert wording.message(model.error) == "RuntimeError: out of memory"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("anchor.gradient", "glow", "one of 'normalized', 'raw'"),
        ("anchor.decay", "half", "a finite number"),
        ("anchor.every", 1.5, "a whole number"),
        ("localize.subtract_pedestal", 1, "True or False"),
    ],
)
def test_values_that_no_control_can_show_are_refused(option: str, value: Any, said: str, chosen: Choices) -> None:
    with pytest.raises(SettingError, match=f"ELA.{option}={value!r}.: must be {said}"):
        chosen.with_method("ela").with_options({option: value})


def test_regions_that_are_set_as_an_option_are_refused_with_the_way_to_draw_them(chosen: Choices) -> None:
    with pytest.raises(SettingError, match=r"ela: regions cannot be given as an option.*panel\.draw"):
        chosen.with_method("ela").with_options({"regions": [LEFT, LEFT]})
    with pytest.raises(SettingError, match=r"syngen has no option 'regions'"):
        chosen.with_method("syngen").with_options({"regions": [LEFT, LEFT]})


# -- choices -----------------------------------------------------------------------------------------------------------


def test_options_are_kept_while_another_method_is_looked_at(chosen: Choices) -> None:
    raw = chosen.with_method("ela").with_options({"anchor.gradient": "raw"})
    elsewhere = raw.with_method("boxdiff").with_options({"share": 0.5})
    assert elsewhere.options()["share"] == 0.5
    assert elsewhere.with_method("ela").options()["anchor.gradient"] == "raw"
    assert elsewhere.with_defaults("ela").with_method("ela").options()["anchor.gradient"] == "normalized"
    assert elsewhere.with_method(PLAIN).options() == {}


def test_earlier_choices_are_still_there_after_an_action(chosen: Choices) -> None:
    later = chosen.with_region("car", LEFT).with_number("seed", 9).with_word_toggled(1)
    assert (chosen.by_hand, chosen.seed) == ({}, 1)
    assert chosen.prompt is not None
    assert later.prompt is not None
    assert [len(each.prompt.entities[0].attributes) for each in (chosen, later) if each.prompt] == [1, 0]


def test_a_box_replaces_a_mask_and_no_box_leaves_it(chosen: Choices) -> None:
    mask = np.eye(8, dtype=bool)
    masked = chosen.with_region("car", mask).with_region("bird", LEFT)
    assert masked.with_boxes([None, LEFT]) is masked
    assert masked.with_boxes([None, None]).by_hand == {"car": mask}
    assert masked.with_boxes([RIGHT, LEFT]).by_hand == {"car": RIGHT, "bird": LEFT}
    assert masked.with_boxes([RIGHT]) is masked  # from before the prompt was changed


def test_regions_of_a_removed_entity_come_back_with_it(chosen: Choices, pipe: Any) -> None:
    read = partial(parse, pipe=pipe)
    drawn = chosen.with_region("bird", RIGHT).with_text("a [cat]", read)
    assert drawn.regions() == {"cat": None}
    assert drawn.without_regions().with_text(PAIR, read).regions() == {"car": None, "bird": RIGHT}


def test_hints_follow_the_method_and_the_run(chosen: Choices) -> None:
    running = RunState().start().step_made(0)
    notes = {
        (method, now.state): wording.guidance(chosen.with_method(method), now)["note"]
        for method in ("plain", "ela", "boxdiff")
        for now in (RunState(), running)
    }
    assert notes["plain", "idle"].startswith("A plain run takes no regions")
    assert notes["ela", "idle"] == ""
    assert notes["ela", "running"].startswith("Changes apply from the next guided step on")
    assert notes["boxdiff", "idle"] == "BoxDiff needs a region for each entity."
    assert notes["boxdiff", "running"].startswith("BoxDiff keeps the regions it started with")


# -- the house ---------------------------------------------------------------------------------------------------------


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_the_status_says_whether_a_failed_run_is_kept() -> None:
    assert wording.status(RunState(state="failed")) == "Failed; no partial run could be kept."
    kept: Any = object()
    assert wording.status(RunState(state="failed", run=kept)) == "Failed; the partial run is kept."


def test_the_model_imports_neither_widgets_nor_the_view() -> None:
    folder = Path(elakit.widgets.live.__file__).parent
    todo, seen = ["model"], set()
    while todo:
        name = todo.pop()
        seen.add(name)
        used = imports(folder / f"{name}.py")
        assert not {each.partition(".")[0] for each in used} & {"ipywidgets", "anywidget", "traitlets", "plotly"}, name
        near = {each.removeprefix("elakit.widgets.live.").partition(".")[0] for each in used if "widgets.live." in each}
        todo += [each for each in near if (folder / f"{each}.py").is_file() and each not in seen]
    assert {"choices", "session", "run_state", "next_run", "frames"} <= seen
    assert not seen & {"view", "widgets", "controls", "panel"}
