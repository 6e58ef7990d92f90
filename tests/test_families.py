"""Families: each is read right, whatever way it is run, and draws the same image as without reading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny import autoencoder, ready, tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from torch import Tensor

from elakit.attention import RecordSpec, record, tap
from elakit.errors import ModelError, PromptError, RecordingError, SettingError
from elakit.models import Call, adapter_for
from elakit.prompt import Prompt, parse

TEXT = "a [red car] and a [blue giraffe]"
PLAIN = "a red car and a blue giraffe"


@dataclass
class Family:
    make: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)  # of each call
    guided: bool = True  # by stacking rows
    cut: int = 1  # of the latent into patches


SHORT = {"max_sequence_length": 14}
FAMILIES = {
    "sd": Family(tiny_pipeline),
    "sd2": Family(lambda: tiny_pipeline(use_linear_projection=True, attention_head_dim=(1, 2), upcast_attention=True)),
    "sdxl": Family(tiny_sdxl),
    "pixart-alpha": Family(tiny_pixart, {"use_resolution_binning": False} | SHORT, cut=2),
    "pixart-sigma": Family(lambda: tiny_pixart(sigma=True), {"use_resolution_binning": False} | SHORT, cut=2),
    "sd3": Family(tiny_sd3, SHORT, cut=2),
    "flux": Family(tiny_flux, SHORT | {"height": 32, "width": 32}, guided=False, cut=2),
}


def draw(pipe: Any, text: Any = PLAIN, **options: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(7)
    settings = {"num_inference_steps": 2, "generator": generator, "output_type": "np"} | options
    return pipe(text, **settings).images


@dataclass
class Seen:
    call: Call
    layer: str
    size: tuple[int, int]
    maps: Tensor  # (images, heads, h*w, text)


def observe(pipe: Any, run: Callable[[], Any]) -> tuple[Any, list[Seen]]:
    """What a run returns, and all that taps see of its conditional rows."""
    adapter = adapter_for(pipe)
    seen: list[Seen] = []
    now: dict[str, Any] = {}

    def before(_: Any, args: Any, kwargs: Any) -> None:
        now["call"] = call = adapter.read_call(args, kwargs)
        now["rows"] = adapter.conditional_rows(call.batch) if call.conditional else None

    def on_attention(layer: Any, attend: Any, size: tuple[int, int]) -> None:
        if now["rows"] is not None:
            seen.append(Seen(now["call"], layer.name, size, attend(now["rows"]).detach()))

    handle = adapter.denoiser.register_forward_pre_hook(before, with_kwargs=True)
    try:
        with tap(adapter.layers(), on_attention):
            result = run()
    finally:
        handle.remove()
    return result, seen


# -- an independent computation: numpy, float64, from what goes into a layer and its weights ---------------------------


def linear(module: Any, x: np.ndarray) -> np.ndarray:
    if hasattr(module, "base_layer"):  # LoRA
        y = linear(module.base_layer, x)
        if not module.merged:
            for name in module.active_adapters:
                y = y + module.scaling[name] * linear(module.lora_B[name], linear(module.lora_A[name], x))
        return y
    y = x @ module.weight.detach().double().numpy().T
    return y if module.bias is None else y + module.bias.detach().double().numpy()


def by_head(x: np.ndarray, heads: int, norm: Any = None) -> np.ndarray:
    """(n, heads*d) -> (heads, n, d), each row of each head brought to a root mean square of 1 and weighted."""
    x = x.reshape(len(x), heads, -1).transpose(1, 0, 2)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight.detach().double().numpy()
    return x


def turned(x: np.ndarray, ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Pairs of channels as complex numbers, turned by position / 10000^(2i/d) of each axis."""
    angles = [ids[:, nth, None] * 10000.0 ** (-np.arange(0, width, 2) / width)[None] for nth, width in enumerate(axes)]
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angles, axis=1))
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def one_row(module: Any, image: np.ndarray, text: np.ndarray | None, extra: dict[str, Any]) -> np.ndarray:
    """Probabilities of the text for image positions, of one row of the batch; (heads, n, text)."""
    heads, norm = module.heads, lambda name: getattr(module, name, None)
    if extra["kind"] == "single":
        words = extra["words"]
        q, k = (
            by_head(linear(part, image), heads, norm(name))
            for part, name in ((module.to_q, "norm_q"), (module.to_k, "norm_k"))
        )
        q, k = (turned(x, extra["ids"], (4, 6, 6)) for x in (q, k))
        return softmax(q[:, words:] @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))[..., :words]
    q = by_head(linear(module.to_q, image), heads, norm("norm_q"))
    assert text is not None
    if extra["kind"] == "cross":
        k = by_head(linear(module.to_k, text), heads, norm("norm_k"))
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        if extra.get("seen") is not None:
            scores = np.where(extra["seen"].astype(bool), scores, -np.inf)
        return softmax(scores)
    k = by_head(linear(module.to_k, image), heads, norm("norm_k"))
    words = by_head(linear(module.add_k_proj, text), heads, norm("norm_added_k"))
    if extra.get("ids") is not None:  # text comes first
        q = turned(q, extra["ids"][len(text) :], (4, 6, 6))
        k = turned(np.concatenate([words, k], axis=1), extra["ids"], (4, 6, 6))
        return softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))[..., : len(text)]
    k = np.concatenate([k, words], axis=1)
    return softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]))[..., -len(text) :]


