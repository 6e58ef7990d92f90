"""Recording: the image is unchanged, the numbers are right, and the size is known before."""

from __future__ import annotations

import gc
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
    RecordSpec,
    open_recording,
    paused,
    record,
    select_layers,
    tap,
)
from elakit.errors import RecordingError, SettingError
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
        "55.3 kB (budget: 50.0 kB)",
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
        ({"heads": [0, 0]}, "head indices"),
        ({"heads": []}, "head indices"),
        ({"device": "cuda"}, "one of 'cpu', 'model'"),
        ({"dtype": "int8"}, "one of 'float32', 'float16'"),
        ({"budget": 0}, "whole number, 1 or more"),
        ({"budget": float("nan")}, "whole number, 1 or more"),
        ({"budget": 1e9}, "an integer, 1 or more, not a float"),
        ({"accumulate": "no"}, "True or False"),
        ({"steps": 0}, "every n-th call"),
        ({"steps": slice(None, None, -1)}, "stride"),
        ({"sizes": -16}, "longer side"),
        ({"self_attention": float("nan")}, "longer side"),
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
