"""Recordings and edits follow what the running call really uses; what cannot be known is refused before the run."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, StableDiffusionImg2ImgPipeline
from diffusers.models.attention_processor import AttnProcessor2_0
from families import SHORT, lora
from peft import LoraConfig
from PIL import Image
from tiny import tiny_flux, tiny_pipeline, tiny_sd3
from torch import Tensor, nn
from witness import compare, witness

from elakit.attention import Edit, RecordSpec, edit, paused, record
from elakit.attention.hooks import Hooks
from elakit.errors import ModelError, RecordingError
from elakit.models import adapter_for
from elakit.prompt import Prompt, parse

TEXT = "a [red car] and a [blue bird]"
EXACT = RecordSpec(heads="all", dtype="float32")
FLUX = {"height": 32, "width": 32}
IMAGE = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype("uint8"))


def draw(pipe: Any, text: Any, steps: int = 1, **options: Any) -> Tensor:
    options = {"generator": torch.Generator().manual_seed(7), "output_type": "latent"} | options
    return pipe(text, num_inference_steps=steps, **options).images


def hooks_of(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def sibling(pipe: Any) -> Any:
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other


# -- rows
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [7.5, 1.0])
def test_a_sibling_pipeline_is_recorded_by_its_own_call(scale: float, pipe: Any, prompt: Prompt) -> None:
    """The recorded pipeline never ran, or ran last without guidance; its sibling's call says which rows are which."""
    other = sibling(pipe)
    for run_before in (False, True):
        if run_before:
            draw(pipe, prompt.text, guidance_scale=8.5 - scale)
        with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
            draw(other, prompt.text, 2, image=IMAGE, strength=0.5, guidance_scale=scale)
        compare(recording, seen, guided=scale > 1)
        assert recording.nodes()[0].sizes["image"] == 1
        assert recording.tree.attrs["expected"] == len(recording.steps) == 1


@pytest.mark.parametrize("order", ["negative first", "prompt first", "two calls"])
def test_a_guidance_loop_of_ones_own_is_recorded_by_its_text_states(order: str, pipe: Any, prompt: Prompt) -> None:
    positive, negative = pipe.encode_prompt(prompt.text, "cpu", 1, True, negative_prompt="a dog")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), record(pipe, prompt, EXACT) as expected:
        pipe.unet(latents, 500, positive)
    states = [negative, positive] if order == "negative first" else [positive, negative]
    with torch.no_grad(), record(pipe, prompt, EXACT) as recording:
        if order == "two calls":
            with paused(pipe):
                pipe.unet(latents, 500, negative)
            pipe.unet(latents, 500, encoder_hidden_states=positive)
        else:
            pipe.unet(torch.cat([latents] * 2), 500, encoder_hidden_states=torch.cat(states))
    assert recording.nodes()[0].sizes["image"] == 1
    np.testing.assert_allclose(recording.maps(), expected.maps(), atol=1e-5)
    with (
        torch.no_grad(),
        record(pipe, prompt),
        pytest.raises(RecordingError, match="no row of its batch has the text states"),
    ):
        pipe.unet(latents, 500, negative)
    apart = torch.cat([positive, negative, positive])
    with torch.no_grad(), record(pipe, prompt), pytest.raises(RecordingError, match=r"rows \[0, 2\] .* next to each"):
        pipe.unet(torch.cat([latents] * 3), 500, apart)


def test_a_call_with_another_prompt_is_refused_before_it_computes(pipe: Any, prompt: Prompt) -> None:
    ran: list[int] = []
    pipe.unet.conv_in.register_forward_hook(lambda *_: ran.append(1))
    both = ["a red car and a blue bird", "a red car and a blue dog"]
    for text in ("a red car and a blue dog", both, [*both, both[0]]):
        for block in (record(pipe, prompt), edit(pipe, prompt, Edit("car", scale=0))):
            with pytest.raises(RecordingError, match="was called with prompt='a red car and a blue dog'"), block:
                draw(pipe, text)
    states = torch.cat([pipe.encode_prompt(text, "cpu", 1, False)[0] for text in both])
    with pytest.raises(RecordingError, match="different prompts"), record(pipe, prompt):
        draw(pipe, None, prompt_embeds=states, negative_prompt_embeds=torch.zeros_like(states))
    assert not ran
    with record(pipe, prompt) as recording:  # the same tokens
        draw(pipe, ["A red car  and a blue bird"] * 2)
    assert recording.nodes()[0].sizes["image"] == 2


