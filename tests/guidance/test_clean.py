"""The clean latents that a step predicts: those of the schedulers themselves, and the preview of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LMSDiscreteScheduler,
    SCMScheduler,
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image
from tiny import tiny_flux, tiny_pipeline
from tiny_families import tiny_cogview3_plus

import elakit
from elakit.errors import ModelError, SettingError
from elakit.guidance.clean import predicted_clean, watched_steps
from elakit.guidance.engine import noise_levels


def cogview3_plus_with_dpm() -> Any:
    pipe = tiny_cogview3_plus()
    pipe.scheduler = CogVideoXDPMScheduler()
    return pipe


@pytest.mark.parametrize("make", [lambda: tiny_pipeline(scheduler="euler-ancestral"), cogview3_plus_with_dpm])
def test_a_watched_run_has_the_image_of_its_seed(make: Any) -> None:
    """Schedulers that draw random numbers receive the run's generator; the latents are one of their arguments."""
    settings = {"seed": 7, "steps": 3, "height": 32, "width": 32, "progress": False}
    plain = elakit.generate(make(), "a [red car]", **settings)
    watched = elakit.generate(make(), "a [red car]", predicted=True, **settings)
    assert np.array_equal(np.asarray(plain.image), np.asarray(watched.image))
    assert watched.predicted is not None


KINDS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [DDIMScheduler, DDPMScheduler, EulerDiscreteScheduler, LMSDiscreteScheduler])
def test_it_is_what_the_scheduler_predicts(make: Any, kind: str) -> None:
    scheduler = make(prediction_type=kind, **({"clip_sample": False} if "DD" in make.__name__ else {}))
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler)
    latents, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = latents * float(scheduler.init_noise_sigma)
    for level, timestep in zip(levels, scheduler.timesteps, strict=True):
        scheduler.scale_model_input(latents, timestep)
        step = scheduler.step(output, timestep, latents)
        found = predicted_clean(scheduler, output, latents, level)
        assert found is not None
        scale = float(step.pred_original_sample.abs().max())
        assert float((found - step.pred_original_sample).abs().max()) < 2e-3 * scale
        latents = step.prev_sample


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("make", [EDMEulerScheduler, EDMDPMSolverMultistepScheduler])
def test_schedulers_that_scale_the_output_predict_the_same(make: Any, kind: str) -> None:
    """EDM, as in Playground 2.5, a Stable Diffusion XL pipeline."""
    scheduler = make(prediction_type=kind)
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler)
    assert levels[0] == pytest.approx(scheduler.config.sigma_max)
    latents, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    for level, sigma in zip(levels, scheduler.sigmas, strict=False):
        found = predicted_clean(scheduler, output, latents * sigma, level)
        torch.testing.assert_close(found, scheduler.precondition_outputs(latents * sigma, output, sigma))


@pytest.mark.parametrize("make", [DDIMScheduler, EulerDiscreteScheduler])
def test_a_first_step_of_pure_noise_has_a_finite_level(make: Any) -> None:
    scheduler = make(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    levels = noise_levels(scheduler)
    assert levels[0] == pytest.approx(4096, rel=1e-3)
    assert levels == sorted(levels, reverse=True)
    latents, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    latents = latents * float(scheduler.init_noise_sigma)
    found = predicted_clean(scheduler, output, latents, levels[0])
    torch.testing.assert_close(found, -output, atol=5e-3, rtol=0)  # there is no signal to be added


def test_a_scheduler_whose_noise_is_not_known_is_refused() -> None:
    scheduler = SCMScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ModelError, match=r"SCMScheduler are not known.*scheduler='DDIMScheduler'"):
        noise_levels(scheduler)


