"""A run starts from its seed alone, can be saved and opened, and refuses what makes no sense."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny import tiny_pipeline

from elakit.errors import ModelError, OutputError, RecordingError, SettingError
from elakit.generation import Progress, compare, generate, open_run
from elakit.guidance import ELA, LatentStep

PAIR = "a [red car] and a [blue bird]"


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral"])
@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_the_image_is_the_one_the_pipeline_draws_itself(scheduler: str, scale: float) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    run = generate(pipe, PAIR, seed=9, steps=3, guidance_scale=scale, progress=False)
    own = pipe(
        "a red car and a blue bird",
        num_inference_steps=3,
        guidance_scale=scale,
        generator=torch.Generator().manual_seed(9),
    ).images[0]
    assert np.array_equal(np.asarray(run.image), np.asarray(own))


def test_a_run_may_be_watched_and_ended_after_any_step() -> None:
    pipe = tiny_pipeline()
    seen: list[tuple[int, int, int]] = []

    def third_step(so_far: Progress) -> bool:
        (run,) = so_far.runs()
        assert run.recording is not None
        seen.append((so_far.step, run.recording.steps[-1], len(run.guidance.rows) if run.guidance else 0))
        return so_far.step == 2

    run = generate(
        pipe,
        PAIR,
        seed=9,
        steps=6,
        guidance=ELA(anchor=LatentStep(start=0, guided=0.5)),
        stop_if=third_step,
        progress=False,
    )
    # a step's end is told before guidance moves the latents for the next
    assert seen == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert run.settings["stopped"] == 3
    assert run.recording.steps == (0, 1, 2)
    whole = generate(pipe, PAIR, seed=9, steps=6, guidance=ELA(anchor=LatentStep(start=0, guided=0.5)), progress=False)
    assert "stopped" not in whole.settings
    assert np.array_equal(run.entity_maps(), whole.entity_maps().isel(step=slice(0, 3)))


def test_watching_changes_nothing_and_an_error_of_the_watcher_is_its_own() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=[1, 2], steps=3, progress=False)
    watched = generate(pipe, PAIR, seed=[1, 2], steps=3, stop_if=lambda so_far: len(so_far.runs()) > 2, progress=False)
    for one, other in zip(plain, watched, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    with pytest.raises(ZeroDivisionError):
        generate(pipe, PAIR, steps=3, stop_if=lambda so_far: 1 / so_far.step, progress=False)
    generate(pipe, PAIR, steps=1, progress=False)


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


def test_a_folder_that_is_no_run_is_neither_opened_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    run = generate(tiny_pipeline(), PAIR, steps=2, progress=False)
    with pytest.raises(OutputError, match="exists already"):
        run.save(tmp_path, overwrite=True)
    with pytest.raises(OutputError, match="holds no elakit run"):
        open_run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write"):
        run.save(tmp_path / "file" / "run")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_runs_are_compared_measure_by_measure() -> None:
    pipe = tiny_pipeline()
    runs = [generate(pipe, PAIR, seed=1, steps=3, guidance=g, progress=False) for g in (None, ELA())]
    table = compare(runs)
    assert table.columns.tolist() == ["plain (seed 1)", "ela (seed 1)"]
    bleed = runs[0].bleeding.to_frame().query("measure == 'bleed' and entity == 'car'")["value"].mean()
    assert table.loc[("bleed", "car", ""), "plain (seed 1)"] == pytest.approx(bleed)


def test_regions_without_a_recording_say_what_to_do() -> None:
    run = generate(tiny_pipeline(), PAIR, steps=2, record=False, progress=False)
    with pytest.raises(RecordingError, match="record=True"):
        _ = run.regions


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"steps": -3}, "steps=-3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"seed": -1}, "seed=-1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"height": 33}, "height"),
        ({"guidance": "ela"}, r"elakit\.ELA\(\)"),
    ],
)
def test_settings_out_of_range_name_the_value(options: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        generate(tiny_pipeline(), PAIR, progress=False, **options)


def test_a_pipeline_without_text_is_refused() -> None:
    net = UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    with pytest.raises(ModelError, match="Supported: Stable Diffusion"):
        generate(DDPMPipeline(net, DDPMScheduler()), PAIR)


def test_only_images_that_need_it_are_guided() -> None:
    pipe = tiny_pipeline()
    asked: list[int] = []

    def second_alone(so_far: Progress) -> list[bool] | None:
        asked.append(so_far.step)
        assert [run.recording is not None and run.recording.steps[-1] for run in so_far.runs(decode=False)] == [
            so_far.step
        ] * 2
        return [False, True] if so_far.step == 1 else None

    options: dict[str, Any] = {"seed": [1, 2], "steps": 5, "progress": False}
    plain = generate(pipe, PAIR, **options)
    ela = ELA(anchor=LatentStep(step_size=0.3, start=0, guided=1))
    first, second = generate(pipe, PAIR, guidance=ela, guide_if=second_alone, **options)
    assert asked == [0, 1]  # until it has answered, and no longer
    assert np.array_equal(np.asarray(first.image), np.asarray(plain[0].image))
    assert not np.array_equal(np.asarray(second.image), np.asarray(plain[1].image))
    assert first.settings["guided"] is False
    assert second.settings["guided"] is True
    assert first.guidance is not None
    assert not first.guidance.rows
    assert second.guidance is not None
    assert [row["step"] for row in second.guidance.rows] == [2, 3, 4]  # guidance has waited
    assert "guided" not in plain[0].settings


def test_a_image_that_is_never_said_to_need_guidance_is_the_plain_one() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=3, steps=3, progress=False)
    ela = ELA(anchor=LatentStep(step_size=0.3, start=0, guided=1))
    for answer in (False, None):
        run = generate(pipe, PAIR, seed=3, steps=3, guidance=ela, guide_if=lambda _, a=answer: a, progress=False)
        assert np.array_equal(np.asarray(run.image), np.asarray(plain.image))
        assert run.settings["guided"] is False
    with pytest.raises(SettingError, match=r"guidance=elakit.ELA\(\)"):
        generate(pipe, PAIR, guide_if=lambda _: True)
    with pytest.raises(SettingError, match="2 answers for 1 images"):
        generate(pipe, PAIR, steps=2, guidance=ela, guide_if=lambda _: [True, False], progress=False)
