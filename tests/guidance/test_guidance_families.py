"""Every family is generated and guided as by its own pipeline: the same noise, passes, timesteps and images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    PixArtTransformer2DModel,
)
from guided_families import FAMILIES, PAIR, SIZE, UNBINNED, Family, shared
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3
from torch import Tensor

from elakit.errors import ModelError, RecordingError, SettingError
from elakit.generation import generate
from elakit.guidance import ELA, Anchors, Attention, FromMaps, LatentStep, RegionalAttention
from elakit.guidance.engine import checkpointing, gradient, noise_levels, reading
from elakit.models import StableDiffusion3, adapter_for
from elakit.prompt import parse

PLAIN = "a red car and a blue bird"


def large_pixart() -> Any:
    """A pipeline at the size that needs resolution and aspect ratio as conditions."""
    pipe = tiny_pixart()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Any = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=128,
            norm_num_groups=4,
        )
    pipe.transformer = net.eval()
    return pipe


def schnell() -> Any:
    """FLUX whose guidance has no scale."""
    pipe = tiny_flux()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net: Any = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(4, 6, 6),
        )
    pipe.transformer = net.eval()
    return pipe


VARIANTS = {
    "pixart-alpha, told the size": Family(large_pixart, UNBINNED),
    "sd with distilled guidance": Family(lambda: tiny_pipeline(time_cond_proj_dim=8), stacked=False),
    "sd3 without t5": Family(lambda: tiny_sd3(t5=False)),
    "flux schnell": Family(schnell, negative=None, stacked=False),
}


def own(pipe: Any, family: Family, **options: Any) -> Any:
    """Image of the pipeline's own call, with the arguments that users give."""
    settings = {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(9), **SIZE} | family.options
    return pipe(PLAIN, **settings | options).images


def inputs(pipe: Any, run: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    """Result of a run, and the latents of each call of the denoiser, those of guidance included."""
    seen: list[Tensor] = []
    handle = adapter_for(pipe).denoiser.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone()),
        with_kwargs=True,
    )
    try:
        return run(), seen
    finally:
        handle.remove()


def scaled(pipe: Any, latents: Tensor, step: int) -> Tensor:
    """Latents as the scheduler gives them to the model: SDXL's Euler scales them, the others leave them as they are."""
    sigma = pipe.scheduler.sigmas[step] if isinstance(pipe.scheduler, EulerDiscreteScheduler) else 0
    return latents / (sigma**2 + 1) ** 0.5


