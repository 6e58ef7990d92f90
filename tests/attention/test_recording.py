"""Recording: the image is unchanged, the numbers are right, the size is known before, and recordings can be read."""

from __future__ import annotations

import gc
import json
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import Attention
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from tiny import SCHEDULERS, tiny_pipeline

from elakit.attention import (
    Recording,
    RecordSpec,
    open_recording,
    paused,
    record,
    select_layers,
    tap,
    zarr_store,
)
from elakit.attention.layout import build_node, build_tree
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.measures.arrays import resize
from elakit.models import AttentionLayer, adapter_for
from elakit.prompt import Entity, Prompt, Token, parse

TEXT = "a [red car] and a [blue bird]"


def draw(pipe: Any, text: str | list[str], steps: int = 3, **options: Any) -> np.ndarray:
    """Generate an image from a fixed seed, as an array."""
    options = {"generator": torch.Generator().manual_seed(7), "output_type": "np"} | options
    return pipe(text, num_inference_steps=steps, **options).images


def count_hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def add_lora(pipe: Any) -> None:
    pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))


def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 0:
        pipe._guidance_scale = 1.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[1]
    return tensors


# -- the image -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_image_is_bit_identical_and_every_call_is_kept(scheduler: str, guidance_scale: float) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, prompt.text, guidance_scale=guidance_scale)
    calls: list[float] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: calls.append(float(args[1])))
    with record(pipe, prompt, RecordSpec(tokens="all", heads="all", dtype="float32")) as recording:
        recorded = draw(pipe, prompt.text, guidance_scale=guidance_scale)
    assert np.array_equal(plain, recorded)
    assert recording.steps == tuple(range(len(calls)))
    for node in recording.tree.children.values():
        assert node["timestep"].values.tolist() == calls


