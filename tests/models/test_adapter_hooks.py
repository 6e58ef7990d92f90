"""Families: the attention of each is read correctly in every way of running it, and the image is unchanged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    UNet2DConditionModel,
)
from families import (
    FAMILIES,
    RELATIVES,
    SHORT,
    TEXT,
    WAYS,
    denoiser,
    draw,
    hooks_of,
    independent,
    lora,
    observe,
)
from tiny import tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from torch import Tensor
from witness import compare, witness

from elakit.attention import RecordSpec, record, tap
from elakit.errors import ModelError, PromptError, RecordingError, SettingError
from elakit.models import adapter_for
from elakit.prompt import Prompt, parse


@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_numbers_are_right_and_the_image_is_the_same(name: str, size: tuple[int, int]) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    several = {"num_images_per_prompt": 2} if size[0] != size[1] else {}
    options = family.options | {"height": size[0], "width": size[1]} | several
    expected = independent(pipe, lambda: draw(pipe, **options), family.guided)
    plain = draw(pipe, **options)
    image, seen = observe(pipe, lambda: draw(pipe, **options))
    assert np.array_equal(plain, image)
    adapter = adapter_for(pipe)
    assert [one.layer for one in seen] == [layer.name for layer in adapter.layers()] * 2
    latent = adapter.latent_size(*size)
    assert latent == (size[0] // 4, size[1] // 4)
    by_name = {layer.name: layer for layer in adapter.layers()}
    assert len(expected) == len(seen)
    for one, truth in zip(seen, expected, strict=True):
        factor = by_name[one.layer].factor
        assert one.call.latent == latent
        assert one.size == (-(-latent[0] // factor), -(-latent[1] // factor))
        assert one.maps.dtype == torch.float32
        np.testing.assert_allclose(one.maps.numpy(), truth, atol=1e-5)
        total = one.maps.sum(-1)
        if by_name[one.layer].kind == "cross":
            torch.testing.assert_close(total, torch.ones_like(total))
        else:  # the image also attends to itself
            assert float(total.min()) > 0
            assert float(total.max()) < 1
    timesteps = pipe.scheduler.timesteps.tolist()
    assert [one.call.timestep for one in seen[:: len(by_name)]] == pytest.approx(timesteps)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_recording_holds_what_the_taps_saw(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    prompt = parse(TEXT, pipe)
    options = family.options | {"height": 32, "width": 48}
    plain, seen = observe(pipe, lambda: draw(pipe, **options))
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float32")) as recording:
        assert np.array_equal(plain, draw(pipe, **options))
    layers = adapter_for(pipe).layers()
    assert recording.steps == (0, 1)
    assert ("<start>" in recording.tokens) == (prompt.start_index is not None)
    for at, one in enumerate(seen):
        node = recording.tree["x".join(map(str, one.size))]["probability"].sel(layer=one.layer, step=at // len(layers))
        maps = one.maps[0].unflatten(1, one.size).numpy()
        for token in prompt.tokens:
            np.testing.assert_allclose(node.sel(token=token.label)[0], maps[..., token.index], atol=1e-6)
        end = maps[..., list(prompt.end_positions(maps.shape[-1]))].sum(-1)
        np.testing.assert_allclose(node.sel(token="<end>")[0], end, atol=1e-5)
    assert recording.maps("giraffe", normalize="sum").sizes["token"] == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_plan_tells_the_size_of_what_is_kept(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    prompt = parse(TEXT, pipe)
    size = {"height": 48, "width": 32}
    plan = RecordSpec().plan(pipe, prompt, steps=2, **size)
    with record(pipe, prompt) as recording:
        draw(pipe, **family.options | size)
    assert sum(node["probability"].nbytes for node in recording.tree.children.values()) == plan.bytes


@pytest.mark.parametrize("name", FAMILIES)
def test_only_rows_that_see_the_prompt_are_read(name: str) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    unguided = family.options if name == "flux" else family.options | {scale: 1.0}
    _, alone = observe(pipe, lambda: draw(pipe, **unguided))
    options = family.options | {scale: 5.0, "negative_prompt": "a dog"}
    plain = draw(pipe, **options)
    image, guided = observe(pipe, lambda: draw(pipe, **options))
    assert np.array_equal(plain, image)
    assert [one.layer for one in guided] == [one.layer for one in alone]
    # The first step of both starts from the same noise, so its attention is the same.
    first = len(adapter_for(pipe).layers())
    for one, other in zip(guided[:first], alone[:first], strict=True):
        torch.testing.assert_close(one.maps, other.maps)
    texts = ["a red car", "a blue bird"]
    _, both = observe(pipe, lambda: draw(pipe, texts, **options | {"negative_prompt": ["", "a dog"]}))
    assert {one.maps.shape[0] for one in both} == {2}


# -- tokens ------------------------------------------------------------------------------------------------------------


def test_t5_tokens_have_no_start_and_are_found_by_word() -> None:
    pipe = tiny_flux()
    prompt = parse(TEXT, pipe)
    ids = pipe.tokenizer_2(prompt.text)["input_ids"]
    pieces = pipe.tokenizer_2.convert_ids_to_tokens(ids)
    assert prompt.start_index is None
    assert pieces[prompt.end_index] == "</s>"
    assert [pieces[i] for i in prompt.find("red car")] == ["▁red", "▁car"]
    assert [pieces[i] for i in prompt.find("giraffe")] == ["▁gira", "ffe"]
    assert prompt.find("giraffe/2") == prompt.find("giraffe")[1:]
    assert prompt.entities[1].token_indices == prompt.find("giraffe")
    assert prompt.length == 512
    assert prompt.end_positions(14) == tuple(range(prompt.end_index, 14))
    assert Prompt.from_dict(prompt.to_dict()) == prompt


def test_ways_to_record_less_name_layers_that_the_model_has() -> None:
    pipe = tiny_flux()
    with pytest.raises(RecordingError, match=r"layers='(double|single)' or"):
        RecordSpec(budget=1).plan(pipe, parse("a [red car] and a [red giraffe]", pipe), steps=2)


def test_stable_diffusion_3_reads_a_prompt_twice() -> None:
    pipe = tiny_sd3()
    prompt = parse("a [red car] and a [red giraffe]", pipe)
    clip = parse("a [red car] and a [red giraffe]", tiny_pipeline())
    t5 = parse("a [red car] and a [red giraffe]", tiny_flux())
    assert prompt.length == 20 + 256
    for word in ("red#1", "car", "giraffe"):
        both = clip.find(word) + tuple(20 + i for i in t5.find(word))
        assert prompt.find(word) == both
    assert prompt.find("car@clip") == clip.find("car")
    assert prompt.find("giraffe/1@t5") == (20 + t5.find("giraffe")[0],)
    assert prompt.entities[0].token_indices == prompt.find("car")
    assert prompt.start_index == 0
    ends = prompt.end_positions(20 + 14)
    assert ends == (*range(clip.end_index, 20), *range(20 + t5.end_index, 34))
    # Every position belongs to a word, the start or an end.
    assert sorted([0, *(token.index for token in prompt.tokens), *ends]) == list(range(34))
    assert len({token.label for token in prompt.tokens}) == len(prompt.tokens)
    assert Prompt.from_dict(prompt.to_dict()) == prompt


def test_what_clip_cuts_of_a_long_prompt_t5_still_reads() -> None:
    text = "a [red car] " + "and a dog " * 7
    prompt = parse(text, tiny_sd3())
    assert [i for i in prompt.find("dog#7") if i < 20] == []
    assert len(prompt.find("dog#7")) == 1
    assert len(prompt.find("dog#1")) == 2
    assert prompt.end_positions()[0] == 19
    with pytest.raises(PromptError, match="would lose"):
        parse(text, tiny_pipeline())


def test_without_t5_its_positions_are_padding() -> None:
    pipe = tiny_sd3(t5=False)
    prompt = parse(TEXT, pipe)
    assert [token.label for token in prompt.tokens][:3] == ["a#1", "red", "car"]
    _, seen = observe(pipe, lambda: draw(pipe, **SHORT))
    # diffusers before 0.36 pads with as many positions as CLIP has, whatever the maximal sequence length
    length = pipe.encode_prompt(prompt.text, None, None, max_sequence_length=14)[0].shape[1]
    assert {one.maps.shape[-1] for one in seen} == {length}
    assert prompt.end_positions(length) == tuple(range(prompt.end_index, length))


def test_pixart_reads_small_letters_and_masks_the_padding() -> None:
    pipe = tiny_pixart()
    options = FAMILIES["pixart-alpha"].options
    loud, quiet = parse("A [RED car]", pipe), parse("a [red car]", pipe)
    assert [token.index for token in loud.tokens] == [token.index for token in quiet.tokens]
    assert loud.entities[0].text == "RED car"
    _, seen = observe(pipe, lambda: draw(pipe, "A RED car", **options))
    for one in seen:
        assert float(one.maps[..., loud.end_index + 1 :].abs().max()) == 0
        # not the single values: those of random weights may vanish in float32
        assert float(one.maps[..., : loud.end_index + 1].sum(-1).min()) == pytest.approx(1, abs=1e-5)
    pipe._text_preprocessing = lambda text, clean_caption: ["something else"]
    with pytest.raises(PromptError, match="reads 'a red car' as 'something else'"):
        parse("a [red car]", pipe)


def test_both_encoders_of_sdxl_share_positions() -> None:
    assert parse(TEXT, tiny_sdxl()) == parse(TEXT, tiny_pipeline())


@pytest.mark.parametrize(("way", "name"), [(way, name) for way, (_, names) in WAYS.items() for name in names])
def test_whatever_way_it_is_run_the_image_stays_and_the_numbers_are_right(way: str, name: str) -> None:
    prepare, options_of = WAYS[way]
    family = FAMILIES[name]
    pipe = family.make()
    prepare(pipe)
    options = family.options | options_of[name]
    prompt = parse(TEXT, pipe)
    plain = torch.as_tensor(draw(pipe, **options))
    before = hooks_of(pipe)
    spec = RecordSpec(heads="all", dtype="float32")
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, prompt, spec) as recording:
        assert torch.equal(plain, torch.as_tensor(draw(pipe, **options)))
    assert hooks_of(pipe) == before
    # Projections in half precision are rounded before they are read.
    tolerance = {"bfloat16": 0.1, "float16": 0.01}.get(way, 1e-5)
    if way != "attention slicing":  # it computes attention without the function that the witness watches
        compare(recording, seen, guided=family.guided, tolerance=tolerance)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("error", [RuntimeError("out of luck"), KeyboardInterrupt()])
def test_a_run_that_breaks_off_leaves_no_hooks_and_its_finished_steps(name: str, error: BaseException) -> None:
    family = FAMILIES[name]
    pipe = family.make()
    prompt = parse(TEXT, pipe)
    plain = draw(pipe, **family.options)
    before = hooks_of(pipe)
    last = adapter_for(pipe).layers()[-1].module
    runs: list[int] = []

    def break_off(*_: Any) -> None:
        runs.append(1)
        if len(runs) == 2:
            raise error  # in the second step, after all layers but one

    handle = last.register_forward_pre_hook(break_off)
    with pytest.raises(type(error)), record(pipe, prompt) as recording:
        draw(pipe, **family.options)
    handle.remove()
    assert hooks_of(pipe) == before
    assert recording.steps == (0,)
    assert "cut off" in repr(recording)
    with record(pipe, prompt) as again, pytest.raises(RecordingError, match="already"), record(pipe, prompt):
        pass
    assert again.steps == ()
    assert np.array_equal(plain, draw(pipe, **family.options))


def test_lora_weights_count() -> None:
    for name, family in FAMILIES.items():
        pipe = family.make()
        _, before = observe(pipe, lambda: draw(pipe, **family.options))  # noqa: B023
        lora(denoiser(pipe))
        _, after = observe(pipe, lambda: draw(pipe, **family.options))  # noqa: B023
        assert float((before[0].maps - after[0].maps).abs().max()) > 1e-3, name


def test_fused_projections_of_stable_diffusion_3_are_read_as_they_run() -> None:
    """diffusers skips the norms of queries and keys there, and so does the tap."""
    fused, plain = (tiny_sd3(dual_attention_layers=()) for _ in range(2))
    fused.transformer.fuse_qkv_projections()
    for block in plain.transformer.transformer_blocks:
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(block.attn, name, None)
    image, seen = observe(fused, lambda: draw(fused, **SHORT))
    expected, known = observe(plain, lambda: draw(plain, **SHORT))
    np.testing.assert_allclose(image, expected, atol=1e-4)
    for one, other in zip(seen, known, strict=True):
        torch.testing.assert_close(one.maps, other.maps, atol=1e-5, rtol=0)


def test_projections_that_are_fused_inside_a_recording_are_refused(pipe: Any) -> None:
    def run() -> None:
        pipe.unet.fuse_qkv_projections()
        draw(pipe)

    with pytest.raises(RecordingError, match="before the `with` block"):
        observe(pipe, run)
    pipe.unet.unfuse_qkv_projections()
    assert observe(pipe, lambda: draw(pipe))[1]


@pytest.mark.parametrize("name", RELATIVES)
def test_other_pipelines_of_a_family_are_read_alike(name: str) -> None:
    relative = RELATIVES[name]
    pipe, options = relative.build(), relative.options
    made: list[int] = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: made.append(1))
    plain = draw(pipe, **options)
    handle.remove()
    spec = RecordSpec(heads="all", dtype="float32")
    with witness(adapter_for(pipe).layers()) as seen, record(pipe, parse(TEXT, pipe), spec) as recording:
        assert np.array_equal(plain, draw(pipe, **options))
    compare(recording, seen, guided=FAMILIES[relative.family].guided)
    node = recording.nodes()[0]
    assert node.sizes["image"] == 1
    # the scheduler's own numbers, not the model's
    assert set(node["timestep"].values.tolist()) <= set(pipe.scheduler.timesteps.tolist())
    assert node.sizes["step"] == recording.tree.attrs["expected"] == len(made)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_can_be_differentiated(name: str) -> None:
    """Attention to a word has a gradient with respect to the latent, and a step along it increases the attention."""
    family = FAMILIES[name]
    pipe = family.make()
    net = denoiser(pipe)
    last = adapter_for(pipe).layers()[-1]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = net.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    draw(pipe, **family.options)
    handle.remove()
    args, kwargs = calls[0]
    start = args[0] if args else kwargs["hidden_states"]

    def share(latent: Tensor) -> Tensor:
        read: list[Tensor] = []
        with tap([last], lambda layer, attend, size: read.append(attend(slice(None))[..., 2].mean())):
            if args:
                net(latent, *args[1:], **kwargs)
            else:
                net(**{**kwargs, "hidden_states": latent})
        return read[0]

    latent = start.clone().requires_grad_(True)
    with torch.enable_grad():
        before = share(latent)
        (gradient,) = torch.autograd.grad(before, latent)
    assert float(gradient.norm()) > 0
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        assert float(share(start + step)) > float(before) > float(share(start - step))


def test_skip_layer_guidance_makes_a_pass_that_is_told_apart() -> None:
    pipe = tiny_sd3()
    skipping = {
        "skip_guidance_layers": [0],
        "skip_layer_guidance_start": -1.0,
        "skip_layer_guidance_stop": 2.0,
    } | SHORT
    calls = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    _, seen = observe(pipe, lambda: draw(pipe, **skipping))
    handle.remove()
    assert len(calls) == 4
    assert len(seen) == 2 * 2
    assert {one.maps.shape[0] for one in seen} == {1}


def test_sdxl_at_1024_pixels_has_maps_of_64_and_32_rows_only() -> None:
    pipe = tiny_sdxl()
    with torch.device("meta"):
        pipe.unet = UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            use_linear_projection=True,
        )
    layers = adapter_for(pipe).layers()
    assert len(layers) == 70
    assert {128 // layer.factor for layer in layers} == {64, 32}


def test_places_and_sizes_of_the_transformers() -> None:
    flux = adapter_for(tiny_flux())
    assert [layer.place for layer in flux.layers()] == ["double", "single", "single"]
    assert flux.default_size() == (512, 512)  # 128 latent rows of 4 pixels
    assert flux.text_length() == 512
    sd3 = adapter_for(tiny_sd3())
    assert {layer.place for layer in sd3.layers()} == {"double"}
    assert sd3.text_length() == 20 + 256
    assert adapter_for(tiny_sd3(t5=False)).text_length() == 20 + 256
    pixart = adapter_for(tiny_pixart())
    assert {layer.place for layer in pixart.layers()} == {"block"}
    assert [adapter_for(tiny_pixart(sigma=s)).text_length() for s in (False, True)] == [120, 300]
    assert pixart.default_size() == sd3.default_size() == (32, 32)
    for adapter in (flux, sd3, pixart):
        with pytest.raises(SettingError, match="width=36"):
            adapter.latent_size(32, 36)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_a_compiled_denoiser_is_refused_with_the_way_back(name: str) -> None:
    pipe = FAMILIES[name].make()
    path = "unet" if name == "sd" else "transformer"
    net = getattr(pipe, path)
    setattr(pipe, path, torch.compile(net))
    with pytest.raises(ModelError, match=f"`pipe.{path} = pipe.{path}._orig_mod`"):
        adapter_for(pipe)
    setattr(pipe, path, getattr(pipe, path)._orig_mod)
    adapter_for(pipe)
    inner = next(module for module in net.modules() if type(module).__name__.endswith("Block"))
    inner.compile()  # as `compile_repeated_blocks` does
    with pytest.raises(ModelError, match="compiled in place"):
        adapter_for(pipe)
    for part in net.modules():
        part._compiled_call_impl = None
    adapter_for(pipe)