def independent(pipe: Any, run: Callable[[], Any], guided: bool) -> list[np.ndarray]:
    """What `observe` should see, layer by layer and call by call: (images, heads, n, text)."""
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    found: list[np.ndarray] = []
    now: dict[str, Any] = {}
    handles = []

    def before(_: Any, args: Any, kwargs: Any) -> None:
        now.clear()
        if kwargs.get("img_ids") is not None:
            now["ids"] = torch.cat([kwargs["txt_ids"], kwargs["img_ids"]]).double().numpy()
            now["words"] = kwargs["encoder_hidden_states"].shape[1]
        now["seen"] = kwargs.get("encoder_attention_mask")

    def listen(module: Any, kind: str) -> None:
        def hook(_: Any, args: Any, kwargs: Any) -> None:
            image = args[0] if args else kwargs["hidden_states"]
            text = kwargs.get("encoder_hidden_states")
            text = text[0] if isinstance(text, tuple) else text  # beside an image prompt's states
            rows = []
            for b in range(len(image) // 2 if guided else 0, len(image)):  # a guided batch of one is not halved
                extra = {"kind": kind, "ids": now.get("ids"), "words": now.get("words")}
                extra["seen"] = None if now["seen"] is None else now["seen"][b].numpy()
                rows.append(
                    one_row(
                        module, image[b].double().numpy(), None if text is None else text[b].double().numpy(), extra
                    )
                )
            found.append(np.array(rows))

        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    for name, module in net.named_modules():
        if "single_transformer_blocks" in name and name.endswith(".attn"):
            listen(module, "single")
        elif name.endswith(".attn"):
            listen(module, "joint")
        elif name.endswith(".attn2") and getattr(module, "is_cross_attention", False):
            listen(module, "cross")
    handles.append(net.register_forward_pre_hook(before, with_kwargs=True))
    run()
    for handle in handles:
        handle.remove()
    return found


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
        else:  # the image attends to itself, too
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
    # The first step of both starts from the same noise, and so sees the same.
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
    # Every position is a word's, the start's or an end's.
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
    assert {one.maps.shape[-1] for one in seen} == {34}
    assert prompt.end_positions(34) == tuple(range(prompt.end_index, 34))


def test_pixart_reads_small_letters_and_masks_the_padding() -> None:
    pipe = tiny_pixart()
    options = FAMILIES["pixart-alpha"].options
    loud, quiet = parse("A [RED car]", pipe), parse("a [red car]", pipe)
    assert [token.index for token in loud.tokens] == [token.index for token in quiet.tokens]
    assert loud.entities[0].text == "RED car"
    _, seen = observe(pipe, lambda: draw(pipe, "A RED car", **options))
    for one in seen:
        assert float(one.maps[..., loud.end_index + 1 :].abs().max()) == 0
        assert float(one.maps[..., : loud.end_index + 1].min()) > 0
    pipe._text_preprocessing = lambda text, clean_caption: ["something else"]
    with pytest.raises(PromptError, match="reads 'a red car' as 'something else'"):
        parse("a [red car]", pipe)


def test_both_encoders_of_sdxl_share_positions() -> None:
    assert parse(TEXT, tiny_sdxl()) == parse(TEXT, tiny_pipeline())


# -- ways of running ---------------------------------------------------------------------------------------------------


def lora(net: Any, names: Sequence[str] = ("to_q", "to_k", "to_v", "add_k_proj")) -> None:
    inject_adapter_in_model(LoraConfig(r=2, init_lora_weights=False, target_modules=list(names)), net)


def denoiser(pipe: Any) -> Any:
    return adapter_for(pipe).denoiser


def fused_lora(pipe: Any) -> None:
    lora(denoiser(pipe))
    for module in denoiser(pipe).modules():
        if isinstance(module, LoraLayer):
            module.merge()


def offload(pipe: Any) -> None:
    cpu_offload_with_hook(denoiser(pipe), execution_device="cpu")


def ip_adapter(pipe: Any) -> None:
    """An IP-Adapter of random weights, loaded as from its file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if hasattr(pipe, "unet"):
            weights = _unet_image_weights(pipe.unet)
            pipe.load_ip_adapter(weights, subfolder="", weight_name="", image_encoder_folder=None)
        elif isinstance(pipe, StableDiffusion3Pipeline):
            pipe.load_ip_adapter(_sd3_image_weights(pipe.transformer), weight_name="", image_encoder_folder=None)
        else:
            weights = _flux_image_weights(pipe.transformer)
            pipe.load_ip_adapter(weights, weight_name="", image_encoder_pretrained_model_name_or_path=None)


def _projection(width: int) -> dict[str, Tensor]:
    """Of an image's state of 8 channels to 4 tokens."""
    return {
        "proj.weight": torch.randn(4 * width, 8),
        "proj.bias": torch.zeros(4 * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }


def _unet_image_weights(net: Any) -> dict[str, dict[str, Tensor]]:
    width, weights = net.config.cross_attention_dim, {}
    names = [name for name in net.attn_processors if "attn2" in name]
    for key, name in enumerate(names):
        module = net.get_submodule(name.removesuffix(".processor"))
        for part, weight in IPAdapterAttnProcessor(module.inner_dim, width).state_dict().items():
            weights[f"{2 * key + 1}.{part.replace('.0.', '.')}"] = weight
    return {"image_proj": _projection(width), "ip_adapter": weights}


def _sd3_image_weights(net: Any) -> dict[str, dict[str, Tensor]]:
    config, weights = net.config, {}
    width = config.attention_head_dim * config.num_attention_heads
    for key in range(len(net.attn_processors)):
        processor = SD3IPAdapterJointAttnProcessor2_0(width, width, config.attention_head_dim, timesteps_emb_dim=64)
        weights |= {f"{key}.{part}": weight for part, weight in processor.state_dict().items()}
    sides = {"embed_dim": 8, "output_dim": width, "hidden_dim": 64, "heads": 1, "num_queries": 4, "timestep_in_dim": 8}
    return {"image_proj": IPAdapterTimeImageProjection(**sides).state_dict(), "ip_adapter": weights}


def _flux_image_weights(net: Any) -> dict[str, dict[str, Tensor]]:
    width, weights = net.config.joint_attention_dim, {}
    for key in range(len(net.transformer_blocks)):
        for part, weight in FluxIPAdapterAttnProcessor(net.inner_dim, width).state_dict().items():
            weights[f"{key}.{part.replace('.0.', '.')}"] = weight
    return {"image_proj": _projection(width), "ip_adapter": weights}


def end_guidance(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    if step == 0:
        pipe._guidance_scale = 1.0
        tensors |= {name: each.chunk(2)[1] for name, each in tensors.items() if name != "latents"}
    return tensors


def ends_midway(*names: str) -> dict[str, Any]:
    return {"callback_on_step_end": end_guidance, "callback_on_step_end_tensor_inputs": ["latents", *names]}


IMAGE_EMBEDS = {"ip_adapter_image_embeds": [torch.linspace(-1, 1, 16).reshape(2, 1, 8)]}
ENDED = {
    "sd": ends_midway("prompt_embeds"),
    "sd2": ends_midway("prompt_embeds"),
    "sdxl": ends_midway("prompt_embeds", "add_text_embeds", "add_time_ids"),
    "sd3": ends_midway("prompt_embeds", "pooled_prompt_embeds"),
}
IMAGES = {
    "sd": IMAGE_EMBEDS,
    "sdxl": IMAGE_EMBEDS,
    "sd3": {"ip_adapter_image_embeds": torch.linspace(-1, 1, 16).reshape(2, 1, 8)},
    "flux": {
        "ip_adapter_image_embeds": [torch.linspace(-1, 1, 8).reshape(1, 1, 8)],
        "negative_ip_adapter_image_embeds": [torch.zeros(1, 1, 8)],
    },
}
GUIDED = [name for name, family in FAMILIES.items() if family.guided]


def _each(names: Iterable[str], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(names, options)


# Of each way: what is done to the pipeline, and the families it is there for, with options of their calls.
WAYS: dict[str, tuple[Callable[[Any], Any], dict[str, dict[str, Any]]]] = {
    "without guidance": (lambda pipe: None, _each(GUIDED, {"guidance_scale": 1.0})),
    "guidance that ends midway": (lambda pipe: None, ENDED),
    "negative prompt": (lambda pipe: None, _each(GUIDED, {"negative_prompt": "a dog"})),
    "several images": (lambda pipe: None, _each(FAMILIES, {"num_images_per_prompt": 3})),
    "not square": (lambda pipe: None, _each(FAMILIES, {"height": 48, "width": 32})),
    "attention slicing": (lambda pipe: pipe.enable_attention_slicing("max"), _each(("sd", "sd2", "sdxl"), {})),
    "fused projections": (
        lambda pipe: denoiser(pipe).fuse_qkv_projections(),
        _each([name for name in FAMILIES if name != "sd3"], {}),
    ),
    "lora": (lambda pipe: lora(denoiser(pipe)), _each(FAMILIES, {})),
    "fused lora": (fused_lora, _each(FAMILIES, {})),
    "image prompt (IP-Adapter)": (ip_adapter, IMAGES),
    "offload": (offload, _each(FAMILIES, {})),
    "channels last": (lambda pipe: denoiser(pipe).to(memory_format=torch.channels_last), _each(FAMILIES, {})),
    "bfloat16": (lambda pipe: pipe.to(dtype=torch.bfloat16), _each(FAMILIES, {"output_type": "latent"})),
    "float16": (lambda pipe: pipe.to(dtype=torch.float16), _each(FAMILIES, {"output_type": "latent"})),
}


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
    with record(pipe, prompt, RecordSpec(heads="all", dtype="float32")) as recording:
        assert torch.equal(plain, torch.as_tensor(draw(pipe, **options)))
    assert hooks_of(pipe) == before
    truth = independent(pipe, lambda: draw(pipe, **options), family.guided)
    assert len(truth) == len(recording.steps) * len(recording.layers)
    where = {layer: node for node in recording.tree.children.values() for layer in node["layer"].values}
    # Projections of half precision are rounded before we see them.
    tolerance = {"bfloat16": 0.1, "float16": 0.01}.get(way, 1e-5)
    for at, expected in enumerate(truth):
        layer = recording.layers[at % len(recording.layers)]
        kept = where[layer]["probability"].sel(layer=layer).isel(step=at // len(recording.layers))
        kept = kept.values.reshape(*expected.shape[:3], -1)  # (images, heads, n, tokens)
        words = [i for i in where[layer]["token_index"].values if i >= 0]
        np.testing.assert_allclose(kept[..., : len(words)], expected[..., words], atol=tolerance)
        end = expected[..., list(prompt.end_positions(expected.shape[-1]))].sum(-1)
        np.testing.assert_allclose(kept[..., -1], end, atol=tolerance)


def hooks_of(pipe: Any) -> int:
    modules = denoiser(pipe).modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


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
    """There diffusers leaves out the norms of queries and keys; so do we."""
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

    with pytest.raises(RecordingError, match="Do that before"):
        observe(pipe, run)
    pipe.unet.unfuse_qkv_projections()
    assert observe(pipe, lambda: draw(pipe))[1]


@dataclass
class Relative:
    """Another pipeline of a family: its class, family, options of its calls, and how its components differ."""

    pipeline: Any
    family: str
    options: dict[str, Any]
    make: Callable[[], Any] | None = None  # what has the components, where the family's own do not do
    extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}  # components to add or to replace

    def build(self) -> Any:
        parts = (self.make or FAMILIES[self.family].make)().components
        parts = {key: part for key, part in parts.items() if part is not None}
        switches = {"sd": {"requires_safety_checker": False}, "sdxl": {"add_watermarker": False}}.get(self.family, {})
        if self.family == "sd":
            switches |= {"safety_checker": None, "feature_extractor": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return ready(self.pipeline(**parts | self.extra(parts) | switches))


def _controlnet_of_unet(parts: dict[str, Any]) -> dict[str, Any]:
    return {"controlnet": ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(16, 16, 16))}


def _controlnet_of_sd3(parts: dict[str, Any]) -> dict[str, Any]:
    net = parts["transformer"]
    return {"controlnet": SD3ControlNetModel.from_transformer(net, num_layers=1, num_extra_conditioning_channels=0)}


def _controlnet_of_flux(parts: dict[str, Any]) -> dict[str, Any]:
    sides = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}
    return {"controlnet": FluxControlNetModel.from_transformer(parts["transformer"], **sides)}


IMAGE = Image.fromarray(np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype("uint8"))
MASK = Image.fromarray(np.triu(np.full((32, 32), 255, "uint8")))
SIDES = {"height": 32, "width": 32}
AGAIN = {"image": IMAGE, "strength": 0.9}
FILLED = AGAIN | {"mask_image": MASK} | SIDES
RELATIVES = {
    "img2img": Relative(StableDiffusionImg2ImgPipeline, "sd", AGAIN),
    "inpaint": Relative(StableDiffusionInpaintPipeline, "sd", FILLED | {"strength": 1.0}),
    "inpaint, a UNet for it": Relative(  # of latents, those of the image, and the mask
        StableDiffusionInpaintPipeline, "sd", FILLED | {"strength": 1.0}, lambda: tiny_pipeline(in_channels=9)
    ),
    "controlnet": Relative(StableDiffusionControlNetPipeline, "sd", {"image": IMAGE}, extra=_controlnet_of_unet),
    "sdxl img2img": Relative(StableDiffusionXLImg2ImgPipeline, "sdxl", AGAIN),
    "sdxl inpaint": Relative(StableDiffusionXLInpaintPipeline, "sdxl", FILLED),
    "sdxl controlnet": Relative(
        StableDiffusionXLControlNetPipeline, "sdxl", {"image": IMAGE}, extra=_controlnet_of_unet
    ),
    "sd3 img2img": Relative(StableDiffusion3Img2ImgPipeline, "sd3", AGAIN | SIDES | SHORT),
    "sd3 inpaint": Relative(
        StableDiffusion3InpaintPipeline,
        "sd3",
        FILLED | SHORT,
        lambda: tiny_sd3(in_channels=16, out_channels=16),  # it takes no other
        lambda parts: {"vae": autoencoder(shift_factor=0.06, latent_channels=16)},
    ),
    "sd3 controlnet": Relative(
        StableDiffusion3ControlNetPipeline,
        "sd3",
        {"control_image": IMAGE} | SIDES | SHORT,
        lambda: tiny_sd3(dual_attention_layers=()),
        _controlnet_of_sd3,
    ),
    "flux img2img": Relative(FluxImg2ImgPipeline, "flux", AGAIN | SIDES | SHORT),
    "flux inpaint": Relative(FluxInpaintPipeline, "flux", FILLED | SHORT),
    "flux fill": Relative(  # of latents, those of the image, and the mask, all packed
        FluxFillPipeline,
        "flux",
        {"image": IMAGE, "mask_image": MASK} | SIDES | SHORT,
        lambda: tiny_flux(in_channels=16 + 16 + 64, out_channels=16),
    ),
    "flux controlnet": Relative(
        FluxControlNetPipeline, "flux", {"control_image": IMAGE} | SIDES | SHORT, extra=_controlnet_of_flux
    ),
}


@pytest.mark.parametrize("name", RELATIVES)
def test_other_pipelines_of_a_family_are_read_alike(name: str) -> None:
    relative = RELATIVES[name]
    pipe, options = relative.build(), relative.options
    made: list[int] = []
    handle = denoiser(pipe).register_forward_pre_hook(lambda *_: made.append(1))
    plain = draw(pipe, **options)
    handle.remove()
    image, seen = observe(pipe, lambda: draw(pipe, **options))
    assert np.array_equal(plain, image)
    calls = {one.call.timestep for one in seen}
    assert len(seen) == len(calls) * len(adapter_for(pipe).layers())
    assert {one.maps.shape[0] for one in seen} == {1}
    assert calls <= set(pipe.scheduler.timesteps.tolist())  # the scheduler's own numbers, not the model's
    assert len(calls) == len(made)
    truth = independent(pipe, lambda: draw(pipe, **options), FAMILIES[relative.family].guided)
    for one, expected in zip(seen, truth, strict=True):
        np.testing.assert_allclose(one.maps.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_read_can_be_differentiated(name: str) -> None:
    """How much is attended to a word has a gradient at the latent, and a step along it does what it says."""
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
    assert flux.default_size() == (512, 512)  # 128 latent rows, of 4 pixels in the tiny one
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
        with pytest.raises(SettingError, match="width is 36"):
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


def test_kontext_is_refused() -> None:
    parts = {k: v for k, v in tiny_flux().components.items() if v is not None}
    with pytest.raises(ModelError, match="another image"):
        adapter_for(FluxKontextPipeline(**parts))