def test_second_and_third_prompts_count_where_the_image_attends_to_them() -> None:
    flux, sd3 = tiny_flux(), tiny_sd3()
    prompt = parse(TEXT, flux)
    with record(flux, prompt) as recording:
        draw(flux, "something for CLIP", prompt_2=prompt.text, **FLUX, **SHORT)
    assert recording.steps == (0,)
    with pytest.raises(RecordingError, match="prompt_2='a blue car'"), record(flux, prompt):
        draw(flux, prompt.text, prompt_2="a blue car", **FLUX, **SHORT)
    prompt = parse(TEXT, sd3)
    with pytest.raises(RecordingError, match="prompt_3='a blue car'"), record(sd3, prompt):
        draw(sd3, prompt.text, prompt_3="a blue car", **SHORT)


# -- runs that are not the recorded one
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("same", [True, False])
def test_an_image_generated_inside_a_run_is_neither_recorded_nor_edited(same: bool, pipe: Any, prompt: Prompt) -> None:
    other = sibling(pipe)
    plain = draw(pipe, "a dog") if same else draw(other, "a dog", 2, image=IMAGE)
    inside: list[Tensor] = []

    def meanwhile(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not same:  # a pipeline that runs twice at once forgets its first run's state
            inside.append(draw(other, "a dog", 2, image=IMAGE))
        elif step == 1:
            inside.append(draw(pipe, "a dog"))
        return tensors

    change = Edit(["car", "bird"], scale=0)
    with edit(pipe, prompt, change), record(pipe, prompt) as alone:
        draw(pipe, prompt.text, 2)
    with edit(pipe, prompt, change), record(pipe, prompt) as recording:
        draw(pipe, prompt.text, 2, callback_on_step_end=meanwhile)
    assert inside
    assert all(torch.equal(image, plain) for image in inside)
    np.testing.assert_allclose(recording.maps().isel(step=0), alone.maps().isel(step=0), atol=1e-6)
    assert len(recording.steps) == 2


def test_a_run_in_another_thread_is_neither_recorded_nor_edited(pipe: Any, prompt: Prompt) -> None:
    other = sibling(pipe)
    plain = draw(other, "a dog", 2, image=IMAGE)
    with edit(pipe, prompt, Edit("car", scale=0)), record(pipe, prompt) as alone:
        draw(pipe, prompt.text, 2)
    found: list[Tensor] = []

    def meanwhile(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        thread = threading.Thread(target=lambda: found.append(draw(other, "a dog", 2, image=IMAGE)))
        thread.start()
        thread.join()
        return tensors

    with edit(pipe, prompt, Edit("car", scale=0)), record(pipe, prompt) as recording:
        draw(pipe, prompt.text, 2, callback_on_step_end=meanwhile)
    assert len(found) == 2
    assert all(torch.equal(image, plain) for image in found)
    np.testing.assert_array_equal(recording.maps(), alone.maps())


# -- weights and processors
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_pipeline, tiny_flux])
def test_lora_weights_loaded_inside_a_recording_are_refused(make: Callable[[], Any]) -> None:
    pipe = make()
    options = FLUX | SHORT if make is tiny_flux else {}
    prompt = parse(TEXT, pipe)
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, **options)
        if make is tiny_flux:
            lora(pipe.transformer)
        else:
            pipe.unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_k"]))
        with pytest.raises(RecordingError, match=r"was replaced inside the recording\. Load LoRA weights"):
            draw(pipe, prompt.text, **options)
    assert recording.steps == (0,)
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
        draw(pipe, prompt.text, **options)
    compare(recording, seen, guided=make is tiny_pipeline)


def test_a_compiled_forward_is_refused(pipe: Any) -> None:
    forward = pipe.unet.forward
    pipe.unet.forward = torch.compile(forward)
    with pytest.raises(ModelError, match="forward"):
        adapter_for(pipe)
    pipe.unet.forward = forward
    block = pipe.unet.down_blocks[0].attentions[0]
    block.forward = torch.compile(block.forward)
    with pytest.raises(ModelError, match=r"down_blocks\.0\.attentions\.0"):
        adapter_for(pipe)
    del block.forward
    adapter_for(pipe)