# -- as the pipeline does it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "with_negative"), [(1.0, True), (5.0, True), (5.0, False)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_image_is_the_one_the_pipeline_draws_itself(name: str, scale: float, with_negative: bool) -> None:
    family, pipe = FAMILIES[name], shared(name)
    negative = {"negative_prompt": family.negative} if with_negative and family.negative else {}
    run = generate(pipe, PAIR, seed=9, steps=3, guidance_scale=scale, progress=False, **negative, **SIZE)
    (image,) = own(pipe, family, guidance_scale=scale, **negative)
    assert np.array_equal(np.asarray(run.image), np.asarray(image))


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_a_conditional_pass_is_the_pipelines_own(name: str) -> None:
    family = (FAMILIES | VARIANTS)[name]
    pipe = shared(name) if name in FAMILIES else family.make()
    adapter = adapter_for(pipe)
    seen: list[tuple[Tensor, Tensor]] = []

    def listen(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    handle = adapter.denoiser.register_forward_hook(listen, with_kwargs=True)
    negative = {"negative_prompt": family.negative} if family.negative else {}
    own(pipe, family, guidance_scale=5.0, num_images_per_prompt=2, output_type="latent", **negative)
    handle.remove()
    conditioning = adapter.encode(PLAIN, family.negative, size=(32, 48), guidance_scale=5.0)
    assert len(seen) == 3
    for (latents, output), timestep in zip(seen, pipe.scheduler.timesteps, strict=True):
        rows = slice(len(latents) // 2 if family.stacked else 0, None)
        assert len(latents[rows]) == 2
        with torch.no_grad():
            predicted = adapter.denoise(latents[rows], timestep, conditioning)
        torch.testing.assert_close(predicted, output[rows], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("flux", {"guidance_scale": 1.0}),
        ("sd with distilled guidance", {"guidance_scale": 1.0}),
        ("sdxl", {"size": (64, 48)}),
        ("pixart-alpha, told the size", {"size": (64, 48)}),
    ],
)
def test_what_a_model_is_told_beside_the_text_makes_a_difference(name: str, change: dict[str, Any]) -> None:
    """The test above can fail: wrong micro-conditioning changes the result."""
    pipe = (FAMILIES | VARIANTS)[name].make()
    adapter = adapter_for(pipe)
    latents = adapter.noise(torch.Generator().manual_seed(9), 32, 48)
    told = {"size": (32, 48), "guidance_scale": 5.0}
    with torch.no_grad():
        one, other = (
            adapter.denoise(latents, torch.tensor(500), adapter.encode(PLAIN, **settings))
            for settings in (told, told | change)
        )
    assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize(("name", "dynamic"), [(name, False) for name in FAMILIES] + [("sd3", True), ("flux", True)])
def test_noise_and_timesteps_are_those_of_the_call(name: str, dynamic: bool) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    if dynamic:  # shifted by the size of the image, so much that the size is felt
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64
        )
    adapter = adapter_for(pipe)
    noise = adapter.noise(torch.Generator().manual_seed(9), 32, 48)
    scale = adapter.set_timesteps(4, 32, 48)
    timesteps, first = pipe.scheduler.timesteps.clone(), scaled(pipe, noise * scale, 0)
    _, starts = inputs(pipe, lambda: own(pipe, family, num_inference_steps=4, output_type="latent"))
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    torch.testing.assert_close(starts[0][-1:], first)
    adapter.set_timesteps(4, 64, 64)
    assert torch.equal(pipe.scheduler.timesteps, timesteps) is not dynamic


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_step_starts_from_what_was_moved_after_the_last(name: str) -> None:
    pipe = shared(name)
    adapter = adapter_for(pipe)
    conditioning = adapter.encode(PLAIN, guided=False, size=(32, 48))
    noise = adapter.noise(torch.Generator().manual_seed(9), 32, 48)
    moved: list[Tensor] = []

    def move(step: int, latents: Tensor) -> Tensor:
        assert step == len(moved)
        moved.append(latents + 1)
        return moved[-1].clone()

    call = conditioning.arguments(1) | adapter.on_step(move) | SIZE
    result, starts = inputs(
        pipe, lambda: pipe(num_inference_steps=3, guidance_scale=1.0, latents=noise, output_type="latent", **call)
    )
    assert len(moved) == len(starts) == 3
    for step in (1, 2):
        torch.testing.assert_close(starts[step], scaled(pipe, moved[step - 1], step))
    assert torch.equal(result.images, moved[2])


def test_pixarts_steps_of_two_calls_are_counted_as_calls() -> None:
    """Its callback counts whole steps; guidance counts calls, and moves the latents before the first of each step."""
    pipe = tiny_pixart()
    pipe.scheduler = HeunDiscreteScheduler()
    called: list[int] = []
    call = adapter_for(pipe).on_step(lambda step, latents: called.append(step) or latents)
    own(pipe, FAMILIES["pixart-alpha"], output_type="latent", **call)
    assert called == [1, 3, 4]
    run = generate(pipe, PAIR, steps=3, guidance=ELA(anchor=LatentStep(start=0, guided=1)), progress=False, **SIZE)
    assert run.guidance is not None
    assert run.guidance.to_frame().index.tolist() == [0, 2, 4]


