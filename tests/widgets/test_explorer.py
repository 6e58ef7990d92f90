"""The explorer sends what was recorded, refuses invalid settings, and exports a self-contained page."""

from __future__ import annotations

import base64
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny import tiny_pipeline

import elakit
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.guidance import ELA
from elakit.run import Run
from elakit.widgets.explorer.packing import BUDGET, Fit, Source, fit_to
from elakit.widgets.shared.quantize import quantize

PAIR = "a [red car] and a [blue bird]"


def draw(text: str = PAIR, steps: int = 4, length: int = 20, **options: Any) -> Run:
    return elakit.generate(tiny_pipeline(length=length), text, seed=1, steps=steps, progress=False, **options)


@pytest.fixture(scope="module")
def plain() -> Run:
    return draw()


@pytest.fixture(scope="module")
def guided() -> Run:
    return draw(guidance=ELA(), steps=6)


def unpacked(explorer: elakit.Explorer, run: int, layer: int) -> np.ndarray:
    """Probabilities (step, head, word, y, x) of a layer, as the browser is to unpack them."""
    meta, raw = explorer._meta, zlib.decompress(explorer._maps)
    scales, cells = np.frombuffer(raw, "<f4", meta["scales"]), np.frombuffer(raw, np.uint8, offset=4 * meta["scales"])
    about = meta["runs"][run]
    each = about["layers"][layer]
    shape = len(about["steps"]), len(each["heads"]), len(about["words"])
    count = int(np.prod(shape))
    levels = cells[each["at"] : each["at"] + count * each["rows"] * each["columns"]]
    levels = levels.reshape(*shape, each["rows"], each["columns"]).cumsum(0, dtype=np.uint8)
    top = scales[each["scales"] : each["scales"] + count].reshape(shape)
    return levels / 255 * top[..., None, None]


def test_what_is_sent_is_what_was_recorded(plain: Run, guided: Run) -> None:
    explorer = elakit.explore(plain, guided)
    for i, run in enumerate((plain, guided)):
        assert run.recording is not None
        words = [word["label"] for word in explorer._meta["runs"][i]["words"]]
        for number, layer in enumerate(explorer._meta["runs"][i]["layers"]):
            sent = unpacked(explorer, i, number)
            for label in ("car", "red", "<start>"):
                recorded = run.recording.maps(label, layers=layer["name"], size=layer["size"]).isel(token=0).values
                there = sent[:, 0, words.index(label)]
                assert np.abs(there - recorded).max() <= recorded.max() / 500 + 1e-6


@given(arrays(np.float32, (2, 3, 4), elements=st.floats(0, 1, width=32)))
def test_a_byte_a_cell_is_off_by_half_a_level_at_most(maps: np.ndarray) -> None:
    levels, tops = quantize(maps)
    assert np.all(np.abs(levels / 255 * tops[:, None, None] - maps) <= tops[:, None, None] / 509 + 1e-7)


def large(steps: int = 50, layers: int = 4, tokens: int = 10) -> tuple[xr.Dataset, ...]:
    """Sizes of a recording of Stable Diffusion, without its values."""
    dims = ("image", "step", "layer", "head", "y", "x", "token")
    return tuple(
        xr.Dataset({"probability": (dims, np.broadcast_to(np.float32(0), (1, steps, layers, 1, side, side, tokens)))})
        for side in (64, 32, 16)
    )


def test_large_recordings_are_made_to_fit() -> None:
    sources = [Source(large(), tuple((i,) for i in range(8)))] * 2
    fit = fit_to(sources, BUDGET)
    assert fit == Fit(32) or fit.side == 16
    assert sum(source.nbytes(fit) for source in sources) <= BUDGET
    assert fit_to(sources[:1], 10**9) == Fit()
    tight = fit_to(sources, 10**6)
    assert tight.share < 1
    assert tight.positions(50)[0] == 0
    assert tight.positions(50)[-1] == 49


