"""Damaged recordings: the error names the file, nothing is read as zeros, and nothing runs code."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elakit.attention import Recording, open_recording
from elakit.attention.layout import build_node, build_tree
from elakit.attention.zarr_store import write_whole
from elakit.errors import ElakitError, RecordingError
from elakit.prompt import Entity, Prompt, Token


def made(value: float, steps: int = 3) -> Recording:
    """A recording of one value, two images and two map sizes."""
    tokens = (Token(1, "red", "red", 0), Token(2, "car", "car", 1))
    prompt = Prompt(
        text="red car", entities=(Entity("red car", "car", ("red",), (2,), (1,), "car"),), tokens=tokens,
        end_index=3, length=8,
    )  # fmt: skip
    nodes = {}
    for size, layers in {"4x6": [("a.down", "down", 0), ("c.up", "up", 2)], "2x3": [("b.mid", "mid", 1)]}.items():
        y, x = map(int, size.split("x"))
        nodes[size] = build_node(
            np.full((steps, 2, len(layers), 1, y, x, 4), value, "f4"),
            steps=[(step, 900.0 - step, 1.0) for step in range(steps)],
            layers=layers,
            tokens=[("<start>", 0), ("red", 1), ("car", 2), ("<end>", -1)],
            heads="mean",
        )
    tree = build_tree(nodes, prompt=prompt, family="test", model="Test", calls=steps, expected=steps)
    return Recording(tree)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store as a run writes it: one chunk per step and image."""
    write_whole(made(0.25).tree, tmp_path / "run.zarr", step_chunk=1)
    return tmp_path / "run.zarr"


def read(folder: Path) -> None:
    """Use everything that a recording has."""
    recording = open_recording(folder)
    recording.maps("entities", image=1)
    for node in recording.nodes():
        node["probability"].values  # noqa: B018
    assert repr(recording)
    assert recording.prompt.text
    assert recording.sel(token="car").isel(step=0).nbytes >= 0


def test_a_missing_file_is_named_when_the_recording_is_opened(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    assert len([path for path in files if path.parent.name == "probability"]) == 2 * 3 * 2
    for path in files:
        content = path.read_bytes()
        path.unlink()
        with pytest.raises(
            RecordingError, match=rf"^The recording.s file \S*{path.parent.name}/{path.name} is missing"
        ):
            open_recording(folder)
        path.write_bytes(content)
    read(folder)


def test_a_folder_that_is_deleted_or_replaced_while_it_is_open_is_noticed(folder: Path) -> None:
    opened = open_recording(folder)
    assert float(opened.maps("car")[0, 0, 0, 0]) == 0.25
    made(0.75).save(folder, overwrite=True)
    with pytest.raises(RecordingError, match="replaced by another one"):
        opened.maps("car")
    again = open_recording(folder)
    assert float(again.maps("car")[0, 0, 0, 0]) == 0.75
    path = next((folder / "4x6" / "probability").glob("[0-9]*"))
    path.unlink()
    with pytest.raises(RecordingError, match=f"probability/{path.name} is missing"):
        again.maps("car")
    shutil.rmtree(folder)
    with pytest.raises(RecordingError, match="deleted or moved"):
        again.maps("car")


CODE = {
    "a pickle filter": {"filters": [{"id": "pickle", "protocol": 5}]},
    "a pickle codec": {"compressor": {"id": "pickle", "protocol": 5}},
    "another codec": {"compressor": {"id": "zlib", "level": 1}},
    "another order": {"order": "F"},
    "objects": {"dtype": "|O"},
    "a record": {"dtype": [["a", "<f4"]]},
    "dates": {"dtype": "<M8[ns]"},
}


@pytest.mark.parametrize("what", CODE)
def test_nothing_but_blosc_and_plain_numbers_is_decoded(
    what: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = json.loads((folder / ".zmetadata").read_text())
    metadata["metadata"]["4x6/probability/.zarray"] |= CODE[what]
    (folder / ".zmetadata").write_text(json.dumps(metadata))
    monkeypatch.setattr("pickle.loads", lambda *_: pytest.fail("code was run"))
    with pytest.raises(RecordingError, match=r"^\S*/4x6/probability/\.zarray .* is not decoded"):
        open_recording(folder)


def test_a_chunk_that_claims_to_be_huge_is_not_decoded(folder: Path) -> None:
    path = next((folder / "4x6" / "probability").glob("[0-9]*"))
    content = bytearray(path.read_bytes())
    content[4:8] = struct.pack("<I", 2**31 - 1)
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=f"{path.name} is damaged"):
        read(folder)


def test_a_group_outside_the_folder_is_not_read(folder: Path) -> None:
    metadata = json.loads((folder / ".zmetadata").read_text())
    metadata["metadata"]["../other/.zgroup"] = {"zarr_format": 2}
    (folder / ".zmetadata").write_text(json.dumps(metadata))
    with pytest.raises(RecordingError, match="names a group"):
        open_recording(folder)


def test_a_recording_of_an_earlier_format_is_named(folder: Path) -> None:
    for name in (".zattrs", ".zmetadata"):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("elakit recording 2", "elakit recording 1"))
    with pytest.raises(RecordingError, match="another version of elakit"):
        open_recording(folder)


