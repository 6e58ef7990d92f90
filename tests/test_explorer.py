"""The explorer sends what was recorded, refuses what is not there, and makes a page that needs nothing but itself."""

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
from elakit.explorer.packing import BUDGET, Fit, Source, fit_to, quantise
from elakit.generate import Run
from elakit.guidance import ELA

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
    levels, tops = quantise(maps)
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
        ("normalisation", "softmax", "'sum'"),
        ("opacity", 2, "0 to 1"),
        ("speed", 0, "60"),
        ("playing", 1, "True or False"),
    ):
        before = getattr(explorer, name)
        with pytest.raises(SettingError, match=re.escape(part)):
            setattr(explorer, name, wrong)
        assert getattr(explorer, name) == before
    with pytest.raises(SettingError, match="no setting colour"):
        elakit.explore(plain, colour="red")


@pytest.mark.parametrize(
    ("runs", "error", "part"),
    [
        (lambda run: (), SettingError, "at least one run"),
        (lambda run: (run.image,), SettingError, "not Image"),
        (lambda run: (run.recording,), SettingError, "has no picture"),
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


def test_saved_notebooks_show_a_picture(plain: Run, guided: Run) -> None:
    data, metadata = elakit.explore(plain, guided)._repr_mimebundle_()
    picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
    assert picture.width == 2 * metadata["image/png"]["width"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert np.asarray(picture).std() > 10


def test_one_entity_and_five_and_none_can_be_explored() -> None:
    for text, measures in (("a [cat]", True), ("a [cat], a [dog], a [bird], a [car] and a [frog]", True)):
        explorer = elakit.explore(draw(text, steps=2))
        assert bool(explorer.measure) == measures
        assert len(explorer.tokens) == text.count("[")


def test_runs_of_other_prompts_and_lengths_stand_side_by_side(plain: Run) -> None:
    explorer = elakit.explore([plain, draw("a [cat]", steps=7)])
    assert [run["prompt"] for run in explorer._meta["runs"]] == [plain.prompt.text, "a cat"]
    assert explorer._meta["choices"]["step"] == list(range(7))  # of the run that has most of them
    assert {"car", "bird", "cat"} <= set(explorer._meta["choices"]["tokens"])
