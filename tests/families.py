"""Tiny pipelines of every family, the ways to run them, and an independent computation of their attention."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import cpu_offload_with_hook
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    PixArtSigmaPAGPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from PIL import Image
from tiny import autoencoder, ready, tiny_flux, tiny_pipeline, tiny_pixart, tiny_sd3, tiny_sdxl
from torch import Tensor

from elakit.attention import tap
from elakit.models import Call, adapter_for

TEXT = "a [red car] and a [blue giraffe]"
PLAIN = "a red car and a blue giraffe"


@dataclass
class Family:
    make: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)  # options of each call
    guided: bool = True  # whether guidance stacks rows in one batch
    cut: int = 1  # side of a patch of the latent


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
    """Return the result of a run, and what taps see of its conditional rows."""
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
    """Split (n, heads*d) into (heads, n, d); with a norm, each row of each head is scaled to a root mean square of 1
    and weighted."""
    x = x.reshape(len(x), heads, -1).transpose(1, 0, 2)
    if norm is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.eps) * norm.weight.detach().double().numpy()
    return x


def turned(x: np.ndarray, ids: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """Rotate pairs of channels, as complex numbers, by position / 10000^(2i/d) for each axis."""
    angles = [ids[:, nth, None] * 10000.0 ** (-np.arange(0, width, 2) / width)[None] for nth, width in enumerate(axes)]
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(angles, axis=1))
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


def softmax(scores: np.ndarray) -> np.ndarray:
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def one_row(module: Any, image: np.ndarray, text: np.ndarray | None, extra: dict[str, Any]) -> np.ndarray:
    """Compute the attention of image positions to the text for one row of the batch, (heads, n, text)."""
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
    """Compute what `observe` has to see, by layer and call: (images, heads, n, text)."""
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
            text = text[0] if isinstance(text, tuple) else text  # with the states of an image prompt beside it
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
    """Load an IP-Adapter with random weights, as from its file."""
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
    """Weights that project an image state of 8 channels to 4 tokens."""
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


def hooks_of(pipe: Any) -> int:
    modules = denoiser(pipe).modules()
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)


@dataclass
class Relative:
    """Another pipeline of a family: its class, family, options of its calls, and how its components differ."""

    pipeline: Any
    family: str
    options: dict[str, Any]
    make: Callable[[], Any] | None = None  # a pipeline with the components, if those of the family do not fit
    extra: Callable[[dict[str, Any]], dict[str, Any]] = lambda parts: {}  # components to add or replace

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
PERTURBED = {"pag_scale": 3.0}
FILLED = AGAIN | {"mask_image": MASK} | SIDES
RELATIVES = {
    "img2img": Relative(StableDiffusionImg2ImgPipeline, "sd", AGAIN),
    "inpaint": Relative(StableDiffusionInpaintPipeline, "sd", FILLED | {"strength": 1.0}),
    "inpaint, a U-Net for it": Relative(  # input: latents, latents of the image, and the mask
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
        lambda: tiny_sd3(in_channels=16, out_channels=16),  # the pipeline accepts no other number of channels
        lambda parts: {"vae": autoencoder(shift_factor=0.06, latent_channels=16)},
    ),
    "sd3 controlnet": Relative(
        StableDiffusion3ControlNetPipeline,
        "sd3",
        {"control_image": IMAGE} | SIDES | SHORT,
        lambda: tiny_sd3(dual_attention_layers=()),
        _controlnet_of_sd3,
    ),
    "perturbed-attention guidance": Relative(StableDiffusionPAGPipeline, "sd", PERTURBED),
    "sdxl perturbed-attention guidance": Relative(StableDiffusionXLPAGPipeline, "sdxl", PERTURBED),
    "pixart perturbed-attention guidance": Relative(
        PixArtSigmaPAGPipeline, "pixart-sigma", PERTURBED | FAMILIES["pixart-sigma"].options
    ),
    "sd3 perturbed-attention guidance": Relative(StableDiffusion3PAGPipeline, "sd3", PERTURBED | SIDES | SHORT),
    "flux img2img": Relative(FluxImg2ImgPipeline, "flux", AGAIN | SIDES | SHORT),
    "flux inpaint": Relative(FluxInpaintPipeline, "flux", FILLED | SHORT),
    "flux fill": Relative(  # input: latents, latents of the image, and the mask, all packed
        FluxFillPipeline,
        "flux",
        {"image": IMAGE, "mask_image": MASK} | SIDES | SHORT,
        lambda: tiny_flux(in_channels=16 + 16 + 64, out_channels=16),
    ),
    "flux controlnet": Relative(
        FluxControlNetPipeline, "flux", {"control_image": IMAGE} | SIDES | SHORT, extra=_controlnet_of_flux
    ),
}
