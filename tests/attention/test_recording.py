"""Recordings: maps are selected, averaged and resized as asked, saved and opened, and what is not there is named."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from families import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from elakit.attention import (
    Recording,
    RecordSpec,
    open_recording,
    record,
    zarr_store,
)
from elakit.attention.layout import build_node, build_tree
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.measures.arrays import resize
from elakit.prompt import Entity, Prompt, Token


def made(values: dict[str, np.ndarray] | None = None) -> Recording:
    """A recording with known numbers: 2 steps, 2 images; layers "down" and "up" at 4x6, "mid" at 2x3; two heads."""
    tokens = [Token(1, "red", "red", 0), Token(2, "gir", "giraffe/1", 1), Token(3, "affe", "giraffe/2", 1)]
    prompt = Prompt(
        text="red giraffe <b>",
        entities=(Entity("red giraffe", "giraffe", ("red",), (2, 3), (1,), "giraffe"),),
        tokens=tuple(tokens),
        end_index=4,
        length=8,
    )
    channels = [("<start>", 0), *((token.label, token.index) for token in tokens), ("<end>", -1)]
    rng = np.random.default_rng(0)
    layers = {"4x6": [("a.down", "down", 0), ("c.up", "up", 2)], "2x3": [("b.mid", "mid", 1)]}
    nodes = {}
    for size, named in layers.items():
        y, x = map(int, size.split("x"))
        array = rng.dirichlet(np.ones(5), (2, 2, len(named), 2, y, x)).astype("f4")
        array = array if values is None else values[size]
        steps = [(0, 900.0, 3.0), (3, 500.0, 1.0)]
        nodes[size] = build_node(array, steps=steps, layers=named, tokens=channels, heads="all")
    return Recording(build_tree(nodes, prompt=prompt, family="test", model="Test <i>", calls=4, expected=4))


def test_maps_are_the_mean_over_layers_and_heads() -> None:
    recording = made()
    raw = {name: node["probability"].values for name, node in recording.tree.children.items()}
    one = recording.maps("red", layers="up", image=1)
    assert one.dims == ("step", "token", "y", "x")
    assert one.shape == (2, 1, 4, 6)
    np.testing.assert_allclose(one[:, 0], raw["4x6"][:, 1, 1, :, :, :, 1].mean(1), rtol=1e-6)
    # Every layer has the same weight, and small maps are resized to the large ones.
    every = recording.maps("red")
    grown = resize(raw["2x3"][:, 0, 0, :, :, :, 1].mean(1), (4, 6))
    large = raw["4x6"][:, 0, :, :, :, :, 1].mean(2)
    np.testing.assert_allclose(every[:, 0], (large[:, 0] + large[:, 1] + grown) / 3, rtol=1e-5)
    np.testing.assert_allclose(recording.maps("red", size=3)[:, 0], raw["2x3"][:, 0, 0, :, :, :, 1].mean(1), rtol=1e-6)
    np.testing.assert_allclose(recording.maps().sum("token"), 1, rtol=1e-5)


def test_pieces_of_a_word_are_averaged_under_one_label() -> None:
    recording = made()
    pieces = recording.maps(["giraffe/1", "giraffe/2"])
    for tokens, label in (
        ("giraffe", "giraffe"),
        ("entities", "giraffe"),
        (recording.prompt.entities[0], "giraffe"),
    ):
        merged = recording.maps(tokens)
        assert merged["token"].values.tolist() == [label]
        np.testing.assert_allclose(merged[:, 0], pieces.mean("token"), rtol=1e-6)
    assert recording.maps("entities")["entity"].values.tolist() == ["giraffe"]
    attributes = recording.maps("attributes")
    assert attributes["token"].values.tolist() == ["red"]
    assert attributes["entity"].values.tolist() == ["giraffe"]
    assert recording.maps(3)["token"].values.tolist() == ["giraffe/2"]
    assert recording.maps(["red", "<start>", "red"])["token"].values.tolist() == ["red", "<start>"]


def test_a_word_read_by_two_encoders_is_one_map() -> None:
    tokens = (Token(1, "red", "red@clip", 0), Token(2, "car", "car@clip", 1), Token(4, "red", "red@t5", 0))
    tokens += (Token(5, "ca", "car/1@t5", 1), Token(6, "r", "car/2@t5", 1))
    entity = Entity("red car", "car", ("red",), (2, 5, 6), (1, 4), "car")
    prompt = Prompt("red car", (entity,), tokens, 3, 8, 0, ((3, 4), (7, None)))
    channels = RecordSpec().channels(prompt)
    values = np.arange(7, dtype="f4").reshape(1, 1, 1, 1, 1, 1, 7)
    node = build_node(
        values,
        steps=[(0, 1.0, 1.0)],
        layers=[("a", "double", 0)],
        tokens=list(zip(channels.labels, channels.indices, strict=True)),
        heads="mean",
    )
    recording = Recording(build_tree({"1x1": node}, prompt=prompt, family="test", model="Test", calls=1, expected=1))
    for kind, label, value in (("entities", "car", (2 + 4 + 5) / 3), ("attributes", "red", (1 + 3) / 2)):
        maps = recording.maps(kind)
        assert maps["token"].values.tolist() == [label]
        assert float(maps.squeeze()) == pytest.approx(value)
    assert float(recording.maps("car@clip").squeeze()) == 2


def test_normalizations() -> None:
    recording = made()
    raw = recording.maps(["<start>", "red", "giraffe/1", "giraffe/2"]).values
    space = (-2, -1)
    for how, expected in {
        "sum": raw / raw.sum(space, keepdims=True),
        "max": raw / raw.max(space, keepdims=True),
        "minmax": (raw - raw.min(space, keepdims=True)) / np.ptp(raw, axis=space, keepdims=True),
        "start": raw / raw[:, :1],
    }.items():
        given_ = recording.maps(["<start>", "red", "giraffe/1", "giraffe/2"], normalize=how)
        np.testing.assert_allclose(given_, expected, rtol=1e-5, atol=1e-7)
    words = np.exp(100 * raw[:, 1:])
    words /= words.sum(1, keepdims=True)
    np.testing.assert_allclose(recording.maps(normalize="tokens"), words, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(recording.maps("giraffe", normalize="tokens")[:, 0], words[:, 1:].mean(1), rtol=1e-3)
    with pytest.raises(RecordingError, match="softmax over words"):
        recording.maps("<end>", normalize="tokens")
    with pytest.raises(RecordingError, match="softmax over every word"):
        recording.sel(token="red").maps("red", normalize="tokens")
    with pytest.raises(SettingError, match="'minmax'"):
        recording.maps(normalize="zscore")  # type: ignore[arg-type]


def test_maps_of_zeros_stay_zeros() -> None:
    zeros = made({"4x6": np.zeros((2, 2, 2, 2, 4, 6, 5), "f4"), "2x3": np.zeros((2, 2, 1, 2, 2, 3, 5), "f4")})
    for how in ("sum", "max", "minmax", "start"):
        assert not zeros.maps(normalize=how).values.any()


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    seed=st.integers(0, 99),
)
def test_resizing_keeps_to_the_range_and_shrinking_keeps_the_mean(
    shape: tuple[int, int], size: tuple[int, int], seed: int
) -> None:
    maps = np.random.default_rng(seed).random((2, *shape))
    resized = resize(maps, size)
    assert resized.shape == (2, *size)
    assert maps.min() - 1e-9 <= resized.min()
    assert resized.max() <= maps.max() + 1e-9
    if size[0] <= shape[0] and size[1] <= shape[1]:
        np.testing.assert_allclose(resized.mean((-2, -1)), maps.mean((-2, -1)))


@given(seed=st.integers(0, 99), old=st.integers(1, 9), new=st.integers(1, 24))
@settings(deadline=None)
def test_resizing_agrees_with_torch(seed: int, old: int, new: int) -> None:
    maps = torch.from_numpy(np.random.default_rng(seed).random((1, 2, old, old)))
    if new >= old:
        truth = torch.nn.functional.interpolate(maps, size=(new, new), mode="bilinear", align_corners=False)
    elif old % new == 0:
        truth = torch.nn.functional.adaptive_avg_pool2d(maps, new)
    else:  # each of `new` equal intervals is the mean over what it covers
        fine = maps.repeat_interleave(new, -1).repeat_interleave(new, -2)
        truth = torch.nn.functional.avg_pool2d(fine, old)
    np.testing.assert_allclose(resize(maps.numpy(), (new, new)), truth, atol=1e-12)


def test_steps_are_chosen_by_call_number() -> None:
    recording = made()  # calls 0 and 3
    assert recording.maps("red", steps=3)["step"].values.tolist() == [3]
    assert recording.maps("red", steps=-1)["step"].values.tolist() == [3]
    assert recording.maps("red", steps=slice(0, 3))["step"].values.tolist() == [0]
    assert recording.maps("red", steps=[3, 0])["timestep"].values.tolist() == [500.0, 900.0]
    with pytest.raises(RecordingError, match="step=1 was not recorded; choose from 0, 3"):
        recording.maps("red", steps=1)
    with pytest.raises(RecordingError, match="selects no recorded step; choose from 0, 3"):
        recording.maps("red", steps=slice(1, 3))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tokens": "zebra"}, ["zebra", "Recorded tokens: <start>, red, giraffe/1, giraffe/2, <end>"]),
        ({"tokens": 5}, ["position 5", "Recorded tokens: <start>"]),
        ({"tokens": []}, ["selects nothing"]),
        ({"layers": "decoder"}, ["a.down", "b.mid", "c.up"]),
        ({"size": 16}, ["no maps of size 16", "longer side of recorded maps: 4x6, 2x3"]),
        ({"layers": "mid", "size": 6}, ["b.mid (2x3)"]),
        ({"image": 2}, ["from 0 to 1"]),
    ],
)
def test_what_was_not_recorded_is_named_beside_what_was(arguments: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecordingError) as error:
        made().maps(**arguments)
    for part in parts:
        assert part in str(error.value)


def test_selections_are_recordings() -> None:
    recording = made()
    part = recording.sel(step=3, layer=["a.down", "mid"], token="giraffe", head=1, image=0)
    assert part.steps == (3,)
    assert part.layers == ("a.down", "b.mid")
    assert part.tokens == ("giraffe/1", "giraffe/2")
    assert part.tree["4x6"]["probability"].dims == recording.tree["4x6"]["probability"].dims
    kept = recording.tree["4x6"]["probability"].values[1, 0, 0, 1, :, :, 2]
    np.testing.assert_allclose(part.maps("giraffe/1", size=6)[0, 0], kept)
    assert part.prompt == recording.prompt
    np.testing.assert_array_equal(recording.isel(step=-1, image=[1]).maps(), recording.maps(steps=3, image=1))
    assert recording.sel(size=3).sizes == ((2, 3),)
    with pytest.raises(RecordingError, match=r"sel\(layer="):
        recording.isel(layer=0)
    with pytest.raises(RecordingError, match="outside"):
        recording.isel(step=5)
    with pytest.raises(RecordingError, match="head=7 was not recorded"):
        recording.sel(head=7)
    with pytest.raises(RecordingError, match="was not recorded"):
        part.maps("red")


# -- files -----------------------------------------------------------------------------------------------------------


def test_saving_and_opening_gives_the_same_recording(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float16")) as recording:
        draw(pipe, prompt.text, num_inference_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = recording.save(tmp_path / "runs" / "car bird")
        opened = open_recording(path)
    xr.testing.assert_identical(opened.tree.load(), recording.tree)
    assert opened.prompt == prompt
    assert opened.steps == recording.steps
    assert opened.layers == recording.layers
    assert repr(opened) == repr(recording)
    xr.testing.assert_identical(opened.maps("entities", layers="up"), recording.maps("entities", layers="up"))
    # Plain Zarr and JSON: readable without elakit.
    assert json.loads(xr.open_zarr(path).attrs["prompt"])["text"] == prompt.text
    again = opened.sel(token="car", step=[0, 2]).save(tmp_path / "part")
    assert open_recording(again).tokens == ("car",)


def test_saving_never_replaces_what_it_should_not(tmp_path: Path) -> None:
    recording = made()
    path = recording.save(tmp_path / "kept")
    with pytest.raises(OutputError, match="overwrite=True"):
        recording.save(path)
    recording.sel(step=3).save(path, overwrite=True)
    assert open_recording(path).steps == (3,)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not a recording"):
        recording.save(tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    with pytest.raises(OutputError, match="cannot be written"):
        recording.save(tmp_path / "thesis" / "chapter.tex" / "recording")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["kept", "thesis"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_that_fails_leaves_the_old_recording(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recording = made()
    path = recording.save(tmp_path / "kept")
    write, rename = zarr_store._write_tree, os.rename

    def fail_writing(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        raise error

    def fail_renaming(source: Any, target: Any) -> None:
        if str(source).endswith("part"):
            raise error
        rename(source, target)

    for owner, name, failing in ((zarr_store, "_write_tree", fail_writing), (os, "rename", fail_renaming)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
                recording.sel(step=3).save(path, overwrite=True)
        assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
        assert open_recording(path).steps == (0, 3)


def test_opening_what_is_no_recording_says_so(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        open_recording(tmp_path / "nowhere")
    xr.Dataset({"a": ("x", [1])}).to_zarr(tmp_path / "other", zarr_format=2)
    with pytest.raises(RecordingError, match=r"Recording\.save"):
        open_recording(tmp_path / "other")


def test_looks() -> None:
    text = repr(made())
    for part in ("red giraffe <b>", "0, 3 of 4 denoiser calls", "4x6: layers 1 down, 1 up; 2 heads", "giraffe/1"):
        assert part in text
    html = made()._repr_html_()
    assert "giraffe <b>" not in html
    assert "giraffe &lt;b&gt;" in html
    assert "Test &lt;i&gt;" in html
    assert "<start>" not in html
