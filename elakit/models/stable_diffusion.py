"""Stable Diffusion 1.x and 2.x: which layers attend to the text, at what size, how one conditional pass runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn

from elakit.errors import ModelError, SettingError

Place = Literal["down", "mid", "up"]

# Pipelines with the right UNet whose batch holds the conditional half somewhere else, or that run passes of their own.
_OTHER_ROWS = {
    "StableDiffusionInstructPix2PixPipeline": "it guides by three passes (text and image, image, neither)",
    "StableDiffusionPanoramaPipeline": "it denoises many crops of one picture",
}


@dataclass(frozen=True)
class AttentionLayer:
    """One layer of the denoiser in which picture positions attend to the text.

    Attributes
    ----------
    name : str
        Path of the attention module in the denoiser, such as
        ``"up_blocks.1.attentions.0.transformer_blocks.0.attn2"``.
    place : {"down", "mid", "up"}
        Side of the UNet.
    heads : int
        Attention heads.
    module : torch.nn.Module
        The attention module; its ``to_q`` and ``to_k`` are what recording reads.
    block : torch.nn.Module
        The module around it whose input is the picture, (B, C, h, w): that is where h and w come from.
    factor : int
        Side of the latent divided by the side of this layer's maps.
    """

    name: str
    place: Place
    heads: int
    module: nn.Module
    block: nn.Module
    factor: int


class StableDiffusion:
    """Adapter of pipelines that denoise with one ``UNet2DConditionModel`` and one CLIP text encoder.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        ``StableDiffusionPipeline`` or a pipeline with the same UNet (img2img, inpainting, ControlNet...).

    Raises
    ------
    ModelError
        When the pipeline is of another family; the message says in what it differs.
    """

    family: ClassVar[str] = "Stable Diffusion 1.x/2.x"

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
            return "it has no UNet"
        if hasattr(unet, "_orig_mod"):
            return "its UNet was wrapped by torch.compile; use the plain one, `pipe.unet = pipe.unet._orig_mod`"
        if not isinstance(unet, UNet2DConditionModel):
            return f"its UNet is a {type(unet).__name__}, which does not attend to text as a UNet2DConditionModel does"
        if getattr(pipe, "tokenizer_2", None) is not None or getattr(pipe, "text_encoder_2", None) is not None:
            return "it has two text encoders (SDXL); that family is not supported yet"
        if getattr(pipe, "tokenizer", None) is None or getattr(pipe, "text_encoder", None) is None:
            return "it has no tokenizer and text encoder"
        for kind in type(pipe).__mro__:
            if kind.__name__ in _OTHER_ROWS:
                return _OTHER_ROWS[kind.__name__]
        if not hasattr(type(pipe), "do_classifier_free_guidance"):
            return "it does not tell which rows of a batch are conditional (no `do_classifier_free_guidance`)"
        if next(_layers(unet), None) is None:
            return "no layer of its UNet attends to text"
        return None

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The cross-attention layers, in the order in which a forward pass meets them."""
        return self._layers

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
        guided = bool(getattr(self.pipe, "do_classifier_free_guidance", False))
        perturbed = bool(getattr(self.pipe, "do_perturbed_attention_guidance", False))
        parts = 1 + guided + perturbed
        if batch % parts:
            raise ModelError(
                f"The denoiser was called with {batch} rows, but {type(self.pipe).__name__} guides now with {parts} "
                "passes stacked in one batch. Calls of your own go inside `elakit.attention.paused(pipe)`."
            )
        images = batch // parts
        return slice(guided * images, (guided + 1) * images)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent of a picture of ``height`` x ``width`` pixels.

        Raises
        ------
        SettingError
            When a side is not a positive multiple of the autoencoder's factor.
        """
        factor = self.pipe.vae_scale_factor
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % factor:
                raise SettingError(f"{name} is {side} pixels; it must be a positive multiple of {factor}.")
        return height // factor, width // factor

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the picture drawn when nothing else is asked."""
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def text_length(self) -> int:
        """Positions the text encoder takes, start, end and padding included."""
        return int(self.pipe.tokenizer.model_max_length)

    @torch.no_grad()
    def encode(
        self, text: str, negative: str | None = None, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text states, as the pipeline itself computes them.

        Returns
        -------
        prompt_embeds : torch.Tensor, (1, positions, channels)
        negative_embeds : torch.Tensor, (1, positions, channels), or None
            None when not ``guided``.
        """
        prompt_embeds, negative_embeds = self.pipe.encode_prompt(
            text, self.pipe._execution_device, 1, guided, negative_prompt=negative if guided else None
        )
        return prompt_embeds, negative_embeds if guided else None

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, embeds: torch.Tensor
    ) -> torch.Tensor:
        """One pass of the denoiser: prediction of the same shape as ``latents``; gradients flow when enabled.

        Parameters
        ----------
        latents : torch.Tensor, (B, C, h, w)
            Already scaled by the scheduler's ``scale_model_input``.
        timestep : torch.Tensor, float or int
        embeds : torch.Tensor, (B, positions, channels)
        """
        return self.denoiser(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]


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