WAYS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "attention slicing": (lambda pipe: pipe.enable_attention_slicing("max"), {}),
    "lora": (add_lora, {}),
    "channels last": (lambda pipe: pipe.unet.to(memory_format=torch.channels_last), {}),
    "not square": (lambda pipe: None, {"height": 32, "width": 48}),
    "not square, unguided": (lambda pipe: None, {"height": 40, "width": 24, "guidance_scale": 1.0}),
    "several images": (lambda pipe: None, {"num_images_per_prompt": 3}),
    "negative prompt": (lambda pipe: None, {"negative_prompt": "a dog"}),
    "guidance ends midway": (
        lambda pipe: None,
        {
            "callback_on_step_end": end_guidance,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_records_whatever_way_the_pipeline_is_run(way: str, pipe: Any, prompt: Prompt) -> None:
    prepare, options = WAYS[way]
    prepare(pipe)
    plain = draw(pipe, prompt.text, **options)
    with record(pipe, prompt, RecordSpec(dtype="float32")) as recording:
        recorded = draw(pipe, prompt.text, **options)
    assert np.array_equal(plain, recorded)
    assert len(recording.steps) == 3
    height, width = options.get("height", 32) // 4, options.get("width", 32) // 4
    assert recording.sizes == ((height, width), (-(-height // 2), -(-width // 2)))
    for node in recording.tree.children.values():
        assert node.sizes["image"] == options.get("num_images_per_prompt", 1)
        np.testing.assert_allclose(node["probability"].sum("token"), 1, atol=1e-5)


def test_half_precision_and_autocast_keep_float32_probabilities(pipe: Any) -> None:
    half = tiny_pipeline(dtype=torch.bfloat16)
    prompt = parse(TEXT, half)
    plain = draw(half, prompt.text, output_type="latent")
    with record(half, prompt, RecordSpec(dtype="float32")) as recording:
        recorded = draw(half, prompt.text, output_type="latent")
    assert torch.equal(plain, recorded)
    # bfloat16 probabilities would sum to 1 only within 1e-2
    np.testing.assert_allclose(recording.tree["8x8"]["probability"].sum("token"), 1, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16), record(pipe, prompt, RecordSpec(dtype="float32")) as recording:
        draw(pipe, prompt.text, steps=1, output_type="latent")
    np.testing.assert_allclose(recording.tree["8x8"]["probability"].sum("token"), 1, atol=1e-5)


def test_image_to_image_keeps_only_the_calls_that_ran(pipe: Any, prompt: Prompt) -> None:
    drawing = draw(pipe, prompt.text)
    again = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    again.set_progress_bar_config(disable=True)
    plain = draw(again, prompt.text, steps=4, image=drawing, strength=0.5)
    with record(again, prompt, RecordSpec(steps=slice(-1, None), dtype="float32")) as recording:
        assert np.array_equal(plain, draw(again, prompt.text, steps=4, image=drawing, strength=0.5))
    assert recording.steps == (1,)
    assert recording.tree.attrs["expected"] == 2


# -- the numbers -----------------------------------------------------------------------------------------------------


def independent(pipe: Any, run: Callable[[], Any], guided: bool) -> dict[str, list[np.ndarray]]:
    """Compute probabilities from the layers' inputs and weights alone; per layer one array (B, heads, n, text) per
    call."""
    found: dict[str, list[np.ndarray]] = {}
    handles = []

    def listen(name: str, module: Any) -> None:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            image = args[0] if args else kwargs["hidden_states"]
            text = kwargs["encoder_hidden_states"]
            q_weight, k_weight = (w.weight.detach().double().numpy() for w in (module.to_q, module.to_k))
            rows = []
            for b in range(image.shape[0] // 2 if guided else 0, image.shape[0]):
                q = image[b].double().numpy() @ q_weight.T
                k = text[b].double().numpy() @ k_weight.T
                heads, d = [], q.shape[1] // module.heads
                for h in range(module.heads):
                    part = slice(h * d, (h + 1) * d)
                    scores = np.exp(q[:, part] @ k[:, part].T / np.sqrt(d))
                    heads.append(scores / scores.sum(1, keepdims=True))
                rows.append(heads)
            found.setdefault(name, []).append(np.array(rows))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for name, module in pipe.unet.named_modules():
        if name.endswith("attn2"):
            listen(name, module)
    run()
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("guidance_scale", "options"),
    [(7.5, {}), (1.0, {}), (7.5, {"height": 32, "width": 48, "num_images_per_prompt": 2})],
)
def test_probabilities_equal_an_independent_computation(
    guidance_scale: float, options: dict[str, Any], pipe: Any, prompt: Prompt
) -> None:
    options = options | {"guidance_scale": guidance_scale}
    expected = independent(pipe, lambda: draw(pipe, prompt.text, **options), guided=guidance_scale > 1)
    with record(pipe, prompt, RecordSpec(tokens="all", heads="all", dtype="float32")) as recording:
        draw(pipe, prompt.text, **options)
    assert set(recording.layers) == set(expected)
    for node in recording.tree.children.values():
        rows, columns = node.sizes["y"], node.sizes["x"]
        for name in node["layer"].values:
            truth = np.stack(expected[name])  # (step, image, head, n, text)
            truth = truth.reshape(*truth.shape[:3], rows, columns, -1)
            kept = node["probability"].sel(layer=name)
            np.testing.assert_allclose(kept.isel(token=slice(0, -1)), truth, atol=1e-5)
            np.testing.assert_allclose(kept.sel(token="<end>"), truth[..., prompt.end_index :].sum(-1), atol=1e-5)
            assert kept.dims == ("step", "image", "head", "y", "x", "token")


def test_layers_stand_in_forward_order_with_their_place(pipe: Any, prompt: Prompt) -> None:
    ran = list(independent(pipe, lambda: draw(pipe, prompt.text, steps=1), guided=True))
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=1)
    assert list(recording.layers) == ran
    for node in recording.tree.children.values():
        assert [str(name).split("_")[0] for name in node["layer"].values] == node["place"].values.tolist()


def test_lora_weights_count(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt) as before:
        draw(pipe, prompt.text, steps=1)
    add_lora(pipe)
    with record(pipe, prompt) as after:
        draw(pipe, prompt.text, steps=1)
    # The first layer sees the same image; only its projections changed.
    first = before.layers[0]
    change = abs(after.sel(layer=first).tree["8x8"]["probability"] - before.sel(layer=first).tree["8x8"]["probability"])
    assert float(change.max()) > 1e-3


def test_norms_of_queries_and_keys_are_applied() -> None:
    module = Attention(query_dim=8, cross_attention_dim=6, heads=2, dim_head=4, qk_norm="rms_norm").double()
    torch.nn.init.normal_(module.norm_q.weight)
    layer = AttentionLayer("attn2", "up", 2, module, module, 1, grid=lambda args, kwargs: (3, 5))
    image, text = torch.randn(1, 15, 8).double(), torch.randn(1, 7, 6).double()
    seen: list[torch.Tensor] = []
    with tap([layer], lambda layer, attend, size: seen.append(attend(slice(None)))):
        output = module(image, encoder_hidden_states=text)
    value = module.to_v(text).unflatten(-1, (2, 4)).transpose(1, 2)
    rebuilt = module.to_out[0]((seen[0] @ value).transpose(1, 2).flatten(2))
    torch.testing.assert_close(rebuilt, output)


def test_gradients_flow_through_the_tap(pipe: Any) -> None:
    adapter = adapter_for(pipe)
    latents = torch.randn(1, 4, 8, 8, requires_grad=True)
    embeds = adapter.encode("a car", guided=False)
    maps: list[torch.Tensor] = []
    with tap(adapter.layers()[-1:], lambda layer, attend, size: maps.append(attend(slice(None)))):
        adapter.denoise(latents, 10, embeds)
    maps[0][..., 2].sum().backward()
    assert latents.grad is not None
    assert float(latents.grad.abs().max()) > 0


@pytest.mark.parametrize("scheduler", ["euler", "heun", "dpm++"])
def test_sigma_is_the_noise_level_the_model_saw(scheduler: str) -> None:
    pipe = tiny_pipeline(scheduler=scheduler)
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text)
    expected = pipe.scheduler.sigmas.numpy()[: len(recording.steps)]
    np.testing.assert_allclose(recording.tree["8x8"]["sigma"], expected)
    assert len(recording.steps) == (5 if scheduler == "heun" else 3)


def test_no_sigma_where_the_scheduler_has_none(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=2)
    assert np.isnan(recording.maps("car")["sigma"]).all()


# -- hooks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError("out of luck"), KeyboardInterrupt()])
def test_hooks_are_gone_and_finished_steps_are_kept(
    error: BaseException | None, pipe: Any, prompt: Prompt, tmp_path: Path
) -> None:
    before = count_hooks(pipe.unet)
    with record(pipe, prompt) as whole:
        plain = draw(pipe, prompt.text)
    layer = pipe.unet.up_blocks[1].attentions[0]
    calls = 0

    def break_off(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and error is not None:
            raise error  # in the middle of the third call: earlier layers have run

    handle = layer.register_forward_pre_hook(break_off)
    expectation = nullcontext() if error is None else pytest.raises(type(error))
    with expectation, record(pipe, prompt) as recording:
        assert count_hooks(pipe.unet) > before + 1
        draw(pipe, prompt.text)
    handle.remove()
    assert count_hooks(pipe.unet) == before
    kept = 3 if error is None else 2
    assert recording.steps == tuple(range(kept))
    assert ("cut off" in repr(recording)) == (error is not None)
    saved = open_recording(recording.save(tmp_path / "cut"))
    xr.testing.assert_identical(saved.maps(), whole.maps(steps=slice(0, kept)))
    assert np.array_equal(plain, draw(pipe, prompt.text))


def test_an_error_before_the_first_step_leaves_an_empty_recording(pipe: Any, prompt: Prompt) -> None:
    with pytest.raises(ValueError, match="divisible by 8"), record(pipe, prompt) as recording:
        draw(pipe, prompt.text, height=33, width=32)
    assert recording.steps == ()
    assert "empty" in repr(recording)
    assert recording._repr_html_()
    with pytest.raises(RecordingError, match="empty"):
        recording.maps("car")


def test_nested_recording_is_refused_and_the_outer_one_goes_on(pipe: Any, prompt: Prompt) -> None:
    sibling = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    with record(pipe, prompt) as recording:
        for same_unet in (pipe, sibling):
            with pytest.raises(RecordingError, match="already"), record(same_unet, prompt):
                pass
        draw(pipe, prompt.text)
    assert len(recording.steps) == 3
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=1)
    assert len(recording.steps) == 1


def test_paused_passes_are_neither_kept_nor_counted(pipe: Any, prompt: Prompt) -> None:
    adapter = adapter_for(pipe)
    embeds = adapter.encode(prompt.text, guided=False)

    def own_pass(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with paused(pipe):
            adapter.denoise(tensors["latents"], timestep, embeds)
        return tensors

    with record(pipe, prompt) as plain:
        draw(pipe, prompt.text)
    with record(pipe, prompt) as guided:
        draw(pipe, prompt.text, callback_on_step_end=own_pass)
    xr.testing.assert_identical(plain.tree.to_dataset(), guided.tree.to_dataset())
    xr.testing.assert_identical(plain.maps(), guided.maps())
    with paused(pipe):  # no recording: nothing to do
        draw(pipe, prompt.text, steps=1)


def test_a_recording_keeps_no_model_alive(prompt: Prompt) -> None:
    pipe = tiny_pipeline()
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=1)
    unet = weakref.ref(pipe.unet)
    del pipe
    gc.collect()
    assert unet() is None
    assert recording.maps("car").shape == (1, 1, 8, 8)


def test_projections_fused_inside_a_recording_are_refused_with_the_remedy(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=1)
        pipe.fuse_qkv_projections()
        with pytest.raises(RecordingError, match=r"was replaced inside the recording\. Load LoRA weights"):
            draw(pipe, prompt.text, steps=1)
    assert recording.steps == (0,)
    with record(pipe, prompt) as fused:
        draw(pipe, prompt.text, steps=1)
    np.testing.assert_allclose(fused.maps(), recording.maps(), atol=1e-4)


def test_runs_in_one_block_follow_each_other_and_must_agree_in_shape(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, steps=2)
        draw(pipe, prompt.text, steps=9)
        with pytest.raises(RecordingError, match=r"1 image of 8x8 latents.*2 images of 8x8"):
            draw(pipe, prompt.text, num_images_per_prompt=2)
    assert recording.steps == tuple(range(11))
    assert np.isfinite(recording.maps()).all()
    assert recording.maps("car")["timestep"].values[2] > recording.maps("car")["timestep"].values[1]


# -- what is kept, and its price -------------------------------------------------------------------------------------


def test_heads_steps_and_sizes_are_kept_as_asked(pipe: Any, prompt: Prompt) -> None:
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float32")) as full:
        draw(pipe, prompt.text, steps=5)
    wholes = full.tree["8x8"]["probability"]
    for which, steps in [
        (None, [0, 1, 2, 3, 4]),
        (2, [0, 2, 4]),
        (slice(1, 3), [1, 2]),
        (np.int64(2), [0, 2, 4]),
        (slice(-2, None), [3, 4]),
    ]:
        with record(pipe, prompt, RecordSpec(steps=which)) as part:
            draw(pipe, prompt.text, steps=5)
        mean = wholes.isel(step=steps).mean("head")
        halves = part.tree["8x8"]["probability"].squeeze("head")
        assert halves.dtype == np.float16  # half the size, three significant digits
        np.testing.assert_allclose(halves, mean, rtol=1e-3, atol=1e-7)
        assert part.steps == tuple(mean["step"].values)
    with record(pipe, prompt, RecordSpec(sizes=np.int64(4), layers=["mid", "up_blocks.*"], dtype="float32")) as small:
        draw(pipe, prompt.text, steps=1)
    assert small.sizes == ((4, 4),)
    assert {name.split(".")[0] for name in small.layers} == {"mid_block", "up_blocks"}
    assert small.tree["4x4"]["probability"].dtype == np.float32


def test_tokens_are_kept_as_asked(pipe: Any) -> None:
    prompt = parse("a [red car] and a [giraffe]", pipe)
    pieces = [token.label for token in prompt.tokens if token.label.startswith("giraffe")]
    assert len(pieces) > 1  # a word that the tiny tokenizer splits

    def labels(tokens: Any) -> tuple[str, ...]:
        return RecordSpec(tokens=tokens).channels(prompt).labels

    assert labels("entities") == ("<start>", "red", "car", *pieces, "<end>")
    assert labels("words") == ("<start>", *(token.label for token in prompt.tokens), "<end>")
    assert len(labels("all")) == prompt.length + 1
    assert labels(["giraffe", 3, "<start>"]) == ("<start>", "car", *pieces, "<end>")
    with pytest.raises(RecordingError, match="zebra"):
        labels(["zebra"])
    with pytest.raises(RecordingError, match="Position 99"):
        labels([99])


def test_a_text_without_start_and_one_that_is_read_twice_are_kept_whole() -> None:
    row = torch.arange(1.0, 11.0)
    t5 = Prompt("red car", (), (Token(0, "red", "red", 0), Token(1, "car", "car", 1)), 2, 4, None)
    kept = RecordSpec().channels(t5)
    assert kept.labels == ("red", "car", "<end>")
    assert kept.gather(row[:4]).tolist() == [1, 2, 3 + 4]
    assert kept.gather(row[:6]).tolist() == [1, 2, 3 + 4 + 5 + 6]  # a run with more text positions
    assert kept.gather(row[:3]).tolist() == [1, 2, 3]
    assert kept.gather(row[:2]).tolist() == [1, 2, 0]  # a text cut before its end has no mass there
    with pytest.raises(RecordingError, match="1 text positions"):
        kept.gather(row[:1])
    both = (Token(1, "car", "car@clip", 0), Token(5, "car", "car@t5", 0))
    entity = Entity("car", "car", (), (1, 5), (), "car")
    twice = Prompt("car", (entity,), both, 2, 10, 0, ((2, 5), (6, None)))
    kept = RecordSpec(tokens=["car"]).channels(twice)
    assert kept.labels == ("<start>", "car@clip", "car@t5", "<end>")
    assert kept.gather(row).tolist() == [1, 2, 6, 3 + 4 + 5 + 7 + 8 + 9 + 10]
    everything = RecordSpec(tokens="all").channels(twice)
    assert everything.labels[2:5] == ("<eot>", "<pad/1>", "<pad/2>")
    assert everything.labels[6:9] == ("<eot#2>", "<pad#2/1>", "<pad#2/2>")
    assert len(set(everything.labels)) == 11


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    side=st.tuples(st.sampled_from([32, 40, 48]), st.sampled_from([24, 32, 56])),
    images=st.integers(1, 2),
    steps=st.integers(1, 3),
    tokens=st.sampled_from(["words", "entities", "all", ["car"]]),
    layers=st.sampled_from(["all", "up", ["mid", "down"], "*.attentions.0.*"]),
    heads=st.sampled_from(["mean", "all"]),
    dtype=st.sampled_from(["float32", "float16"]),
    every=st.sampled_from([None, 2, slice(1, None)]),
)
def test_the_plan_tells_exactly_what_is_kept(
    side: tuple[int, int],
    images: int,
    steps: int,
    tokens: Any,
    layers: Any,
    heads: Any,
    dtype: Any,
    every: Any,
    shared_pipe: Any,
) -> None:
    prompt = parse(TEXT, shared_pipe)
    spec = RecordSpec(tokens=tokens, layers=layers, heads=heads, dtype=dtype, steps=every)
    plan = spec.plan(shared_pipe, prompt, steps=steps, height=side[0], width=side[1], images=images)
    with record(shared_pipe, prompt, spec) as recording:
        options = {"height": side[0], "width": side[1], "num_images_per_prompt": images}
        draw(shared_pipe, prompt.text, steps=steps, output_type="latent", **options)
    assert plan.bytes == recording.nbytes
    if recording.steps:
        assert tuple(resolution.size for resolution in plan.resolutions) == recording.sizes
        assert plan.tokens == recording.tokens


@pytest.mark.parametrize("latent", [(7, 9), (8, 5), (3, 3)])
def test_odd_latents_are_planned_as_the_network_rounds_them(latent: tuple[int, int], shared_pipe: Any) -> None:
    adapter = adapter_for(shared_pipe)
    prompt = parse(TEXT, shared_pipe)
    embeds = adapter.encode(prompt.text, guided=False)
    shared_pipe._guidance_scale = 1.0
    plan = RecordSpec().plan_layers(adapter.layers(), prompt, latent, kept=1, images=1)
    with record(shared_pipe, prompt) as recording, torch.no_grad():
        adapter.denoise(torch.zeros(1, 4, *latent), 10, embeds)
    assert plan.bytes == recording.nbytes
    assert tuple(resolution.size for resolution in plan.resolutions) == recording.sizes


@pytest.fixture(scope="module")
def shared_pipe() -> Any:
    return tiny_pipeline()


def test_a_run_over_budget_is_refused_before_anything_is_computed(pipe: Any, prompt: Prompt) -> None:
    spec = RecordSpec(budget=50_000, dtype="float32")
    assert spec.plan(pipe, prompt, steps=5).bytes <= 50_000
    with pytest.raises(RecordingError) as planned:
        spec.plan(pipe, prompt, steps=6)
    ran: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    with record(pipe, prompt, spec), pytest.raises(RecordingError) as refused:
        draw(pipe, prompt.text, steps=6)
    assert not ran
    for part in (
        "55.3 kB of 50.0 kB",
        "6 steps",
        "8x8: 3 layers",
        "dtype='float16'",
        "sizes=4",
        "layers='up'",
        "budget=55296",
    ):
        assert part in str(planned.value)
        assert part in str(refused.value)


def test_a_loop_of_ones_own_is_recorded_as_far_as_the_budget_goes(pipe: Any, prompt: Prompt) -> None:
    adapter = adapter_for(pipe)
    embeds = adapter.encode(prompt.text, guided=False)
    one = RecordSpec().plan(pipe, prompt, steps=1).bytes
    with record(pipe, prompt, RecordSpec(budget=20 * one)) as recording, torch.no_grad():
        for step in range(20):
            adapter.denoise(torch.zeros(1, 4, 8, 8), 1000 - step, embeds)
        with pytest.raises(RecordingError, match=r"would bring the recording to .* 20 steps. Raise RecordSpec\(budget"):
            adapter.denoise(torch.zeros(1, 4, 8, 8), 980, embeds)
    assert recording.steps == tuple(range(20))
    assert recording.maps("car")["timestep"].values.tolist() == [1000 - step for step in range(20)]
    with (
        record(pipe, prompt, RecordSpec(steps=slice(-3, None))),
        pytest.raises(RecordingError, match="from the start"),
    ):
        adapter.denoise(torch.zeros(1, 4, 8, 8), 1, embeds)


def test_a_prompt_parsed_for_another_encoder_is_read_again(pipe: Any) -> None:
    long = parse(TEXT, tiny_pipeline(length=40))
    assert not long.matches(pipe)
    with record(pipe, long, RecordSpec(tokens="all")) as recording:
        draw(pipe, long.text)
    assert recording.prompt == parse(TEXT, pipe)


@pytest.mark.parametrize(
    ("settings_", "part"),
    [
        ({"heads": "some"}, "'mean', 'all' or a list"),
        ({"heads": [0, 0]}, "different numbers"),
        ({"heads": []}, "different numbers"),
        ({"device": "cuda"}, "one of 'cpu', 'model'"),
        ({"dtype": "int8"}, "one of 'float32', 'float16'"),
        ({"budget": 0}, "whole number of 1 or more"),
        ({"budget": float("nan")}, "whole number of 1 or more"),
        ({"budget": 1e9}, "whole number of 1 or more"),
        ({"accumulate": "no"}, "True or False"),
        ({"steps": 0}, "every n-th call"),
        ({"steps": slice(None, None, -1)}, "stride"),
        ({"sizes": -16}, "larger side"),
        ({"self_attention": float("nan")}, "larger side"),
        ({"tokens": "car"}, r"\['car'\]"),
    ],
)
def test_settings_out_of_range_name_what_is_allowed(settings_: dict[str, Any], part: str) -> None:
    with pytest.raises(SettingError, match=part):
        RecordSpec(**settings_)


def test_a_selection_that_fits_nothing_lists_what_is_there(pipe: Any, prompt: Prompt) -> None:
    layers = adapter_for(pipe).layers()
    with pytest.raises(RecordingError, match=r"up_blocks\.1\.attentions\.1"):
        select_layers(layers, "encoder")
    with pytest.raises(RecordingError, match="No layer is selected"):
        select_layers(layers, [])
    with pytest.raises(RecordingError, match="8x8, 4x4"):
        RecordSpec(sizes=16).plan(pipe, prompt, steps=1)
    assert select_layers(layers, ["up", "down", "up"]) == tuple(x for x in layers if x.place != "mid")


# -- reading ---------------------------------------------------------------------------------------------------------


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
    with pytest.raises(RecordingError, match=r"No step 1 .* there are 0, 3"):
        recording.maps("red", steps=1)
    with pytest.raises(RecordingError, match="there are 0, 3"):
        recording.maps("red", steps=slice(1, 3))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ({"tokens": "zebra"}, ["zebra", "Recorded: <start>, red, giraffe/1, giraffe/2, <end>"]),
        ({"tokens": 5}, ["position 5", "Recorded: <start>"]),
        ({"tokens": []}, ["names nothing"]),
        ({"layers": "decoder"}, ["a.down", "b.mid", "c.up"]),
        ({"size": 16}, ["4x6, 2x3", "such as 6"]),
        ({"layers": "mid", "size": 6}, ["b.mid (2x3)"]),
        ({"image": 2}, ["there are 2"]),
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
    with pytest.raises(RecordingError, match="No head 7"):
        recording.sel(head=7)
    with pytest.raises(RecordingError, match="was not recorded"):
        part.maps("red")


# -- files -----------------------------------------------------------------------------------------------------------


def test_saving_and_opening_gives_the_same_recording(pipe: Any, prompt: Prompt, tmp_path: Path) -> None:
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float16")) as recording:
        draw(pipe, prompt.text)
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