def test_settings_are_checked_and_say_what_there_is(plain: Run) -> None:
    explorer = elakit.explore(plain, step=-1, tokens="bird")
    assert (explorer.step, explorer.tokens, explorer.token) == (3, ["bird"], "bird")
    explorer.token = "car"
    assert explorer.tokens == ["bird", "car"]
    explorer.layer = "down"
    for name, wrong, part in (
        ("step", 4, "0 to 3"),
        ("tokens", ["zebra"], "'bird'"),
        ("tokens", [], "empty"),
        ("layer", "sideways", "'up'"),
        ("size", True, "8"),
        ("normalization", "softmax", "'sum'"),
        ("opacity", 2, "0 to 1"),
        ("speed", 0, "60"),
        ("playing", 1, "True or False"),
    ):
        before = getattr(explorer, name)
        with pytest.raises(SettingError, match=re.escape(part)):
            setattr(explorer, name, wrong)
        assert getattr(explorer, name) == before
    with pytest.raises(SettingError, match="no setting color"):
        elakit.explore(plain, color="red")


def test_what_is_done_in_the_browser_is_known_to_python(plain: Run) -> None:
    explorer = elakit.explore(plain)
    seen: list[tuple[str, Any]] = []
    explorer.observe(lambda change: seen.append((change["name"], change["new"])), ["step", "tokens", "token"])
    explorer.set_state({"step": 1, "tokens": ["car", "bird", "<start>"], "token": "<start>", "playing": True})
    assert (explorer.step, explorer.token, explorer.playing) == (1, "<start>", True)
    for change in (("step", 1), ("token", "<start>"), ("tokens", ["car", "bird", "<start>"])):
        assert change in seen
    with pytest.raises(SettingError, match="0 to 3"):
        explorer.set_state({"step": 99})
    assert explorer.step == 1
    sent = explorer.get_state()
    assert {"step", "tokens", "layer", "size", "head", "normalization", "shared_scale", "playing"} <= set(sent)


def test_the_size_follows_layers_that_do_not_have_it(plain: Run) -> None:
    explorer = elakit.explore(plain)
    assert (explorer.layer, explorer.size) == ("up", 8)
    explorer.layer = "mid"
    assert explorer.size == 4
    explorer.layer = "all"
    assert explorer.size == 4


def test_what_is_left_out_to_stay_small_is_said(plain: Run) -> None:
    whole, small = elakit.explore(plain), elakit.explore(plain, budget=2_000)
    assert not whole._meta["notes"]
    assert len(small._maps) < len(whole._maps)
    assert "2 of 4 steps" in " ".join(small._meta["notes"])
    assert small._meta["choices"]["step"] == [0, 3]
    with pytest.raises(SettingError, match="0, 3"):
        small.step = 1


def test_heads_are_chosen_where_they_were_kept(plain: Run) -> None:
    with pytest.raises(SettingError, match="'mean'"):
        elakit.explore(plain, head=0)
    run = draw(steps=2, record=elakit.RecordSpec(heads="all"))
    explorer = elakit.explore(run, head=1)
    assert explorer._meta["choices"]["head"] == ["mean", 0, 1]
    sent = unpacked(explorer, 0, 0)
    layer = explorer._meta["runs"][0]["layers"][0]
    word = [each["label"] for each in explorer._meta["runs"][0]["words"]].index("car")
    assert run.recording is not None
    recorded = run.recording.sel(head=1, layer=layer["name"]).maps("car").isel(token=0).values
    assert np.abs(sent[:, 1, word] - recorded).max() <= recorded.max() / 500 + 1e-6


