"""What families that denoise with a ``UNet2DConditionModel`` share: cross-attention to the text, at several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from elakit.errors import ModelError, SettingError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    OtherKind,
    Place,
    argument,
    call_default,
    compiled,
    decoded,
    stacked_rows,
)
from elakit.tokens import TextSequence

# Pipelines with the right UNet whose batch holds the conditional half somewhere else, or that run passes of their own.
_OTHER_ROWS = {
    "StableDiffusionInstructPix2PixPipeline": "it guides by three passes (text and image, image, neither)",
    "StableDiffusionXLInstructPix2PixPipeline": "it guides by three passes (text and image, image, neither)",
    "StableDiffusionPanoramaPipeline": "it denoises many crops of one image",
}


class UNetAdapter:
    """Base of the families with a UNet; a family says how many text encoders it has, and its name."""

    family: ClassVar[str]
    two_encoders: ClassVar[bool]

    def __init__(self, pipe: Any) -> None:
        reason = self.refusal(pipe)
        if reason is not None:
            raise ModelError(f"{type(pipe).__name__} is not {self.family}: {reason}.")
        self.pipe = pipe
        self.denoiser: nn.Module = pipe.unet
        self._layers = tuple(_layers(pipe.unet))

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this adapter cannot serve a pipeline; None when it can."""
        unet = getattr(pipe, "unet", None)
        if unet is None:
            return OtherKind("it has no UNet")
        if reason := compiled(unet, "pipe.unet"):
            return reason
        if not isinstance(unet, UNet2DConditionModel):
            return f"its UNet is a {type(unet).__name__}, which does not attend to text as a UNet2DConditionModel does"
        second = any(getattr(pipe, name, None) is not None for name in ("tokenizer_2", "text_encoder_2"))
        if second != cls.two_encoders:
            return OtherKind(f"it has {'two text encoders' if second else 'one text encoder'}")
        if cls._tokenizer(pipe) is None:
            return "it has no tokenizer and text encoder"
        for kind in type(pipe).__mro__:
            if kind.__name__ in _OTHER_ROWS:
                return _OTHER_ROWS[kind.__name__]
        if not hasattr(type(pipe), "do_classifier_free_guidance"):
            return "it does not tell which rows of a batch are conditional (no `do_classifier_free_guidance`)"
        if next(_layers(unet), None) is None:
            return "no layer of its UNet attends to text"
        return None

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """As `refusal`, from a ``model_index.json``."""
        unet = (index.get("unet") or [None, None])[1]
        if unet is None:
            return OtherKind("it has no UNet")
        if unet != "UNet2DConditionModel":
            return f"its UNet is a {unet}, which does not attend to text"
        second = (index.get("tokenizer_2") or [None])[0] is not None
        if second != cls.two_encoders:
            return OtherKind(f"it has {'two text encoders' if second else 'one text encoder'}")
        return None

    @staticmethod
    def _tokenizer(pipe: Any) -> Any:
        """A tokenizer whose encoder is there."""
        if getattr(pipe, "text_encoder", None) is not None and getattr(pipe, "tokenizer", None) is not None:
            return pipe.tokenizer
        return None

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The cross-attention layers, in the order in which a forward pass meets them."""
        return self._layers

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a call of the UNet is: its rows, timestep and latent size."""
        sample = argument(args, kwargs, 0, "sample")
        timestep = torch.as_tensor(argument(args, kwargs, 1, "timestep"))
        return Call(sample.shape[0], float(timestep.flatten()[0]), (sample.shape[-2], sample.shape[-1]))

    def conditional_rows(self, batch: int) -> slice:
        """Rows of a denoiser batch that see the prompt.

        With classifier-free guidance diffusers stacks ``[unconditional..., conditional...]``, and perturbed-attention
        guidance appends a perturbed copy. The pipeline is asked anew each time, so guidance may end midway.

        Parameters
        ----------
        batch : int
            Rows of the batch the denoiser was called with.

        Raises
        ------
        ModelError
            When the batch does not divide into those parts.
        """
        return stacked_rows(self.pipe, batch, bool(getattr(self.pipe, "do_classifier_free_guidance", False)))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent of a picture of ``height`` x ``width`` pixels.

        Raises
        ------
        SettingError
            When a side is not a positive multiple of the autoencoder's factor.
        """
        factor = self.pipe.vae_scale_factor
        check_sides(height, width, factor)
        return height // factor, width // factor

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image drawn when nothing else is asked."""
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """One conditional pass; gradients flow when enabled.

        Parameters
        ----------
        latents : torch.Tensor, (n, c, h, w)
            Already scaled by the scheduler's ``scale_model_input``.
        timestep : torch.Tensor, float or int
        conditioning : Conditioning

        Returns
        -------
        torch.Tensor, (n, c, h, w)
        """
        return self.denoiser(latents, timestep, **conditioning.rows(len(latents), latents.dtype), return_dict=False)[0]

    def _distilled(self, guidance_scale: float | None) -> dict[str, Any]:
        """The scale of guidance as an input, where it is distilled into the UNet (latent consistency models)."""
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        scale = call_default(self.pipe, "guidance_scale") if guidance_scale is None else guidance_scale
        embedding = self.pipe.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=width)
        return {"timestep_cond": embedding.to(self.pipe._execution_device)}

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """The layers of self-attention that stand before given layers in their blocks.

        Raises
        ------
        ModelError
            A block has none.
        """
        return tuple(self_layer(self.denoiser, layer) for layer in beside)

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Noise of unit variance that an image starts from, (1, c, h, w)."""
        shape = (1, self.pipe.unet.config.in_channels, *self.latent_size(height, width))
        dtype = next(self.denoiser.parameters()).dtype
        return randn_tensor(shape, generator=generator, device=self.pipe._execution_device, dtype=dtype)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler as the pipeline's call will; how many times the noise its first latents are."""
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)
        return float(self.pipe.scheduler.init_noise_sigma)

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of latents, (n, c, h, w); of a run's middle too, where they are noisy."""
        return decoded(self.pipe, latents)

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it pass (step, latents) through ``move`` after each step."""
        return step_callback(move)

    def text_length(self) -> int:
        """Positions the text encoder takes, start, end and padding included."""
        return int(self._tokenizer(self.pipe).model_max_length)

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of CLIP tokens."""
        return (TextSequence("clip", self._tokenizer(self.pipe), 0, self.text_length()),)