class Reweighting(AttnProcessor2_0):
    """A processor of one's own, as prompt-to-prompt has one."""


def test_a_processor_that_is_not_from_diffusers_is_refused(pipe: Any, prompt: Prompt) -> None:
    pipe.unet.set_attn_processor(Reweighting())
    for block in (record(pipe, prompt), edit(pipe, prompt, Edit("car", scale=0))):
        with pytest.raises(RecordingError, match=r"Reweighting, which is not from diffusers"), block:
            pass
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    with record(pipe, prompt):
        pipe.unet.set_attn_processor(Reweighting())
        with pytest.raises(RecordingError, match="not from diffusers"):
            draw(pipe, prompt.text)


@pytest.mark.parametrize("config", [FirstBlockCacheConfig(threshold=0.5), None])
def test_a_cache_is_refused_before_the_run(config: Any) -> None:
    pipe = tiny_flux()
    prompt = parse(TEXT, pipe)
    if config is None:
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        )
    pipe.transformer.enable_cache(config)
    for block in (record(pipe, prompt), edit(pipe, prompt, Edit("car", scale=0))):
        with pytest.raises(RecordingError, match=r"has a cache .*disable_cache"), block:
            pass
    pipe.transformer.disable_cache()
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text, **FLUX, **SHORT)
        pipe.transformer.enable_cache(config)
        with pytest.raises(RecordingError, match="has a cache"):
            draw(pipe, prompt.text, **FLUX, **SHORT)
    assert recording.steps == (0,)


def test_merged_tokens_are_refused(pipe: Any, prompt: Prompt) -> None:
    """ToMe with merge_crossattn=True makes a layer that attends from fewer positions than its map has."""
    module = adapter_for(pipe).layers()[0].module
    merge = module.register_forward_pre_hook(lambda _, args, kwargs: ((args[0][:, ::2],), kwargs), with_kwargs=True)
    spread = module.register_forward_hook(lambda _, args, output: output.repeat_interleave(2, dim=1))
    refusal = pytest.raises(RecordingError, match=r"from 32 positions, but its maps have 8 x 8 locations.*ToMe")
    with refusal, record(pipe, prompt):
        draw(pipe, prompt.text)
    merge.remove()
    spread.remove()


# -- masks and image tokens
# ---------------------------------------------------------------------------------------------