def test_flow_matching_and_solvers_recover_the_clean_latents() -> None:
    clean, noise = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow.set_timesteps(5)
    for level, sigma in zip(noise_levels(flow), flow.sigmas, strict=False):
        latents = (1 - sigma) * clean + sigma * noise
        if sigma < 0.999:
            found = predicted_clean(flow, noise - clean, latents, level)
            torch.testing.assert_close(found, clean, atol=1e-4, rtol=1e-4)
    solver = DPMSolverMultistepScheduler()
    solver.set_timesteps(5)
    for level, timestep in zip(noise_levels(solver), solver.timesteps, strict=True):
        latents = solver.add_noise(clean, noise, timestep[None])
        found = predicted_clean(solver, noise, latents, level)
        torch.testing.assert_close(found, clean, atol=0.02, rtol=0.02)


def test_steps_stay_as_they_are_and_the_scheduler_is_left_unchanged() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(3)
    latents, output = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = scheduler.step(output, scheduler.timesteps[0], latents, return_dict=False)[0]
    with watched_steps(scheduler) as steps:
        assert steps.predicted(0) is None
        assert torch.equal(scheduler.step(output, scheduler.timesteps[0], latents, return_dict=False)[0], plain)
        assert steps.predicted(0) is not None
    assert "step" not in vars(scheduler)


def test_the_preview_of_a_run_comes_closer_to_the_image_than_its_latents() -> None:
    shown: list[np.ndarray] = []
    noisy: list[np.ndarray] = []

    def look(so_far: elakit.Progress) -> bool:
        shown.append(np.asarray(so_far.runs(predicted=True)[0].image, float))
        noisy.append(np.asarray(so_far.runs()[0].image, float))
        return False

    pipe = elakit.load("picture-world")
    run = elakit.generate(pipe, "a [cat] and a [lion]", steps=5, stop_if=look, record=False, progress=False)
    final = np.asarray(run.image, float)
    off = [np.abs(image - final).mean() for image in shown]
    before = [np.abs(image - final).mean() for image in noisy]
    assert all(one < other for one, other in zip(off[:3], before[:3], strict=True))
    assert off[-1] < 2


def test_packed_latents_are_predicted_in_a_batch() -> None:
    pipe, sizes = tiny_flux(), set[tuple[int, int]]()

    def look(so_far: elakit.Progress) -> None:
        sizes.update(run.image.size for run in so_far.runs(predicted=True))

    elakit.generate(
        pipe, "a [car]", seed=[1, 2], steps=2, height=32, width=48, stop_if=look, record=False, progress=False
    )
    assert sizes == {(48, 32)}


def test_a_run_keeps_what_its_steps_predict_and_its_image_stays() -> None:
    pipe, text, seeds = tiny_pipeline(), "a [red car] and a [blue bird]", [1, 2]
    watched: list[list[Image.Image]] = []
    plain = elakit.generate(
        pipe, text, seed=seeds, steps=3, progress=False,
        stop_if=lambda so_far: watched.append([run.image for run in so_far.runs(predicted=True)]),
    )  # fmt: skip
    runs = elakit.generate(pipe, text, seed=seeds, steps=3, predicted=True, progress=False)
    for i, (run, other) in enumerate(zip(runs, plain, strict=True)):
        assert other.predicted is None
        assert np.array_equal(np.asarray(run.image), np.asarray(other.image))
        assert run.predicted is not None
        assert [one.tobytes() for one in run.predicted] == [images[i].tobytes() for images in watched]
    early = elakit.generate(pipe, text, steps=3, predicted=True, stop_if=lambda at: at.step == 1, progress=False)
    assert early.predicted is not None
    assert len(early.predicted) == 2


def test_predicted_images_are_refused_for_a_schedule_that_begins_in_its_middle() -> None:
    pipe = StableDiffusionImg2ImgPipeline(**tiny_pipeline().components)
    photo = {"image": Image.new("RGB", (32, 32))}
    with pytest.raises(SettingError, match="StableDiffusionImg2ImgPipeline"):
        elakit.generate(pipe, "a [car]", call=photo, predicted=True, progress=False)