def _truncate(content: bytes, at: int) -> bytes:
    return content[: at % (len(content) + 1)]


def _flip(content: bytes, at: int) -> bytes:
    damaged = bytearray(content)
    if damaged:
        damaged[at % len(damaged)] ^= 1 << (at % 8)
    return bytes(damaged)


DAMAGE: dict[str, Callable[[bytes, int], bytes]] = {
    "truncated": _truncate,
    "a bit flipped": _flip,
    "empty": lambda *_: b"",
    "nested": lambda *_: b"[" * 100_000,
    "another JSON": lambda content, at: [b"null", b"[]", b'{"metadata": 3}', b'"text"', b"{}", b"\xff\xfe"][at % 6],
    "a value replaced": lambda content, at: content.replace(
        [b'"U', b"[3", b"4x6", b"<f4", b"text", b"null"][at % 6],
        [b'"V', b"[-1", b"6x4", b"<i2", b"tekst", b"{}"][at % 6],
    ),
}


@given(which=st.integers(0, 999), at=st.integers(0, 2000), how=st.sampled_from(sorted(DAMAGE)))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_damaged_the_result_is_a_recording_or_an_error_of_elakit(
    which: int, at: int, how: str, folder: Path
) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    # metadata first, which have more ways to be wrong
    important = [folder / ".zmetadata", folder / ".zattrs"] * 20 + files
    path = important[which % len(important)]
    content = path.read_bytes()
    path.write_bytes(DAMAGE[how](content, at))
    try:
        with suppress(ElakitError):  # any other error fails the test
            read(folder)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("code", [0x110053, 0xD800], ids=["beyond Unicode", "surrogate"])
def test_labels_that_are_not_unicode_are_refused_by_file(folder: Path, code: int) -> None:
    """One flipped bit gives text that numpy reads and that pandas cannot wrap."""
    name = next(iter(sorted(folder.glob("*/token/0"))))
    stored = json.loads((name.parent / ".zarray").read_text())
    codec = numcodecs.get_codec(stored["compressor"])
    labels = np.frombuffer(codec.decode(name.read_bytes()), np.uint32).copy()
    labels[1] = code
    name.write_bytes(codec.encode(labels))
    with pytest.raises(RecordingError, match=r"/token/0 is damaged \(its labels are not valid Unicode\)"):
        read(folder)


def test_a_label_that_only_one_size_of_maps_has_is_refused(folder: Path) -> None:
    """One flipped bit makes another word of a label."""
    name = min(folder.glob("*/token/0"))  # of the smallest maps
    stored = json.loads((name.parent / ".zarray").read_text())
    codec = numcodecs.get_codec(stored["compressor"])
    labels = np.frombuffer(codec.decode(name.read_bytes()), np.uint32).copy()
    labels[labels == ord("a")] = ord("q")
    name.write_bytes(codec.encode(labels))
    with pytest.raises(
        RecordingError, match=r"damaged: its maps of size \w+ have no token '.*a.*', which other maps have"
    ):
        open_recording(folder).maps("entities")


def test_values_are_read_lazily_in_every_order(folder: Path) -> None:
    """Selections of steps, images, layers and locations agree with those of the array in memory."""
    rng: Any = np.random.default_rng(0)
    recording = made(0.0)
    values = rng.random((3, 2, 2, 1, 4, 6, 4)).astype("f4")
    recording.tree["4x6"]["probability"].values[:] = values
    write_whole(recording.tree, folder.with_name("two.zarr"), step_chunk=2)
    opened = open_recording(folder.with_name("two.zarr")).nodes()[0]["probability"]
    for index in (
        {"step": 1}, {"step": [2, 0], "image": 1}, {"step": slice(1, None), "token": [3, 1], "y": slice(None, None,
        -1)}, {"image": [1, 0], "layer": -1, "x": 2}, {"step": slice(0, 0)}, {"step": [0, 2, 2], "head": 0},
    ):  # fmt: skip
        expected = made(0.0).nodes()[0]["probability"].copy(data=values).isel(index)
        np.testing.assert_array_equal(opened.isel(index).values, expected.values)
