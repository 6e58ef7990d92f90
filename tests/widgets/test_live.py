"""The live panel: words are marked, options read from the methods, a run paused, steered, canceled, and kept."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import elakit
from elakit.errors import ElakitError, PromptError, SettingError
from elakit.guidance import ELA, METHODS, AttendAndExcite, BoxDiff, FromMaps, LatentStep, build
from elakit.plot.image_figures import data_uri
from elakit.widgets.live import Panel
from elakit.widgets.live.controls import Controls
from elakit.widgets.live.frames import frame
from elakit.widgets.live.options import defaults, options, values
from elakit.widgets.live.session import Session
from elakit.widgets.live.words import chips, marks_of, toggled

PAIR = "a [red car] and a [blue bird]"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
ALL = ELA(anchor=LatentStep(guided=1, start=0))  # guides every step
PATIENCE = 60  # seconds that a run may take at most


@pytest.fixture
def panel(pipe: Any) -> Iterator[Panel]:
    """A panel whose method guides all of six steps."""
    panel = elakit.live(pipe, PAIR, seed=1, steps=6, guidance=ALL)
    yield panel
    panel.cancel()
    if panel.state != "failed":
        panel.wait(PATIENCE)


def has_left_half(regions: Any) -> list[bool]:
    """At which steps the first entity of (step, entity, y, x) has exactly the left half."""
    half = np.zeros(regions.shape[2:], bool)
    half[:, : half.shape[1] // 2] = True
    return [bool((each[0] == half).all()) for each in regions.values]


def roles(panel: Panel) -> list[tuple[str, str]]:
    return [(chip["text"], chip["owner"]) for chip in panel._view.words._words if chip["role"]]


def click_word(panel: Panel, at: int) -> None:
    panel._view.words._handle_custom_msg({"click": at}, [])


# -- words ------------------------------------------------------------------------------------------------------------


def test_a_word_becomes_an_entity_then_an_attribute_of_the_next_one_then_neither(pipe: Any) -> None:
    prompt = elakit.parse("a red [car] and a [bird]", pipe)  # words: a red car and a bird
    entity = toggled(prompt, 1)
    assert [each.label for each in entity.entities] == ["red", "car", "bird"]
    attribute = toggled(entity, 1)
    assert marks_of(attribute) == {2: (1,), 5: ()}
    assert attribute.entities[0] == elakit.parse("a [red car] and a [bird]", pipe).entities[0]
    assert toggled(attribute, 1) == prompt


def test_attributes_without_a_noun_go_to_the_next_or_else_to_the_one_before(pipe: Any) -> None:
    prompt = elakit.parse(PAIR, pipe)
    assert marks_of(toggled(prompt, 2)) == {6: (1, 2, 5)}  # red and car are now of the bird
    assert marks_of(toggled(prompt, 6)) == {2: (1, 5, 6)}  # nothing follows: blue and bird are of the car
    with pytest.raises(PromptError, match="at least one entity"):
        toggled(elakit.parse("a [car]", pipe), 1)


def test_what_is_marked_by_hand_is_what_brackets_say(pipe: Any) -> None:
    """A prompt with a split word and one that occurs twice."""
    bare = elakit.parse("red giraffe and red [dog]", pipe)
    by_hand = toggled(toggled(toggled(bare, 1), 0), 0)  # giraffe an entity; the first red an entity, then an attribute
    by_hand = toggled(toggled(by_hand, 3), 3)
    assert by_hand == elakit.parse("[red giraffe] and [red dog]", pipe)


def test_signs_cannot_be_clicked(pipe: Any) -> None:
    shown = {str(chip["text"]): chip["clickable"] for chip in chips(elakit.parse("a [car], a [bird]", pipe))}
    assert shown == {"a": True, "car": True, ",": False, "bird": True}


def test_clicks_on_chips_change_what_is_drawn(panel: Panel) -> None:
    assert roles(panel) == [("red", "car"), ("car", "car"), ("blue", "bird"), ("bird", "bird")]
    click_word(panel, 1)
    assert roles(panel) == [("car", "car"), ("blue", "bird"), ("bird", "bird")]
    panel.start()
    run = panel.wait(PATIENCE)
    assert run is not None
    assert run.prompt.entities[0].attributes == ()


def test_a_prompt_that_cannot_be_read_says_why_and_the_last_run_stays(panel: Panel) -> None:
    panel.start()
    run = panel.wait(PATIENCE)
    panel.prompt = "a [red car and a <b>bird</b>"
    assert panel.prompt is None
    assert isinstance(panel.error, PromptError)
    assert "never closed" in panel._view.message.value
    assert "<b>" not in panel._view.message.value
    assert (panel._view.run.disabled, panel._view.step.disabled) == (True, True)
    with pytest.raises(PromptError, match="never closed"):
        panel.start()
    assert panel.run is run
    panel.prompt = PAIR
    assert (panel.error, panel._view.message.value, panel._view.run.disabled) == (None, "", False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -5), ("seed", 2**53), ("seed", 1.5), ("steps", 0), ("steps", 1001), ("guidance_scale", -1.0)],
)
def test_numbers_out_of_range_are_refused_and_not_replaced_by_others(
    name: str, value: float, panel: Panel, pipe: Any
) -> None:
    before = getattr(panel, name)
    with pytest.raises(SettingError, match=f"{name}={value}: must be a"):
        setattr(panel, name, value)
    assert getattr(panel, name) == before
    with pytest.raises(SettingError, match=f"{name}={value}: must be a"):
        elakit.live(pipe, PAIR, **{name: value})


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_every_option_of_every_method_has_a_control_that_opens_at_its_default(name: str) -> None:
    method = METHODS[name]
    regions = {"regions": [LEFT, RIGHT]} if method.needs_regions else {}
    controls = Controls(method, defaults(method))
    entries = {name: widget.value for name, widget in controls.widgets.items()}
    assert build(method, values(method, entries) | regions) == method(**regions)
    assert all(option.about or option.choices for option in options(method))
    assert all(controls.widgets[option.name].tooltip == option.about for option in options(method))


def test_what_is_typed_reaches_the_method(panel: Panel) -> None:
    controls = panel._view.controls["ela"].widgets
    controls["anchor.step_size"].value, controls["anchor.gradient"].value = 0.2, "raw"
    controls["localize.lock_from"].value, controls["localize.subtract_pedestal"].value = " 2 ", False
    assert panel.guidance == ELA(
        localize=FromMaps(lock_from=2, subtract_pedestal=False),
        anchor=replace(ALL.anchor, step_size=0.2, gradient="raw"),
    )
    panel.options = {"localize.lock_from": None, "anchor.decay": 1.0}
    assert panel.options["localize.lock_from"] is None
    panel.method = "attend-and-excite"
    panel.options = {"refine": ((0.0, 0.1, 3),)}
    assert panel.guidance == AttendAndExcite(refine=((0.0, 0.1, 3),))
    panel._view.controls["attend-and-excite"].widgets["refine"].value = "soon"
    with pytest.raises(SettingError, match=r"AttendAndExcite\(refine='soon'\)"):
        _ = panel.guidance
    with pytest.raises(SettingError, match=r"no option .glow.; choose from "):
        panel.options = {"glow": 1}
    panel.method = "plain"
    assert panel.guidance is None


def test_a_method_that_refuses_its_options_says_so_and_draws_nothing(panel: Panel) -> None:
    panel.options = {"anchor.guided": 2.0}
    panel._view.run.click()
    assert panel.state == "idle"
    assert "LatentStep(guided=2.0): must be a number from 0 to 1" in panel._view.message.value
    panel._view.controls["ela"].back.click()
    assert panel.guidance == ELA()


def test_methods_that_need_regions_say_which_are_missing(panel: Panel) -> None:
    panel.method = "boxdiff"
    panel.draw("car", LEFT)
    panel._view.run.click()
    assert "bird has none" in panel._view.message.value
    panel.draw("bird", RIGHT)
    assert panel.guidance == BoxDiff([LEFT, RIGHT])
    panel.method = "syngen"
    assert "takes no regions" in panel._view.stage._guidance["note"]


def test_a_message_about_a_missing_region_disappears_when_it_is_drawn(panel: Panel) -> None:
    panel.method = "boxdiff"
    panel._view.run.click()
    assert "car, bird have none" in panel._view.message.value
    panel.draw("car", LEFT)
    assert "bird has none" in panel._view.message.value
    panel.draw("bird", RIGHT)
    assert (panel.error, panel._view.message.value) == (None, "")


# -- widgets and Python -----------------------------------------------------------------------------------------------


def test_widgets_show_what_is_set_from_python(panel: Panel) -> None:
    panel.seed, panel.steps, panel.guidance_scale = 9, 3, 2.5
    panel.options = {"anchor.gradient": "raw", "localize.lock_from": 2}
    view = panel._view
    assert (view.text.value, view.seed.value, view.steps.value, view.guidance_scale.value) == (PAIR, 9, 3, 2.5)
    shown = view.controls["ela"].widgets
    assert (shown["anchor.gradient"].value, shown["localize.lock_from"].value) == ("raw", "2")
    panel.method = "a-star"
    assert view.method.value == "a-star"
    assert "a-star" in view.controls
    assert panel.prompt is not None
    panel.prompt = panel.prompt  # a parsed prompt has no brackets
    assert view.text.value == "a red car and a blue bird"


def test_what_is_set_in_widgets_is_seen_from_python(panel: Panel) -> None:
    view = panel._view
    view.seed.value, view.steps.value, view.guidance_scale.value, view.method.value = 9, 3, 2.5, "a-star"
    view.text.value = "a [cat] and a [dog]"
    assert (panel.seed, panel.steps, panel.guidance_scale, panel.method) == (9, 3, 2.5, "a-star")
    assert panel.prompt is not None
    assert [entity.label for entity in panel.prompt.entities] == ["cat", "dog"]
    assert view.text.value == "a [cat] and a [dog]"


def test_a_refused_option_changes_neither_the_method_nor_its_controls(panel: Panel) -> None:
    with pytest.raises(SettingError, match="one of 'normalized', 'raw'"):
        panel.options = {"anchor.decay": 0.25, "anchor.gradient": "glow"}
    assert panel.guidance == ALL
    assert panel._view.controls["ela"].widgets["anchor.decay"].value == ALL.anchor.decay


def test_text_that_arrives_during_a_run_is_refused_and_taken_back(panel: Panel) -> None:
    """A last keystroke may reach the kernel after the field was locked."""
    panel.step()
    panel.wait(PATIENCE)
    panel._view.text.value = "a [cat]"
    assert "a run is in progress" in panel._view.message.value
    assert panel._view.text.value == PAIR
    assert panel.prompt is not None
    assert [entity.label for entity in panel.prompt.entities] == ["car", "bird"]


# -- regions by hand --------------------------------------------------------------------------------------------------


def test_a_box_drawn_in_the_browser_is_what_the_run_is_anchored_to(panel: Panel) -> None:
    panel._view.stage.set_state({"boxes": [list(LEFT), None]})
    assert panel.regions == {"car": LEFT}
    panel.start()
    run = panel.wait(PATIENCE)
    assert run is not None
    assert run.guidance is not None
    assert has_left_half(run.guidance.regions) == [True] * 6


def test_a_box_drawn_in_the_middle_of_a_run_changes_the_region_of_the_next_step(panel: Panel) -> None:
    panel.step(3)
    assert panel.wait(PATIENCE) is None
    assert panel.state == "paused"
    panel._view.stage.set_state({"boxes": [list(LEFT), None]})
    assert "from the next guided step on" in panel._view.stage._guidance["note"]
    panel.step()
    panel.wait(PATIENCE)
    panel._view.stage._handle_custom_msg({"clear": None}, [])
    panel.resume()
    run = panel.wait(PATIENCE)
    assert run is not None
    assert run.guidance is not None
    # steps 0 to 3 were begun before the box was drawn; it was cleared before the move for step 5
    assert has_left_half(run.guidance.regions) == [False, False, False, True, False, False]


def test_boxes_masks_and_what_is_neither(panel: Panel) -> None:
    mask = np.zeros((64, 64), bool)
    mask[:32] = True
    panel.draw(1, mask)
    assert panel.prompt is not None
    panel.draw(panel.prompt.entities[0], LEFT)
    assert panel._view.stage.boxes == [list(LEFT), None]
    assert sum(panel._view.stage._masks[1]["cells"]) == 32 * 32 / 2
    panel._view.stage.set_state({"boxes": [None, list(RIGHT)]})  # drawn over the mask, and the other taken away
    assert panel.regions == {"bird": RIGHT}
    for region, part in (
        ((0.5, 0, 0.2, 1), "not a box within"),
        (mask & False, "mask 0 is empty"),
        ("left", "not a layout"),
    ):
        with pytest.raises(SettingError, match=part):
            panel.draw("car", region)
    with pytest.raises(SettingError, match="Choose from 'car', 'bird'"):
        panel.draw("frog", LEFT)
    with pytest.raises(SettingError, match="2 entities"):
        panel._view.stage.boxes = [None]
    with pytest.raises(SettingError, match="not a box within"):
        panel._view.stage.boxes = [[0.5, 0, 0.2, 1], None]
    assert panel.regions == {"bird": RIGHT}
    panel.clear()
    assert panel.regions == {}


def test_boxes_stay_with_their_entity_when_the_prompt_is_changed(panel: Panel) -> None:
    panel.draw("bird", RIGHT)
    panel.prompt = "a [bird], a [dog] and a [cat]"
    assert panel._view.stage.boxes == [list(RIGHT), None, None]
    panel.prompt = "a [cat]"
    assert panel._view.stage.boxes == [None]
    panel.prompt = PAIR
    assert panel._view.stage.boxes == [None, list(RIGHT)]


def test_a_panel_opens_with_the_regions_of_its_method(pipe: Any) -> None:
    panel = elakit.live(pipe, PAIR, guidance=ELA(regions=[None, RIGHT], anchor=LatentStep(step_size=0.3)))
    assert panel.regions == {"bird": RIGHT}
    assert panel.guidance == ELA(regions=[None, RIGHT], anchor=LatentStep(step_size=0.3))


# -- runs -------------------------------------------------------------------------------------------------------------


def test_the_run_is_the_one_that_generate_draws(panel: Panel, pipe: Any) -> None:
    panel.start()
    run = panel.wait(PATIENCE)
    assert run is not None
    expected = elakit.generate(pipe, PAIR, seed=1, steps=6, guidance=ALL, progress=False)
    assert run.image == expected.image
    assert run.recording is not None
    assert expected.recording is not None
    assert run.recording.maps("car").equals(expected.recording.maps("car"))
    assert (panel.state, panel.runs, run.settings == expected.settings) == ("done", [run], True)
    assert elakit.explore(run).tokens == ["car", "bird"]


def test_the_panel_shows_image_maps_regions_and_losses_of_each_step(panel: Panel) -> None:
    panel.step(2)
    panel.wait(PATIENCE)
    about, cells = panel._view.stage._frame["about"], panel._view.stage._frame["maps"]
    assert (about["step"], about["steps"], about["finished"]) == (1, 6, False)
    assert [each["label"] for each in about["maps"]] == ["car", "bird", "red", "blue"]
    assert len(about["losses"]) == 2  # the moves for steps 0 and 1
    assert len(cells) == 5 * 8 * 8
    panel.step()
    panel.wait(PATIENCE)
    assert panel._view.stage._frame["about"]["image"] != about["image"]
    assert panel._view.stage._frame["maps"] != cells
    panel.resume()
    run = panel.wait(PATIENCE)
    assert run is not None
    shown = panel._view.stage._frame
    assert shown["about"]["finished"]
    owner = np.frombuffer(shown["maps"], np.uint8).reshape(5, 8, 8)[-1]
    assert (owner == (run.regions[-1].values * np.array([1, 2])[:, None, None]).sum(0)).all()


def test_a_preview_is_the_image_that_the_step_predicts(panel: Panel, pipe: Any) -> None:
    """The latents themselves are mostly noise for half of the run."""
    expected = elakit.generate(pipe, PAIR, seed=1, steps=6, guidance=ALL, predicted=True, progress=False)
    assert expected.predicted is not None
    for step in (0, 1):
        panel.step()
        panel.wait(PATIENCE)
        assert panel._view.stage._frame["about"]["image"] == data_uri(expected.predicted[step], 512)


def test_the_verdict_of_a_finished_image_is_shown() -> None:
    run = elakit.generate(elakit.load("picture-world"), PAIR, seed=1, steps=2, progress=False)
    assert frame(run, 1, 2, finished=True).about["verdict"] == str(run.verdict) != ""
    assert frame(run, 1, 2).about["verdict"] == ""


def test_cancel_ends_a_run_within_one_step_and_keeps_it(pipe: Any) -> None:
    panel = elakit.live(pipe, PAIR, steps=500)
    panel.start()
    while panel._session.made < 2:
        time.sleep(0.01)
    made = panel._session.made
    panel.cancel()
    run = panel.wait(PATIENCE)
    assert run is not None
    assert (panel.state, panel.runs) == ("canceled", [run])
    assert made <= run.settings["stopped"] <= made + 2  # one may have ended while we looked, one after
    assert run.recording is not None
    assert run.recording.steps == tuple(range(run.settings["stopped"]))
    assert panel._view.cancel.disabled
    assert not panel._view.run.disabled


def test_a_run_pauses_makes_single_steps_and_goes_on(panel: Panel) -> None:
    panel._view.step.click()
    panel.wait(PATIENCE)
    assert (panel.state, panel._session.made, panel._view.hold.description) == ("paused", 1, "Resume")
    time.sleep(0.05)
    assert panel._session.made == 1
    panel._view.step.click()
    panel.wait(PATIENCE)
    assert panel._session.made == 2
    assert panel._view.text.disabled
    with pytest.raises(SettingError, match="a run is in progress"):
        panel.start()
    with pytest.raises(SettingError, match="a run is in progress"):
        panel.prompt = "a [cat]"
    click_word(panel, 1)
    assert panel.prompt is not None
    assert len(panel.prompt.entities[0].attributes) == 1
    panel._view.hold.click()
    assert panel.wait(PATIENCE) is not None
    assert (panel.state, panel._session.made, panel._view.text.disabled) == ("done", 6, False)
    with pytest.raises(SettingError, match="1 or more"):
        panel.step(0)


def test_a_pipeline_draws_for_one_panel_at_a_time(panel: Panel, pipe: Any) -> None:
    panel.step()
    panel.wait(PATIENCE)
    other = elakit.live(pipe, PAIR, steps=2)
    with pytest.raises(SettingError, match="another panel"):
        other.start()
    panel.cancel()
    panel.wait(PATIENCE)
    other.start()
    assert other.wait(PATIENCE) is not None


def test_a_run_that_fails_shows_why_and_is_kept_as_far_as_it_came(
    panel: Panel, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    panel.start()
    first = panel.wait(PATIENCE)
    calls = []
    forward = pipe.unet.forward

    def fail(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("out of <memory>")
        return forward(*args, **options)

    panel.method = "plain"
    monkeypatch.setattr(pipe.unet, "forward", fail)
    panel.start()
    with pytest.raises(RuntimeError, match="out of <memory>"):
        panel.wait(PATIENCE)
    assert "RuntimeError: out of &lt;memory&gt;" in panel._view.message.value
    assert panel.run is not None
    assert panel.runs == [first, panel.run]
    assert (panel.state, panel.run.settings["stopped"]) == ("failed", 3)
    assert panel.run.recording is not None
    assert panel.run.recording.steps == (0, 1, 2)
    monkeypatch.undo()
    panel.start()
    assert panel.wait(PATIENCE) is not None
    assert panel.error is None


def test_a_run_without_a_preview_is_drawn_all_the_same(panel: Panel, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: Any) -> None:
        raise RuntimeError("no decoder")

    monkeypatch.setattr(panel._session, "on_preview", fail)
    panel.start()
    assert panel.wait(PATIENCE) is not None
    assert panel.state == "done"
    assert "No preview could be shown: no decoder" in panel._view.status.value


def test_slow_previews_are_made_less_often(pipe: Any) -> None:
    """They may take a quarter of the time: after one of 0.2 seconds there is none for 0.6."""
    seen: list[int] = []

    def slow(_run: Any, step: int, _steps: int) -> None:
        seen.append(step)
        time.sleep(0.2)

    session = Session(pipe, on_preview=slow)
    session.start({"prompt": PAIR, "steps": 6})
    assert session.wait(PATIENCE) == "done"
    assert seen[0] == 0
    assert seen[-1] == 5
    assert len(seen) < 6


def test_waiting_ends_only_when_the_panel_shows_the_end(panel: Panel) -> None:
    entered, release = threading.Event(), threading.Event()
    on_state = panel._session.on_state

    def late() -> None:
        if panel.state == "done":
            entered.set()
            release.wait(PATIENCE)
        on_state()

    panel._session.on_state = late
    panel.start()
    assert entered.wait(PATIENCE)
    assert panel._session.wait(0.05) == "done"
    assert panel.runs == []
    release.set()
    assert panel.wait(PATIENCE) is panel.runs[0]


def test_one_entity_and_no_recording_of_it_are_shown(pipe: Any) -> None:
    panel = elakit.live(pipe, "a [cat]", steps=2)
    assert "does not guide a single entity" in panel._view.stage._guidance["note"]
    panel.draw("cat", LEFT)
    assert panel._view.stage._guidance["note"] == ""
    panel.start()
    run = panel.wait(PATIENCE)
    assert run is not None
    assert len(panel._view.stage._frame["about"]["maps"]) == 1


def test_methods_and_prompts_that_a_panel_cannot_take_are_refused(pipe: Any) -> None:
    with pytest.raises(SettingError, match="the panel supports ela"):
        elakit.live(pipe, PAIR, guidance=type("Mine", (ELA,), {"name": "mine"})())
    panel = elakit.live(pipe)
    assert isinstance(panel.error, ElakitError)
    with pytest.raises(SettingError, match="'plain', 'ela'"):
        panel.method = "magic"


def test_a_saved_notebook_shows_the_regions_or_the_run(panel: Panel) -> None:
    def image() -> np.ndarray[Any, Any]:
        data, metadata = panel._repr_mimebundle_()
        assert "application/vnd.jupyter.widget-view+json" in data
        assert data["text/plain"] == repr(panel)
        shown = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
        assert shown.width == 2 * metadata["image/png"]["width"]
        return np.asarray(shown)

    blank = image()
    panel.draw("car", LEFT)
    drawn = image()
    assert (blank != drawn).any()
    panel.start()
    panel.wait(PATIENCE)
    assert image().shape != drawn.shape
