"""ELA's gradient is the true one, it changes nothing it should not, and cleans up behind itself."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import tiny_pipeline

from elakit.errors import ModelError, SettingError
from elakit.generation import generate
from elakit.guidance import (
    ELA,
    Anchors,
    AttendAndExcite,
    FromMaps,
    LatentStep,
    RegionalAttention,
    Separation,
    Update,
)
from elakit.guidance.engine import gradient, reading
from elakit.guidance.layout import apart, layout_masks
from elakit.models import adapter_for
from elakit.prompt import Prompt, parse
from elakit.run import open_run

PAIR = "a [red car] and a [blue bird]"
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
OFF = Separation(step_size=0)  # anchoring alone


def hooks_of(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def setting(pipe: Any, text: str = PAIR, **options: Any) -> tuple[Any, ...]:
    """Arguments of the engine's `gradient`, at the fourth of ten steps from fixed noise."""
    adapter, prompt = adapter_for(pipe), parse(text, pipe)
    method = ELA(anchor=LatentStep(start=0, needed=None, enough=None, **options), size=8)
    embeds = adapter.encode(prompt.text, guided=False)
    pipe.scheduler.set_timesteps(10)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3)).to(pipe.unet.dtype)
    layers = method.select(adapter.layers(), (8, 8))
    return adapter, method, prompt, layers, latents, pipe.scheduler.timesteps[3], embeds


@pytest.mark.parametrize("term", ["outside", "presence", "intrusion", "attributes", "all"])
def test_the_gradient_agrees_with_central_differences(term: str) -> None:
    weights = {} if term == "all" else {t: float(t == term) for t in ("outside", "presence", "intrusion", "attributes")}
    adapter, method, prompt, layers, latents, timestep, embeds = setting(tiny_pipeline(torch.float64), **weights)
    (first,), _ = gradient(adapter, method, prompt, layers, latents, timestep, embeds)

    def at(z: torch.Tensor) -> tuple[float, torch.Tensor]:
        # the regions are constants of the loss, so they are held while the latent is varied
        (loss,), grad = gradient(adapter, method, prompt, layers, z, timestep, embeds, states=[Anchors(first.regions)])
        return float(loss.total.detach()), grad

    _, grad = at(latents)
    step = 1e-5
    for seed in range(5):
        direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numeric = (at(latents + step * direction)[0] - at(latents - step * direction)[0]) / (2 * step)
        assert numeric == pytest.approx(float((grad * direction).sum()), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["raw", "normalized"])
def test_one_slight_step_lowers_the_loss(dtype: torch.dtype, kind: str) -> None:
    adapter, method, prompt, layers, latents, timestep, embeds = setting(tiny_pipeline(dtype), gradient=kind)
    (before,), grad = gradient(adapter, method, prompt, layers, latents, timestep, embeds)
    assert grad.dtype == torch.float32
    length = 0.05 / float(method.direction(grad).pow(2).mean().sqrt())
    moved = latents.float() - length * method.direction(grad)
    (after,), _ = gradient(adapter, method, prompt, layers, moved, timestep, embeds, states=[Anchors(before.regions)])
    assert float(after.total.detach()) < float(before.total.detach())


def test_half_precision_finds_the_same_direction() -> None:
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        adapter, method, prompt, layers, latents, timestep, embeds = setting(tiny_pipeline(dtype))
        state = Anchors(np.stack([np.tri(8, dtype=bool), ~np.tri(8, dtype=bool)]))
        grads.append(gradient(adapter, method, prompt, layers, latents, timestep, embeds, states=[state])[1].flatten())
    assert float(torch.cosine_similarity(*grads, dim=0)) > 0.97


def test_the_pass_stops_after_the_last_layer_that_is_read_and_leaves_weights_alone() -> None:
    pipe = tiny_pipeline()
    run: list[str] = []
    pipe.unet.conv_out.register_forward_hook(lambda *_: run.append("conv_out"))
    adapter, method, prompt, _, latents, timestep, embeds = setting(pipe)
    mid = [layer for layer in adapter.layers() if layer.place == "mid"]
    pipe.unet.up_blocks[0].resnets[0].register_forward_hook(lambda *_: run.append("up"))
    with reading(adapter, mid) as read:
        maps = read(latents, timestep, embeds)[0].mean
    assert not run
    assert maps.shape == (20, 4, 4)
    assert torch.allclose(maps.sum(0), torch.ones(4, 4), atol=1e-5)
    wanted = [p.requires_grad for p in pipe.unet.parameters()]
    generate(pipe, prompt, steps=3, guidance=method, progress=False)
    assert [p.requires_grad for p in pipe.unet.parameters()] == wanted
    assert all(p.grad is None for p in pipe.unet.parameters())