KEYS = 14 + 16
SHAPES = [(1, KEYS), (2, KEYS), (KEYS, KEYS), (1, 1, KEYS), (1, 1, 1, KEYS), (2, 1, 1, KEYS), (2, 2, KEYS, KEYS)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks_of_every_shape_are_applied_as_the_attention_call_does(
    shape: tuple[int, ...], boolean: bool
) -> None:
    if shape == (2, KEYS) and not hasattr(diffusers, "Flux2Pipeline"):
        pytest.skip("this release of diffusers takes no mask of a row per image")
    pipe = tiny_flux()
    prompt = parse(TEXT, pipe)
    mask: Tensor = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[..., 0] = True
    if not boolean:
        mask = torch.zeros(shape).masked_fill(~mask, -3.0)
    options = FLUX | SHORT | {"joint_attention_kwargs": {"attention_mask": mask}, "num_images_per_prompt": 2}
    plain = draw(pipe, prompt.text, **options)
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
        assert torch.equal(plain, draw(pipe, prompt.text, **options))
    compare(recording, seen, guided=False)
    change = Edit("car", scale=0.5)
    with (
        witness(adapter_for(pipe).layers()) as seen,
        edit(pipe, prompt, change),
        record(pipe, prompt, EXACT) as recording,
    ):
        draw(pipe, prompt.text, **options)
    compare(recording, seen, guided=False)


def test_a_mask_that_stable_diffusion_3_ignores_is_ignored() -> None:
    pipe = tiny_sd3()
    prompt = parse(TEXT, pipe)
    mask = torch.full((2, 1, 1, 16 + 34), -3.0)
    mask[..., ::2] = 0
    options = SHORT | {"joint_attention_kwargs": {"attention_mask": mask}}
    for change in (None, Edit("car", scale=0.5)):
        with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
            if change is None:
                draw(pipe, prompt.text, **options)
            else:
                with edit(pipe, prompt, change):
                    draw(pipe, prompt.text, **options)
        compare(recording, seen, guided=True)


def test_image_tokens_of_flux_redux_are_no_padding() -> None:
    pipe = tiny_flux()
    prompt = parse(TEXT, pipe)
    states, pooled, _ = pipe.encode_prompt(prompt.text, device="cpu")
    image = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(1))  # as FluxPriorReduxPipeline appends them
    options = FLUX | {"prompt_embeds": torch.cat([states, image], dim=1), "pooled_prompt_embeds": pooled}
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, EXACT) as recording:
        draw(pipe, None, **options)
    for one, layer in zip(seen, recording.layers, strict=True):
        truth = one.text(slice(0, 1), 16, 512 + 9)[0]  # (heads, locations, text and image tokens)
        node = recording.nodes()[0].sel(layer=layer).isel(step=0, image=0)["probability"].values.reshape(2, 16, -1)
        np.testing.assert_allclose(node[..., -1], truth[..., prompt.end_index : 512].sum(-1), atol=1e-6)
        assert float(truth[..., 512:].sum(-1).mean()) > 0.01
    with edit(pipe, prompt, Edit("<end>", scale=0)), witness(adapter_for(pipe).layers()) as seen:
        draw(pipe, None, **options)
    text = seen[0].text(slice(0, 1), 16, 512 + 9)
    assert float(text[..., prompt.end_index : 512].max()) == 0
    assert float(text[..., 512:].min()) > 0
    options["prompt_embeds"] = torch.cat([torch.zeros_like(states), image], dim=1)  # of a prior without text encoders
    for block in (record(pipe, prompt), edit(pipe, prompt, Edit("car", scale=0))):
        with pytest.raises(RecordingError, match=r"are the same for every word of 'a red car"), block:
            draw(pipe, None, **options)


# -- hooks
# --------------------------------------------------------------------------------------------------------------


def test_a_copy_made_inside_a_recording_is_free_of_it(prompt: Prompt) -> None:
    pipe = tiny_pipeline()
    plain = draw(pipe, prompt.text)
    with record(pipe, prompt) as recording, edit(pipe, prompt, Edit("car", scale=0)):
        copied = copy.deepcopy(pipe)
        assert torch.equal(draw(copied, prompt.text), plain)
        assert recording.steps == ()
    assert hooks_of(copied.unet) == 0
    with record(copied, prompt) as recording:
        draw(copied, prompt.text)
    assert recording.steps == (0,)
    assert hooks_of(copied.unet) == 0


@pytest.mark.parametrize("nth", [1, 2, 7, 16])
def test_an_interrupt_right_after_a_hook_is_placed_leaves_none(
    nth: int, pipe: Any, prompt: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed = 0
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        register = getattr(nn.Module, name)

        def interrupted(self: Any, *args: Any, register: Any = register, **kwargs: Any) -> Any:
            nonlocal placed
            handle = register(self, *args, **kwargs)
            placed += 1
            if placed == nth:
                raise KeyboardInterrupt
            return handle

        monkeypatch.setattr(nn.Module, name, interrupted)
    before = hooks_of(pipe.unet)
    for block in (record(pipe, prompt), edit(pipe, prompt, Edit("car", scale=0))):
        placed = 0
        with pytest.raises(KeyboardInterrupt), block:
            pass
        assert placed == nth
        assert hooks_of(pipe.unet) == before
    monkeypatch.undo()
    with record(pipe, prompt) as recording:
        draw(pipe, prompt.text)
    assert recording.steps == (0,)


def test_hooks_act_in_their_own_thread_only() -> None:
    module, seen = nn.Linear(1, 1), []
    with Hooks() as hooks:
        hooks.after(module, lambda *_: seen.append(threading.get_ident()))
        module(torch.ones(1))
        other = threading.Thread(target=lambda: module(torch.ones(1)))
        other.start()
        other.join()
    assert seen == [threading.get_ident()]
    assert hooks_of(module) == 0
