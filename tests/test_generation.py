"""A run starts from its seed alone, can be saved and opened, and refuses what makes no sense."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DModel,
)
from families import RELATIVES
from PIL import Image
from tiny import tiny_pipeline

from elakit.errors import ModelError, SettingError
from elakit.generation import generate
from elakit.guidance import ELA, AttendAndExcite, InitNO, LatentStep, Method, RegionalAttention, SynGen
from elakit.models import adapter_for
from elakit.pipeline_call import Progress
from elakit.run import open_run

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
    # the end of a step is reported before guidance moves the latents for the next
    assert seen == [(0, 0, 1), (1, 1, 2), (2, 2, 3)]
    assert run.settings["stopped"] == 3
    assert run.recording.steps == (0, 1, 2)
    whole = generate(pipe, PAIR, seed=9, steps=6, guidance=ELA(anchor=LatentStep(start=0, guided=0.5)), progress=False)
    assert "stopped" not in whole.settings
    assert np.array_equal(run.entity_maps(), whole.entity_maps().isel(step=slice(0, 3)))


@pytest.mark.parametrize("method", [ELA(anchor=LatentStep(start=0)), RegionalAttention()], ids=lambda m: m.name)
def test_an_image_of_a_sibling_generated_inside_stop_if_is_not_guided(method: Method) -> None:
    pipe = tiny_pipeline()
    other = StableDiffusionPipeline(
        **pipe.components | {"scheduler": tiny_pipeline().scheduler}, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"seed": 3, "steps": 2, "record": False, "progress": False}
    plain = np.asarray(generate(other, PAIR, **settings).image)
    inside: list[Any] = []

    def draw_another(so_far: Progress) -> bool:
        inside.append(generate(other, PAIR, **settings).image)
        return False

    alone = generate(pipe, PAIR, seed=1, steps=3, guidance=method, progress=False)
    run = generate(pipe, PAIR, seed=1, steps=3, guidance=method, stop_if=draw_another, progress=False)
    assert len(inside) == 3
    assert all(np.array_equal(np.asarray(image), plain) for image in inside)
    assert np.array_equal(np.asarray(run.image), np.asarray(alone.image))
    assert run.entity_maps().equals(alone.entity_maps())


def test_watching_changes_nothing_and_an_error_of_the_watcher_is_its_own() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=[1, 2], steps=3, progress=False)
    watched = generate(pipe, PAIR, seed=[1, 2], steps=3, stop_if=lambda so_far: len(so_far.runs()) > 2, progress=False)
    for one, other in zip(plain, watched, strict=True):
        assert np.array_equal(np.asarray(one.image), np.asarray(other.image))
    with pytest.raises(ZeroDivisionError):
        generate(pipe, PAIR, steps=3, stop_if=lambda so_far: 1 / so_far.step, progress=False)
    generate(pipe, PAIR, steps=1, progress=False)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"steps": -3}, "steps=-3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, "steps=2.5"),
        ({"steps": 1001}, "steps=1001: must be a whole number from 1 to 1000"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=18446744073709551616: must be a whole number from 0"),
        ({"seed": [0, 2**64]}, "seed=18446744073709551616"),
        ({"seed": []}, "a list of one or more such numbers"),
        ({"guidance_scale": "x"}, "guidance_scale='x': must be a finite number, 0 or more"),
        ({"height": 0}, "height=0: must be a whole number, 1 or more"),
        ({"width": 64.0}, "width=64.0"),
        ({"negative_prompt": 3}, "negative_prompt=3"),
        ({"stop_if": 5}, "stop_if=5: must be a function"),
        ({"guide_if": 5, "guidance": ELA()}, "guide_if=5: must be a function"),
        ({"record": "all"}, "record='all': must be True or False"),
        ({"call": 7}, "call=7"),
        ({"call": {"latents": None}}, "elakit.generate sets this argument itself"),
        ({"call": {"clip_skipp": 1}}, "Did you mean 'clip_skip'"),
        ({"call": {"eta": 0.5}, "guidance": ELA()}, "guidance=ela is not possible with call="),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"height": 33}, "height"),
        ({"guidance": "ela"}, r"elakit\.ELA\(\)"),
    ],
)
def test_settings_out_of_range_name_the_value(options: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        generate(tiny_pipeline(), PAIR, progress=False, **options)


def test_numpy_numbers_are_plain_in_the_settings(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    height, width = adapter_for(pipe).default_size()
    run = generate(
        pipe, PAIR, seed=np.int64(3), steps=np.int32(2), guidance_scale=np.float32(4), height=np.int64(height),
        width=np.uint16(width), progress=False,
    )  # fmt: skip
    plain = generate(pipe, PAIR, seed=3, steps=2, guidance_scale=4, progress=False)
    assert np.array_equal(np.asarray(run.image), np.asarray(plain.image))
    assert open_run(run.save(tmp_path / "run")).settings == plain.settings


@pytest.mark.parametrize("seeds", [(1, 2), range(1, 3), np.array([1, 2])])
def test_any_sequence_of_seeds_is_a_batch(seeds: Any) -> None:
    runs = generate(tiny_pipeline(), PAIR, seed=seeds, steps=1, record=False, progress=False)
    assert [run.seed for run in runs] == [1, 2]


@pytest.mark.parametrize(
    "method",
    [
        AttendAndExcite(refine=((0.0, 0.05, 2),)),
        ELA(),
        InitNO(rounds=1, iterations=2, last_iterations=2, refinements=2),
    ],
    ids=lambda method: method.name,
)
def test_inference_mode_does_not_switch_guidance_off(method: Method) -> None:
    pipe = tiny_pipeline()
    outside = generate(pipe, PAIR, seed=2, steps=4, guidance=method, progress=False)
    with torch.inference_mode():
        inside = generate(pipe, PAIR, seed=2, steps=4, guidance=method, progress=False)
        assert torch.is_inference_mode_enabled()
    assert any(row["moved"] > 0 for row in outside.guidance.rows)
    assert np.array_equal(np.asarray(inside.image), np.asarray(outside.image))
    assert [row["moved"] for row in inside.guidance.rows] == [row["moved"] for row in outside.guidance.rows]


def test_weights_loaded_in_inference_mode_cannot_be_guided() -> None:
    with torch.inference_mode():
        pipe = tiny_pipeline()
    with pytest.raises(ModelError, match="loaded within torch"):
        generate(pipe, PAIR, steps=2, guidance=AttendAndExcite(), progress=False)
    assert generate(pipe, PAIR, steps=2, progress=False).recording is not None


def test_a_run_of_too_few_steps_for_guidance_says_so() -> None:
    pipe = tiny_pipeline()
    with pytest.warns(UserWarning, match=r"no step of this run \(1 step, 2 entities\).* a larger guided, or"):
        run = generate(pipe, PAIR, steps=1, guidance=SynGen(guided=0.4), progress=False)
    assert np.array_equal(np.asarray(run.image), np.asarray(generate(pipe, PAIR, steps=1, progress=False).image))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe, PAIR, steps=4, guidance=SynGen(), progress=False)
        # a user who compares with a step size of 0 wants the image without guidance
        generate(pipe, PAIR, steps=4, guidance=SynGen(step_size=0.0), progress=False)


def test_images_that_the_safety_checker_replaced_are_reported_and_not_judged(tmp_path: Path) -> None:
    pipe = tiny_pipeline()

    def second_is_flagged(image: Any, device: Any, dtype: Any) -> tuple[Any, list[bool]]:
        image = image.clone()
        image[1] = 0
        return image, [False, True]

    pipe.run_safety_checker = second_is_flagged
    with pytest.warns(UserWarning, match="replaced the image of seed 6 by a black image. Black images are not judged"):
        runs = generate(pipe, PAIR, seed=[5, 6], steps=2, progress=False)
    assert [run.nsfw for run in runs] == [False, True]
    for run in runs:
        run.settings["model"] = "picture-world"  # whose images the built-in judge knows
    assert runs[0].verdict is not None
    assert runs[1].verdict is None
    assert "hidden by the safety checker" in repr(runs[1])
    assert open_run(runs[1].save(tmp_path / "run")).nsfw


def photo(side: int = 64) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_image_to_image_gets_its_image_through_call(tmp_path: Path) -> None:
    pipe = StableDiffusionImg2ImgPipeline(**tiny_pipeline().components, requires_safety_checker=False)
    with pytest.raises(SettingError, match=r'needs an image. .*call=\{"image": ...\}'):
        generate(pipe, PAIR, progress=False)
    with pytest.raises(SettingError, match="guidance=ela is not possible with StableDiffusionImg2ImgPipeline"):
        generate(pipe, PAIR, guidance=ELA(), call={"image": photo()}, progress=False)
    run = generate(pipe, PAIR, seed=3, steps=4, call={"image": photo(), "strength": 0.5}, progress=False)
    own = pipe(
        "a red car and a blue bird", image=photo(), strength=0.5, num_inference_steps=4,
        guidance_scale=run.settings["guidance_scale"], generator=torch.Generator().manual_seed(3),
    ).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(run.image), np.asarray(own))
    assert run.settings["call"] == "image, strength=0.5"
    assert (run.settings["width"], run.settings["height"]) == run.image.size
    assert len(run.recording.steps) == 2
    assert np.array_equal(open_run(run.save(tmp_path / "run")).entity_maps(), run.entity_maps())


def test_control_net_and_inpainting_pipelines_run() -> None:
    parts = tiny_pipeline().components
    control = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 8, 16))
    pipe = StableDiffusionControlNetPipeline(**parts, controlnet=control, requires_safety_checker=False)
    runs = generate(pipe, PAIR, seed=[1, 2], steps=2, call={"image": photo()}, progress=False)
    assert [len(run.recording.steps) for run in runs] == [2, 2]
    assert not np.array_equal(np.asarray(runs[0].image), np.asarray(runs[1].image))
    pipe = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    mask = Image.new("L", (64, 64), 255)
    run = generate(pipe, PAIR, steps=2, call={"image": photo(), "mask_image": mask, "strength": 1.0}, progress=False)
    assert len(run.recording.steps) == 2


@pytest.mark.parametrize("name", ["flux img2img", "flux fill"])
def test_pipelines_of_flux_that_take_an_image_run(name: str) -> None:
    relative = RELATIVES[name]
    given = {key: relative.options[key] for key in ("image", "mask_image", "strength") if key in relative.options}
    run = generate(relative.build(), PAIR, steps=4, height=32, width=32, call=given, progress=False)
    assert run.recording.steps
    assert run.image.size == (32, 32)


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
    with pytest.raises(SettingError, match=r"Give a method, such as guidance=elakit.ELA\(\)"):
        generate(pipe, PAIR, guide_if=lambda _: True)
    with pytest.raises(SettingError, match=r"2 values for 1 image\."):
        generate(pipe, PAIR, steps=2, guidance=ela, guide_if=lambda _: [True, False], progress=False)


def test_who_decides_on_guidance_may_see_the_predicted_image() -> None:
    pipe = tiny_pipeline()
    seen: list[bool] = []

    def look(so_far: Progress) -> bool:
        (noisy,), (clean,) = so_far.runs(), so_far.runs(predicted=True)
        seen.append(np.array_equal(np.asarray(noisy.image), np.asarray(clean.image)))
        return False

    generate(pipe, PAIR, seed=3, steps=3, guidance=ELA(), guide_if=look, progress=False)
    assert seen == [False]