@pytest.mark.parametrize("scheduler", ["ddim", "euler", "euler-ancestral", "pndm", "dpm++", "heun"])
def test_ela_starts_from_the_plain_runs_noise_and_ends_where_its_window_ends(scheduler: str) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    plain = generate(pipe, PAIR, seed=5, steps=4, progress=False)
    ela = generate(
        pipe, PAIR, seed=5, steps=4, guidance=ELA(anchor=LatentStep(start=0, guided=0.5, step_size=0.3)), progress=False
    )
    still = generate(
        pipe, PAIR, seed=5, steps=4, guidance=ELA(anchor=LatentStep(step_size=0), separate=OFF), progress=False
    )
    assert ela.guidance is not None
    # Heun and PNDM call the model more often than they step; the window is a share of the calls
    assert ela.guidance.to_frame().index.tolist() == list(range(round(len(pipe.scheduler.timesteps) / 2)))
    assert np.any(np.asarray(ela.image) != np.asarray(plain.image))
    assert np.array_equal(np.asarray(still.image), np.asarray(plain.image))
    assert len(ela.recording.steps) == len(plain.recording.steps)


def test_guidance_that_reads_records_nothing_of_its_own() -> None:
    pipe = tiny_pipeline()
    spec_off = generate(pipe, PAIR, seed=1, steps=3, guidance=ELA(), record=False, progress=False)
    recorded = generate(pipe, PAIR, seed=1, steps=3, guidance=ELA(), progress=False)
    assert np.array_equal(np.asarray(spec_off.image), np.asarray(recorded.image))
    assert spec_off.recording is None
    assert recorded.recording.steps == (0, 1, 2)


def test_an_image_that_needs_no_help_is_left_alone_from_there_on() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=[5, 6], steps=6, record=False, progress=False)
    always = generate(pipe, PAIR, seed=[5, 6], steps=6, guidance=ELA(separate=OFF), record=False, progress=False)
    short = [run.guidance.to_frame()["shortfall"].iloc[0] for run in always]
    between = float(np.mean(short))
    better = int(np.argmin(short))
    runs = generate(
        pipe,
        PAIR,
        seed=[5, 6],
        steps=6,
        guidance=ELA(anchor=LatentStep(needed=between, enough=between), separate=OFF),
        record=False,
        progress=False,
    )
    (row,) = runs[better].guidance.rows
    assert not row["guided"]
    assert (row["step_size"], row["gradient_norm"], row["moved"]) == (0, 0, 0)
    assert runs[better].guidance.guided == ()
    assert repr(runs[better].guidance) == "Trace(ela, 0 guided steps)"
    assert np.array_equal(np.asarray(runs[better].image), np.asarray(plain[better].image))
    worse = runs[1 - better].guidance.to_frame()
    assert worse["moved"].iloc[0] > 0
    assert (worse["shortfall"].iloc[:-1] > between).all()
    assert worse["guided"].tolist() == (worse["shortfall"] > between).tolist()


def test_every_other_step_may_be_guided() -> None:
    run = generate(
        tiny_pipeline(),
        PAIR,
        seed=5,
        steps=8,
        guidance=ELA(anchor=LatentStep(every=2, guided=0.5), separate=OFF),
        record=False,
        progress=False,
    )
    assert run.guidance is not None
    assert run.guidance.to_frame().index.tolist() == [1, 3]  # of 8 steps one is made before guidance begins


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline()

    def broken(*args: Any, **options: Any) -> Any:
        loss, grad = gradient(*args, **options)
        return loss, grad * float("nan")

    monkeypatch.setattr("elakit.guidance.engine.gradient", broken)
    plain = generate(pipe, PAIR, seed=2, steps=4, progress=False)
    with pytest.warns(UserWarning, match="Guidance skipped 2 steps of seed 2, .* ela's loss was NaN or infinite"):
        ela = generate(
            pipe, PAIR, seed=2, steps=4, guidance=ELA(anchor=LatentStep(guided=0.5), separate=OFF), progress=False
        )
    assert ela.guidance.skipped == 2
    assert np.array_equal(np.asarray(plain.image), np.asarray(ela.image))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_are_gone_after_an_error_in_the_middle(error: type[BaseException]) -> None:
    class Fails(ELA):
        def loss(self, attention: Any, prompt: Any, step: int, state: Any) -> Any:
            if step == 1:
                raise error
            return super().loss(attention, prompt, step, state)

    pipe = tiny_pipeline()
    before = hooks_of(pipe.unet)
    with pytest.raises(error):
        generate(pipe, PAIR, steps=4, guidance=Fails(anchor=LatentStep(guided=0.5)), progress=False)
    assert hooks_of(pipe.unet) == before
    assert all(p.requires_grad for p in pipe.unet.parameters())
    generate(pipe, PAIR, steps=2, progress=False)


