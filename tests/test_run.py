"""A run is saved whole, opens as it was, and a damaged folder ends in a clear error."""

from __future__ import annotations

import codecs
import io
import json
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_pipeline

import elakit
from elakit import files
from elakit.attention import open_recording
from elakit.errors import ElakitError, OutputError, RecordingError
from elakit.generation import generate
from elakit.guidance import ELA
from elakit.prediction.attention_features import features
from elakit.run import FORMAT, Run, compare, open_run

PAIR = "a [red car] and a [blue bird]"


def test_a_run_is_saved_whole_and_opens_as_it_was(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    run = generate(pipe, PAIR, seed=4, steps=4, guidance=ELA(), progress=False)
    folder = run.save(tmp_path / "run")
    again = open_run(folder)
    assert again.prompt == run.prompt
    assert again.seed == 4
    assert again.settings == run.settings
    assert np.array_equal(np.asarray(again.image), np.asarray(run.image))
    assert again.regions.equals(run.regions)
    assert again.guidance.regions.equals(run.guidance.regions)
    assert again.guidance.to_frame().equals(run.guidance.to_frame())
    assert again.bleeding.to_frame().equals(run.bleeding.to_frame())
    with pytest.raises(OutputError, match="overwrite=True"):
        run.save(folder)
    run.save(folder, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_predicted_images_are_saved_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    run = generate(tiny_pipeline(), PAIR, steps=3, predicted=True, progress=False)
    folder = run.save(tmp_path / "run")
    again = open_run(folder)
    assert [image.tobytes() for image in again.predicted or ()] == [image.tobytes() for image in run.predicted or ()]
    (folder / "predicted" / "0001.png").write_bytes(b"no image")
    with pytest.raises(OutputError, match="predicted is damaged"):
        open_run(folder)


def test_a_part_that_is_missing_is_named(tmp_path: Path) -> None:
    """Without its recording or regions, a run would open as one that was not recorded or not anchored."""
    run = generate(tiny_pipeline(), PAIR, steps=3, guidance=ELA(), predicted=True, progress=False)
    for name in ("recording.zarr", "regions.npz", "predicted/0001.png", "image.png"):
        folder = run.save(tmp_path / "run", overwrite=True)
        (folder / name).rename(tmp_path / "elsewhere")
        with pytest.raises(OutputError, match=rf"run/{name} is (missing|damaged)"):
            open_run(folder)
        (tmp_path / "elsewhere").rename(folder / name)
        assert open_run(folder).seed == run.seed


def test_a_byte_order_mark_in_a_text_file_of_a_run_is_no_damage(tmp_path: Path) -> None:
    """Some editors add one when they save."""
    run = generate(tiny_pipeline(), PAIR, steps=2, guidance=ELA(), progress=False)
    folder = run.save(tmp_path / "run")
    texts = [path for path in folder.rglob("*") if path.name == "run.json" or path.name.startswith(".z")]
    assert {path.name for path in texts} == {"run.json", ".zattrs", ".zarray", ".zgroup", ".zmetadata"}
    for path in texts:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    again = open_run(folder)
    assert again.prompt == run.prompt
    assert again.recording is not None
    assert again.recording.maps("car").equals(run.recording.maps("car"))
    # still recognized as a recording, which another one may replace
    assert open_recording(run.recording.save(folder / "recording.zarr", overwrite=True)).prompt == run.prompt


def test_a_folder_that_is_no_run_is_neither_opened_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = generate(tiny_pipeline(), PAIR, steps=2, progress=False)
    with pytest.raises(OutputError, match="already exists"):
        run.save(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="contains no elakit run"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        run.save(tmp_path / "file" / "run")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_runs_are_compared_measure_by_measure() -> None:
    pipe = tiny_pipeline()
    runs = [generate(pipe, PAIR, seed=1, steps=3, guidance=g, progress=False) for g in (None, ELA())]
    table = compare(runs)
    assert table.columns.tolist() == ["plain (seed 1)", "ela (seed 1)"]
    bleed = runs[0].bleeding.to_frame().query("measure == 'bleed' and entity == 'car'")["value"].mean()
    assert table.loc[("bleed", "car", ""), "plain (seed 1)"] == pytest.approx(bleed)
    assert compare([*runs, runs[1]]).columns.tolist() == ["plain (seed 1)", "ela (seed 1)", "ela (seed 1)#2"]


def test_maps_of_the_middle_block_alone_do_not_set_the_size() -> None:
    """At 768 pixels, the maps of Stable Diffusion 1 and 2 that are nearest to 16 x 16 are not in the decoder."""
    coarse = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    run = generate(tiny_pipeline(**coarse), PAIR, steps=2, height=96, width=96, progress=False)
    assert run.recording is not None
    assert run.recording.sizes == ((24, 24), (12, 12))
    assert run.recording.usual_size() == 24
    assert run.recording.usual_size("mid") == 12
    assert run.entity_maps().shape[-2:] == run.regions.shape[-2:] == (24, 24)
    assert run.bleeding.to_frame()["value"].notna().any()
    for layers, size in ((None, 24), ("mid", 12)):
        (first, *_) = elakit.plot.token_maps(run, layers=layers).data
        assert np.shape(first.z) == (size, size)
    features(run)
    assert elakit.explore(run).size == 24


def test_regions_without_a_recording_say_what_to_do() -> None:
    run = generate(tiny_pipeline(), PAIR, steps=2, record=False, progress=False)
    with pytest.raises(RecordingError, match="record=True"):
        _ = run.regions


def test_a_black_image_is_not_judged_and_its_attention_is_measured() -> None:
    run = generate(tiny_pipeline(), PAIR, steps=2, progress=False)
    run.settings["model"] = "picture-world"  # the built-in judge knows its images
    seen = replace(run)
    seen.image = Image.new("RGB", run.image.size, "navy")
    run.image = Image.new("RGB", run.image.size)
    assert seen.verdict is not None
    assert run.verdict is None
    assert not run.bleeding.overall().empty


@pytest.fixture(scope="module")
def run() -> Run:
    return generate(tiny_pipeline(), PAIR, seed=4, steps=4, guidance=ELA(), progress=False)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    return run.save(tmp_path / "run")


def test_a_list_of_runs_prints_in_a_line_each(run: Run) -> None:
    assert repr(run) == "Run('a red car and a blue bird', seed=4, ela, 4 steps, 32 x 32 pixels, recorded)"
    assert len(repr([run] * 10)) < 1000
    assert len(repr(run.guidance)) < 60


def test_a_save_that_fails_keeps_the_old_run(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (folder / "run.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match="No space left"):
        run.save(folder, overwrite=True)
    assert (folder / "run.json").read_bytes() == before
    assert open_run(folder).seed == 4
    assert [path.name for path in folder.parent.iterdir()] == ["run"]


def test_an_opened_run_can_be_saved_over_itself(folder: Path, run: Run) -> None:
    opened = open_run(folder)
    opened.settings["note"] = "mine"
    opened.save(folder, overwrite=True)
    again = open_run(folder)
    assert again.settings["note"] == "mine"
    assert np.array_equal(again.entity_maps(), run.entity_maps())


def test_an_interrupted_replacement_is_pointed_out(folder: Path) -> None:
    shutil.move(folder, folder.parent / ".run.0123456789ab.old")
    with pytest.raises(OutputError, match=r"kept the replaced run in .*\.run\.0123456789ab\.old; rename it"):
        open_run(folder)


@pytest.mark.parametrize(
    ("found", "message"),
    [(None, "an older version of elakit"), (1, "format is 1, and this version"), (FORMAT + 1, "Update elakit"),
     ("x", r"run\.json is damaged: its format is 'x', which is not a whole number")],
)  # fmt: skip
def test_a_run_of_another_version_is_refused(folder: Path, found: object, message: str) -> None:
    table = json.loads((folder / "run.json").read_text())
    table.pop("format") if found is None else table.update(format=found)
    (folder / "run.json").write_text(json.dumps(table))
    with pytest.raises(OutputError, match=message):
        open_run(folder)


def changed(folder: Path, *keys: str, value: object) -> None:
    table = json.loads((folder / "run.json").read_text())
    inner = table
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    (folder / "run.json").write_text(json.dumps(table))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["seed"], "4"), (["seed"], True), (["settings"], []), (["settings", "model"], ["picture-world"]),
        (["prompt"], None), (["prompt", "entities"], [{}]), (["prompt", "tokens"], "x"), (["guidance"], []),
        (["guidance", "rows"], [1]), (["guidance", "rows"], [{"step": 1}]), (["guidance", "entities"], [1, 2]),
        (["guidance", "entities"], ["car"]), (["guidance", "options"], 3), (["nsfw"], None),
    ],
)  # fmt: skip
def test_wrong_values_in_run_json_are_reported(folder: Path, keys: list[str], value: object) -> None:
    changed(folder, *keys, value=value)
    with pytest.raises(OutputError, match=r"run\.json is damaged|regions\.npz has"):
        open_run(folder)


def test_random_damage_ends_in_an_error_of_elakit(folder: Path) -> None:
    random.seed(3)
    paths = sorted(p for p in folder.glob("*") if p.is_file())
    for trial in range(150):  # as many more are in test_recording_damaged.py, of recordings
        path = paths[trial % len(paths)]
        content = path.read_bytes()
        damaged = bytearray(content)
        kind = trial % 4
        if kind == 0:
            damaged = damaged[: random.randrange(len(damaged))]
        elif kind == 1:
            for _ in range(8):
                damaged[random.randrange(len(damaged))] = random.randrange(256)
        elif kind == 2:
            damaged = bytearray(random.randbytes(random.randrange(200)))
        else:
            start = random.randrange(len(damaged))
            damaged[start : start + 20] = b""
        path.write_bytes(damaged)
        try:
            opened = open_run(folder)
            _ = opened.guidance.regions, opened.guidance.to_frame(), repr(opened)
        except ElakitError as error:
            assert str(folder) in str(error)  # noqa: PT017
        path.write_bytes(content)
    assert open_run(folder).seed == 4


@pytest.mark.parametrize("side", [8_200, 14_000])  # too large for elakit, and for Pillow too
def test_an_image_that_claims_to_be_huge_is_not_read(folder: Path, side: int) -> None:
    sink = io.BytesIO()
    Image.new("1", (side, side)).save(sink, "PNG")
    assert sink.tell() < 100_000
    (folder / "image.png").write_bytes(sink.getvalue())
    with pytest.raises(OutputError, match=r"image\.png is damaged: .*pixels.*[^.]\. Restore"):
        open_run(folder)


def test_regions_that_claim_to_be_huge_are_not_read(folder: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|b1", "fortran_order": False, "shape": (1000, 2, 2000, 2000)}
    )
    steps = io.BytesIO()
    np.save(steps, np.arange(1000))
    with zipfile.ZipFile(folder / "regions.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("masks.npy", header.getvalue() + bytes(1000))
        archive.writestr("steps.npy", steps.getvalue())
    with pytest.raises(OutputError, match=r"regions\.npz is damaged: .*contains 8,000,000,000 bytes"):
        open_run(folder)


def test_regions_that_would_run_code_are_not_read(folder: Path) -> None:
    np.savez(folder / "regions.npz", masks=np.array([print], dtype=object), steps=np.arange(1))
    with pytest.raises(OutputError, match="of object"):
        open_run(folder)


def test_a_table_nested_too_deeply_is_damaged(folder: Path) -> None:
    (folder / "run.json").write_text("[" * 100_000)
    with pytest.raises(OutputError, match="damaged"):
        open_run(folder)
    assert files.leftovers(folder) == []