@pytest.mark.parametrize(
    ("runs", "error", "part"),
    [
        (lambda run: (), SettingError, "at least one run"),
        (lambda run: (run.image,), SettingError, "not Image"),
        (lambda run: (run.recording,), SettingError, "has no image"),
        (lambda run: (replace(run, recording=None),), RecordingError, "record=True"),
    ],
)
def test_what_cannot_be_explored_says_what_to_do(
    plain: Run, runs: Callable[[Run], tuple[Any, ...]], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        elakit.explore(*runs(plain))


def test_the_page_asks_for_nothing_and_runs_nothing_of_a_prompt(tmp_path: Path) -> None:
    evil = 'a [cat</script><script>alert(1)</script>] and a [bird" onload="x]'
    html = elakit.explore(draw(evil, steps=1, length=77)).to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert 'onload="x' not in html
    # the namespace of SVG is a name, never fetched
    assert not re.findall(r"(?:https?:)?//[\w.]+\.\w+/", html.replace("http://www.w3.org/2000/svg", ""))
    state = json.loads(re.search(r'id="state">(.*?)</script>', html, re.S).group(1))
    assert "alert(1)" in state["_meta"]["runs"][0]["prompt"]
    assert "default-src 'none'" in html
    assert not list(tmp_path.glob(".*"))


def test_a_page_that_cannot_be_written_says_why(plain: Run, tmp_path: Path) -> None:
    for path, part in ((tmp_path, "is a folder"), (tmp_path / "no" / "page.html", "no folder")):
        with pytest.raises(OutputError, match=part):
            elakit.explore(plain).to_html(path)


def test_saved_notebooks_show_a_image(plain: Run, guided: Run) -> None:
    data, metadata = elakit.explore(plain, guided)._repr_mimebundle_()
    image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert image.width == 2 * metadata["image/png"]["width"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert np.asarray(image).std() > 10


def test_the_predicted_image_of_each_step_is_sent_if_the_run_kept_it(plain: Run) -> None:
    kept = draw(predicted=True)
    explorer = elakit.explore(plain, kept)
    assert explorer.predicted is True
    assert elakit.explore(plain).predicted is False
    without, sent = (run["predicted"] for run in explorer._meta["runs"])
    assert without is None
    for uri, image in zip(sent, kept.predicted, strict=True):
        shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
        assert np.array_equal(np.asarray(shown), np.asarray(image))
    explorer.predicted = False
    with pytest.raises(SettingError, match="predicted="):
        explorer.predicted = "no"


def test_one_entity_and_five_can_be_explored() -> None:
    for text in ("a [cat]", "a [cat], a [dog], a [bird], a [car] and a [frog]"):
        explorer = elakit.explore(draw(text, steps=2))
        assert explorer.measure == "bleed"
        assert explorer._meta["runs"][0]["regions"]
        assert len(explorer.tokens) == text.count("[")


def test_a_recording_without_the_entities_has_no_regions_and_says_so() -> None:
    run = draw(steps=2)
    assert run.recording is not None
    explorer = elakit.explore(replace(run, recording=run.recording.sel(token="red")))
    about = explorer._meta["runs"][0]
    assert (explorer.measure, explorer.tokens, about["regions"], about["measures"]) == ("", ["red"], None, {})
    assert "Regions and measures are not available" in about["notes"][0]
    assert "image/png" in explorer._repr_mimebundle_()[0]


def test_runs_of_other_prompts_and_lengths_stand_side_by_side(plain: Run) -> None:
    explorer = elakit.explore([plain, draw("a [cat]", steps=7)])
    assert [run["prompt"] for run in explorer._meta["runs"]] == [plain.prompt.text, "a cat"]
    assert explorer._meta["choices"]["step"] == list(range(7))  # of the run that has most of them
    assert {"car", "bird", "cat"} <= set(explorer._meta["choices"]["tokens"])


def test_runs_of_other_map_sizes_open_with_all_sizes(plain: Run) -> None:
    other = draw(height=48, width=32)
    explorer = elakit.explore(plain, other)
    assert explorer._meta["runs"][1]["layers"][0]["recorded"] == [12, 8]
    assert explorer.size is None
    assert elakit.explore(plain).size == 8