def step_callback(move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The ``callback_on_step_end`` that passes (step, latents) through ``move``."""

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "latents": move(step, tensors["latents"])}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}


def self_layer(denoiser: nn.Module, beside: AttentionLayer) -> AttentionLayer:
    """The layer of self-attention that stands before one of cross-attention in its block."""
    name = beside.name.rpartition(".")[0] + ".attn1"
    try:
        module = denoiser.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, Attention) or module.is_cross_attention:
        raise ModelError(f"There is no self-attention beside {beside.name}; go without what reads it.")
    return replace(beside, name=name, heads=module.heads, module=module, reads="image")


def check_sides(height: int, width: int, factor: int) -> None:
    """Refuse sides of an image that are not positive multiples of a factor."""
    for name, side in (("height", height), ("width", width)):
        if side <= 0 or side % factor:
            raise SettingError(f"{name} is {side} pixels; it must be a positive multiple of {factor}.")


def _layers(unet: Any) -> Iterator[AttentionLayer]:
    """Yield the cross-attention layers in forward order (``named_modules`` would list the middle last)."""
    factor = 1
    for i, block in enumerate(unet.down_blocks):
        yield from _block_layers(block, f"down_blocks.{i}", "down", factor)
        factor *= 2 if block.downsamplers else 1
    if unet.mid_block is not None:
        yield from _block_layers(unet.mid_block, "mid_block", "mid", factor)
    for i, block in enumerate(unet.up_blocks):
        yield from _block_layers(block, f"up_blocks.{i}", "up", factor)
        factor //= 2 if block.upsamplers else 1


def _block_layers(block: nn.Module, prefix: str, place: Place, factor: int) -> Iterator[AttentionLayer]:
    for path, transformer in block.named_modules(prefix=prefix):
        if not isinstance(transformer, Transformer2DModel):
            continue
        for name, module in transformer.named_modules(prefix=path):
            if isinstance(module, Attention) and module.is_cross_attention:
                yield AttentionLayer(name, place, module.heads, module, transformer, factor)