def test_regions_stay_once_they_are_locked() -> None:
    pipe = tiny_pipeline()
    ela = generate(
        pipe,
        PAIR,
        steps=6,
        guidance=ELA(localize=FromMaps(lock_from=2), anchor=LatentStep(start=0, guided=1, step_size=0.5)),
        progress=False,
    )
    regions = ela.guidance.regions
    assert regions.sizes["step"] == 6
    assert not (regions.sum("entity") > 1).any()
    for step in (3, 4, 5):
        assert np.array_equal(regions.sel(step=step), regions.sel(step=2))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: FromMaps(binarization="otsu", threshold=0.2), "threshold.*binarization='background' only"),
        (lambda: FromMaps(quantile=0.5), "quantile.*binarization='quantile' only"),
        (lambda: FromMaps(binarization="mean-std", background="start"), "background.*only"),
        (lambda: ELA(regions=HALVES, localize=FromMaps(smooth=1)), "localize.*omitted"),
        (lambda: RegionalAttention(layout="maps", regions=HALVES), "layout='maps'.*None"),
        (lambda: ELA(localize="maps"), "localize='maps'.*a FromMaps"),
        (lambda: ELA(anchor=FromMaps()), "anchor=.*a LatentStep"),
    ],
)
def test_an_option_without_effect_is_refused(make: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        make()


def test_a_misspelled_option_is_refused() -> None:
    with pytest.raises(TypeError, match="stepsize"):
        LatentStep(stepsize=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "method", [ELA(), RegionalAttention(), AttendAndExcite(refine=())], ids=lambda method: method.name
)
def test_a_run_too_short_for_a_method_is_reported(method: Any) -> None:
    """Distilled models take one step, where most methods guide none."""
    pipe = tiny_pipeline()
    with pytest.warns(UserWarning, match=f"{method.name} acts at no step of this run \\(1 step, 2 entities\\)"):
        generate(pipe, PAIR, steps=1, guidance=method, record=False, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(pipe, PAIR, steps=8, guidance=method, record=False, progress=False)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_guidance_works_inside_inference_mode(scheduler: str) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    method = ELA(anchor=LatentStep(start=0, guided=0.5, step_size=0.3))
    outside = generate(pipe, PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    with torch.inference_mode():
        inside = generate(pipe, PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    assert np.array_equal(np.asarray(outside.image), np.asarray(inside.image))
    assert (inside.guidance.to_frame().moved > 0).all()


def test_a_model_loaded_inside_inference_mode_is_refused() -> None:
    pipe = tiny_pipeline()
    with torch.inference_mode():
        weight = pipe.unet.conv_in.weight.clone()
    pipe.unet.conv_in.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(ModelError, match=r"loaded within torch\.inference_mode"):
        generate(pipe, PAIR, steps=4, guidance=ELA(), record=False, progress=False)


def test_a_batch_guides_each_image_by_its_own_loss() -> None:
    pipe = tiny_pipeline()
    method = ELA(anchor=LatentStep(step_size=0.3, start=0, guided=1))
    batch = generate(pipe, PAIR, seed=[4, 9], steps=3, guidance=method, progress=False)
    for run in batch:
        alone = generate(pipe, PAIR, seed=run.seed, steps=3, guidance=method, progress=False)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
        assert run.guidance is not None
        assert alone.guidance is not None
        assert run.guidance.to_frame().loss.tolist() == pytest.approx(alone.guidance.to_frame().loss.tolist(), rel=1e-4)
        assert run.entity_maps().sizes == alone.entity_maps().sizes
        np.testing.assert_allclose(run.entity_maps(), alone.entity_maps(), atol=1e-4)
    assert batch[0].guidance.to_frame().loss[0] != batch[1].guidance.to_frame().loss[0]


class Refined(ELA):
    """ELA that steps on until its loss is low enough."""

    def __init__(self, until: float) -> None:
        super().__init__()
        object.__setattr__(self, "until", until)

    def plan(self, noise: Any, prompt: Prompt) -> list[Update]:
        return [Update(0.05, repeats=3, until=vars(self)["until"]) for _ in noise]


@pytest.mark.parametrize(("until", "taken"), [(0.0, 3), (100.0, 0)])
def test_refinement_ends_at_its_loss_or_its_limit_and_one_step_follows(until: float, taken: int) -> None:
    pipe = tiny_pipeline()
    run = generate(pipe, PAIR, steps=2, guidance=Refined(until), progress=False)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert frame.refinements.tolist() == [taken, taken]
    # steps of a normalized gradient are of one length; they may turn, so the whole way is no longer than their sum
    assert (frame.moved <= 0.05 * (taken + 1) * 1.001).all()
    assert (frame.moved > 0.05 * (taken + 1) / 3).all()


def test_self_attention_is_read_beside_cross_attention_and_sums_to_one() -> None:
    pipe = tiny_pipeline()
    adapter, _, _, layers, latents, timestep, embeds = setting(pipe)
    with reading(adapter, layers, reads_self=True) as read:
        (seen,) = read(latents, timestep, embeds)
    with reading(adapter, layers) as read:
        plain = read(latents, timestep, embeds)[0]
    assert len(seen.own) == len(seen.cross) == len(layers)
    assert torch.equal(seen.mean, plain.mean)
    assert torch.allclose(seen.own_mean.sum((-2, -1)), torch.ones(seen.own_mean.shape[:2]), atol=1e-5)
    block = layers[-1].block.transformer_blocks[0]
    kept: list[torch.Tensor] = []
    handle = block.attn1.register_forward_pre_hook(lambda module, args: kept.append(args[0]))
    with torch.no_grad():
        adapter.denoise(latents, timestep, embeds)
    handle.remove()
    query, key = (
        project(kept[0]).unflatten(-1, (block.attn1.heads, -1)).transpose(1, 2)
        for project in (block.attn1.to_q, block.attn1.to_k)
    )
    wanted = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)[0]
    torch.testing.assert_close(seen.own[-1].flatten(3).flatten(1, 2), wanted, atol=1e-5, rtol=0)


# -- regions given by hand ---------------------------------------------------------------------------------------------


def test_ela_anchors_to_regions_given_by_hand() -> None:
    pipe = tiny_pipeline()
    boxes = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    masks = np.zeros((2, 32, 32), bool)
    masks[0, :, :16] = masks[1, :, 16:] = True
    by_box = generate(pipe, PAIR, steps=4, guidance=ELA(regions=boxes), progress=False)
    by_mask = generate(pipe, PAIR, steps=4, guidance=ELA(regions=masks), progress=False)
    assert by_box.guidance is not None
    regions = by_box.guidance.regions
    assert regions is not None
    half = regions.sizes["x"] // 2
    assert regions.isel(entity=0, step=0).values[:, :half].all()
    assert not regions.isel(entity=0).values[..., half:].any()
    assert np.array_equal(np.asarray(by_box.image), np.asarray(by_mask.image))


def test_a_run_with_regions_by_hand_is_saved_and_reopened(tmp_path: Path) -> None:
    run = generate(tiny_pipeline(), PAIR, steps=2, guidance=ELA(regions=np.ones((2, 3, 3), bool)), progress=False)
    run.save(tmp_path / "run")
    assert open_run(tmp_path / "run").guidance.options["regions"] == np.ones((2, 3, 3)).tolist()


@given(
    masks=arrays(bool, st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))),
    rows=st.integers(1, 7),
    columns=st.integers(1, 7),
)
def test_no_entity_loses_its_mask_on_another_grid_and_regions_never_overlap(
    masks: np.ndarray, rows: int, columns: int
) -> None:
    masks[:, 0, 0] = True  # none is empty
    there = layout_masks(masks, (rows, columns), len(masks))
    assert there.any((1, 2)).all()
    assert apart(there).sum(0).max() <= 1


@pytest.mark.parametrize(
    ("layout", "part"),
    [
        ([(0, 0, 1)], "not a box"),
        ([(0.5, 0, 0.5, 1)], "not a box"),
        ([(0, 0, 2, 1)], "not a box"),
        ("left", "not a layout"),
        (np.zeros((1, 4, 4), bool), "empty"),
    ],
)
def test_a_layout_that_is_none_is_refused_with_an_example(layout: Any, part: str) -> None:
    with pytest.raises(SettingError, match=rf"{part}.*one box per entity"):
        ELA(regions=layout)


def test_a_layout_needs_a_region_for_each_entity() -> None:
    with pytest.raises(SettingError, match="1 region, but the prompt has 2 entities"):
        generate(tiny_pipeline(), PAIR, steps=2, guidance=ELA(regions=[(0, 0, 1, 1)]), progress=False)


@pytest.mark.parametrize(
    ("regions", "start", "first"),
    [(None, None, 4), (None, 0, 0), (HALVES, None, 0), ([(0, 0, 0.5, 1), None], None, 4)],
)
def test_localized_regions_wait_for_maps_that_are_not_noise(
    regions: Any, start: float | None, first: int, prompt: Prompt
) -> None:
    anchor = LatentStep(start=start, step_size=0.1, decay=0.5, guided=0.08)
    sizes = [update.size for update in ELA(anchor=anchor, regions=regions, separate=OFF).plan([1.0] * 25, prompt)]
    assert sizes == [0.0] * first + [0.1, 0.05]