def test_a_flow_may_have_another_solver() -> None:
    pipe = tiny_sd3()
    pipe.scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    plain = generate(pipe, PAIR, seed=9, steps=3, record=False, progress=False, **SIZE)
    assert np.array_equal(np.asarray(plain.image), np.asarray(own(pipe, FAMILIES["sd3"])[0]))
    sigmas = pipe.scheduler.sigmas[1:3]
    assert noise_levels(pipe.scheduler)[1:] == pytest.approx((sigmas / (1 - sigmas)).tolist())
    options: dict[str, Any] = {"seed": 9, "steps": 3, "record": False, "progress": False, **SIZE}
    for method, guided in ((ELA(anchor=LatentStep(start=0, guided=1)), [0, 1, 2]), (RegionalAttention(), [1, 2])):
        ela = generate(pipe, PAIR, guidance=method, **options)
        assert ela.guidance is not None
        assert ela.guidance.to_frame().index.tolist() == guided


# -- guided ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_ela_starts_from_the_plain_runs_noise_and_moves_the_guided_steps_only(name: str) -> None:
    pipe = shared(name)
    options: dict[str, Any] = {"seed": 5, "steps": 4, "progress": False, **SIZE}
    plain, starts = inputs(pipe, lambda: generate(pipe, PAIR, record=False, **options))
    method = ELA(anchor=LatentStep(start=0, step_size=0.3, guided=0.5))
    ela, moved = inputs(pipe, lambda: generate(pipe, PAIR, guidance=method, **options))
    still = generate(pipe, PAIR, record=False, guidance=ELA(anchor=LatentStep(start=0, step_size=0)), **options)
    assert np.array_equal(np.asarray(still.image), np.asarray(plain.image))
    assert np.any(np.asarray(ela.image) != np.asarray(plain.image))
    assert len(moved) == len(starts) + 2
    torch.testing.assert_close(moved[0], starts[0][-1:])  # guidance looks at the noise before it moves it
    frame = ela.guidance.to_frame()
    assert frame.index.tolist() == [0, 1]
    assert frame.timestep.tolist() == pytest.approx(pipe.scheduler.timesteps[:2].tolist())
    assert frame.moved.tolist() == pytest.approx([0.3, 0.15], rel=1e-3)
    assert not frame.skipped.any()
    assert ela.recording.steps == (0, 1, 2, 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_is_guided_and_recorded_at_once_without_classifier_free_guidance(name: str) -> None:
    family, pipe = FAMILIES[name], shared(name)
    options: dict[str, Any] = {
        "seed": 1,
        "steps": 2,
        "guidance": ELA(anchor=LatentStep(start=0)),
        "guidance_scale": 1.0,
        "progress": False,
    }
    run = generate(pipe, PAIR, **options, **SIZE)
    alone = generate(pipe, PAIR, record=False, **options, **SIZE)
    assert np.array_equal(np.asarray(run.image), np.asarray(alone.image))
    assert run.guidance is not None
    assert run.guidance.to_frame().index.tolist() == [0]
    assert run.recording is not None
    assert run.recording.steps == (0, 1)
    maps = run.entity_maps()
    assert maps.shape == (2, 2, *family.cells)
    layers = "up" if family.decoder else "all"
    assert maps.equals(run.recording.maps("entities", layers, max(family.cells)))
    assert not (run.regions.sum("entity") > 1).any()
    measures = set(run.bleeding.to_frame()["measure"])
    assert "end_mass" in measures
    assert ("start_mass" in measures) == ("pixart" not in name and name != "flux")  # T5 has no start-of-text


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_agrees_with_central_differences(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make(torch.float64)
    adapter, prompt, method = adapter_for(pipe), parse(PAIR, pipe), ELA(anchor=LatentStep(needed=None))
    conditioning = adapter.encode(prompt.text, guided=False, size=(32, 32))
    noise = adapter.noise(torch.Generator().manual_seed(3), 32, 32)
    assert noise.dtype == torch.float64
    start = noise * adapter.set_timesteps(10, 32, 32)
    layers = method.select(adapter.layers(), (8, 8))
    timestep = pipe.scheduler.timesteps[3]
    (first,), _ = gradient(adapter, method, prompt, layers, start, timestep, conditioning)

    def at(latents: Tensor) -> tuple[float, Tensor]:
        # the regions are constants of the loss, so they are held while the latent is varied
        states = [Anchors(first.regions)]
        (loss,), grad = gradient(adapter, method, prompt, layers, latents, timestep, conditioning, states=states)
        return float(loss.total.detach()), grad

    _, grad = at(start)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    step, precision = (1e-3, 1e-2) if family.rounded else (1e-5, 1e-4)
    numeric = (at(start + step * direction)[0] - at(start - step * direction)[0]) / (2 * step)
    slope = float((grad * direction).sum())
    assert abs(slope) > 0.01 * float(grad.norm())  # the direction tells something
    assert numeric == pytest.approx(slope, rel=precision)


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpoints_leave_the_gradient_as_it_is(name: str) -> None:
    pipe = shared(name)
    adapter, prompt, method = adapter_for(pipe), parse(PAIR, pipe), ELA(anchor=LatentStep(needed=None))
    conditioning = adapter.encode(prompt.text, guided=False, size=(32, 32))
    latents = adapter.noise(torch.Generator().manual_seed(3), 32, 32) * adapter.set_timesteps(10, 32, 32)
    layers = method.select(adapter.layers(), (8, 8))
    passes: list[str] = []
    handle = layers[0].block.register_forward_pre_hook(lambda *_: passes.append("block"))
    at = adapter, method, prompt, layers, latents, pipe.scheduler.timesteps[3], conditioning
    (plain,), wanted = gradient(*at)
    once = len(passes)
    with checkpointing(pipe):
        (loss,), grad = gradient(*at)
    handle.remove()
    assert float(loss.total.detach()) == float(plain.total.detach())
    torch.testing.assert_close(grad, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()))
    assert len(passes) >= 2 * once  # something has been computed again


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_guides_each_image_by_its_own_loss(name: str) -> None:
    pipe = shared(name)
    options: dict[str, Any] = {
        "steps": 2,
        "guidance": ELA(anchor=LatentStep(start=0, step_size=0.3, guided=1)),
        "progress": False,
        **SIZE,
    }
    batch = generate(pipe, PAIR, seed=[4, 9], **options)
    losses = []
    for run in batch:
        alone = generate(pipe, PAIR, seed=run.seed, **options)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
        losses.append(run.guidance.to_frame().loss.tolist())
        assert losses[-1] == pytest.approx(alone.guidance.to_frame().loss.tolist(), rel=1e-3)
        np.testing.assert_allclose(run.entity_maps(), alone.entity_maps(), atol=1e-4)
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_half_precision_is_drawn_and_guided(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make(torch.bfloat16)
    plain = generate(pipe, PAIR, seed=9, steps=3, record=False, progress=False, **SIZE)
    assert np.array_equal(np.asarray(plain.image), np.asarray(own(pipe, family)[0]))
    ela = generate(
        pipe,
        PAIR,
        seed=9,
        steps=3,
        guidance=ELA(anchor=LatentStep(start=0, step_size=0.3)),
        record=False,
        progress=False,
        **SIZE,
    )
    assert np.any(np.asarray(ela.image) != np.asarray(plain.image))
    assert ela.guidance is not None
    assert ela.guidance.skipped == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_words_stay_where_they_are_held(name: str) -> None:
    pipe = shared(name)
    method = RegionalAttention(regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], strength=1000.0)
    run = generate(pipe, PAIR, seed=2, steps=2, guidance=method, progress=False, **SIZE)
    car, bird = run.entity_maps().isel(step=-1).values
    half = car.shape[1] // 2
    assert float(car[:, half:].sum()) < 1e-6 < float(car[:, :half].sum())
    assert float(bird[:, :half].sum()) < 1e-6 < float(bird[:, half:].sum())
    options: dict[str, Any] = {"seed": 2, "steps": 2, "record": False, "progress": False, **SIZE}
    still = generate(pipe, PAIR, guidance=RegionalAttention(strength=0), **options)
    assert np.array_equal(np.asarray(still.image), np.asarray(generate(pipe, PAIR, **options).image))


# -- what a family has not got -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_self_attention_is_read_in_every_family(name: str) -> None:
    pipe = shared(name)
    adapter = adapter_for(pipe)
    layers = ELA().select(adapter.layers(), (8, 12))
    own = [layer.name.replace("attn2", "attn1") if layer.kind == "cross" else layer.name for layer in layers]
    assert [layer.name for layer in adapter.self_layers(layers)] == own
    conditioning = adapter.encode(PLAIN, guided=False, size=(32, 48))
    latents = adapter.noise(torch.Generator().manual_seed(3), 32, 48)
    with torch.no_grad(), reading(adapter, layers, reads_self=True) as read:
        (seen,) = read(latents, torch.tensor(500), conditioning)
    assert len(seen.own) == len(seen.cross) == len(layers)
    cells = (4, 6) if name == "sd" else FAMILIES[name].cells  # ELA reads the coarsest maps of a decoder
    assert seen.own_mean.shape == (*cells, *cells)
    total = seen.own_mean.sum((-2, -1))
    if name in ("sd3", "flux"):  # image and text share one softmax
        total = total + torch.stack([layer.mean(0).sum(0) for layer in seen.cross]).mean(0)
    assert torch.allclose(total, torch.ones(cells), atol=1e-5)


def test_a_model_without_a_decoder_side_is_read_everywhere() -> None:
    for name in ("pixart-alpha", "sd3", "flux"):
        layers = adapter_for(shared(name)).layers()
        assert ELA().select(layers, (8, 12)) == layers
    unet = adapter_for(shared("sdxl")).layers()
    assert {layer.place for layer in ELA().select(unet, (8, 12))} == {"up"}
    single = ELA(layers="single").select(adapter_for(shared("flux")).layers(), (8, 12))
    assert [layer.place for layer in single] == ["single", "single"]
    with pytest.raises(RecordingError, match="'double', 'single'"):
        ELA(layers="mid").select(adapter_for(shared("flux")).layers(), (8, 12))


@pytest.mark.parametrize("background", ["start", "start+end"])
def test_a_text_without_a_start_has_its_end_for_background(background: Any) -> None:
    prompt = parse(PAIR, shared("flux"))
    maps = torch.rand(1, 20, 4, 6, generator=torch.Generator().manual_seed(0))
    maps[:, prompt.end_index :] *= 0.01  # else no word would stand out
    expected = ELA().loss(Attention((maps,)), prompt, 0, Anchors())
    first = maps.clone()
    first[:, 0] *= 1000  # "a", the first word
    loss = ELA(localize=FromMaps(background=background)).loss(Attention((first,)), prompt, 0, Anchors())
    assert np.array_equal(loss.regions, expected.regions)
    last = maps.clone()
    last[:, -1] *= 1000  # padding
    loss = ELA(localize=FromMaps(background=background)).loss(Attention((last,)), prompt, 0, Anchors())
    assert loss.regions.sum() < expected.regions.sum()


def test_a_negative_prompt_for_flux_is_refused_with_the_way_out() -> None:
    with pytest.raises(SettingError, match=r"negative_prompt='a dog'.*true_cfg_scale"):
        generate(shared("flux"), PAIR, negative_prompt="a dog", progress=False, **SIZE)


def test_a_family_without_an_encoding_is_recorded_but_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(StableDiffusion3, "_encode")
    with pytest.raises(ModelError, match=r"with elakit\.record"):
        generate(shared("sd3"), PAIR, progress=False)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_run_ended_after_its_last_step_gives_the_image_of_one_that_was_not(name: str) -> None:
    pipe = shared(name)
    whole = generate(pipe, PAIR, seed=2, steps=3, record=False, progress=False, **SIZE)
    ended = generate(
        pipe, PAIR, seed=2, steps=3, record=False, progress=False, stop_if=lambda so_far: so_far.step == 2, **SIZE
    )
    assert ended.settings["stopped"] == 3
    assert np.array_equal(np.asarray(ended.image), np.asarray(whole.image))
