"""What families that denoise with a transformer share: one map size, that of the latent cut into patches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn

from elakit.errors import ModelError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    OtherKind,
    argument,
    call_default,
    compiled,
    decoded,
    running,
    stacked_rows,
)
from elakit.models.unet import check_sides, self_layer, step_callback
from elakit.tokens import TextSequence


class TransformerAdapter:
    """Base of the families with a transformer, which names its layers and its text.

    A family is recorded with that alone. To be guided and drawn by `elakit.generate` it also says how it encodes a
    prompt, and which timestep its model is given where that is not the scheduler's.
    """

    family: ClassVar[str]
    model: ClassVar[type[nn.Module]]
    model_names: ClassVar[tuple[str, ...]]  # in a model_index.json

    def __init__(self, pipe: Any) -> None:
        reason = self.refusal(pipe)
        if reason is not None:
            raise ModelError(f"{type(pipe).__name__} is not {self.family}: {reason}.")
        self.pipe = pipe
        self.denoiser: nn.Module = pipe.transformer
        self._layers = self._make_layers()

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this adapter cannot serve a pipeline; None when it can."""
        transformer = getattr(pipe, "transformer", None)
        if transformer is None:
            return OtherKind("it has no transformer")
        plain = getattr(transformer, "_orig_mod", transformer)
        if not isinstance(plain, cls.model):
            return OtherKind(f"its transformer is a {type(plain).__name__}")
        return compiled(transformer, "pipe.transformer")

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """As `refusal`, from a ``model_index.json``."""
        transformer = (index.get("transformer") or [None, None])[1]
        if transformer is None:
            return OtherKind("it has no transformer")
        return None if transformer in cls.model_names else OtherKind(f"its transformer is a {transformer}")

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        raise NotImplementedError

    @property
    def _patch(self) -> int:
        return int(self.pipe.transformer.config.patch_size)

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of patches of a call of the denoiser."""
        latents = argument(args, kwargs, 0, "hidden_states")
        return latents.shape[-2] // self._patch, latents.shape[-1] // self._patch

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The layers in which the image attends to the text, in the order in which a pass meets them."""
        return self._layers

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a call of the transformer is: its rows, timestep and latent size."""
        latents = argument(args, kwargs, 0, "hidden_states")
        timestep = torch.as_tensor(kwargs["timestep"])
        return Call(latents.shape[0], float(timestep.flatten()[0]), (latents.shape[-2], latents.shape[-1]))

    def conditional_rows(self, batch: int) -> slice:
        """Rows of a denoiser batch that see the prompt; the pipeline is asked anew each time.

        Some pipelines (PixArt) keep to themselves whether they guide, so their running call is read; outside a call
        all rows see the prompt.
        """
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None:
            guided = running(self.pipe).get("do_classifier_free_guidance", False)
        return stacked_rows(self.pipe, batch, bool(guided))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent of a picture of ``height`` x ``width`` pixels, before it is cut into patches.

        Raises
        ------
        SettingError
            When a side is not a positive multiple of the factors of autoencoder and patches.
        """
        factor = self.pipe.vae_scale_factor
        check_sides(height, width, factor * self._patch)
        return height // factor, width // factor

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image drawn when nothing else is asked."""
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Refuse: a family that has no ``encode`` of its own is only recorded."""
        raise ModelError(
            f"{self.family} can be recorded, but `elakit.generate` and guidance do not know it yet: call the pipeline "
            "yourself inside `with elakit.record(pipe, prompt) as recording:`."
        )

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """One conditional pass; gradients flow when enabled.

        Parameters
        ----------
        latents : torch.Tensor, (n, ...)
            As the pipeline keeps them.
        timestep : torch.Tensor, float or int
            The scheduler's.
        conditioning : Conditioning

        Returns
        -------
        torch.Tensor, (n, ...)
            What the model puts out, a learned variance included.
        """
        return self.denoiser(
            hidden_states=latents,
            timestep=self._given(timestep, latents),
            **conditioning.rows(len(latents), latents.dtype),
            return_dict=False,
        )[0]

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """The timestep as the model is given it, one a row."""
        return torch.as_tensor(timestep, device=latents.device).expand(len(latents))

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Layers that read self-attention, one for each of the given layers.

        These are the layers of self-attention in the same blocks. In joint attention, where image and text are keys
        side by side, they are the given layers themselves: their attention to the keys of the image, whose rows sum to
        the share that the image gets beside the text.

        Raises
        ------
        ModelError
            When a block has no self-attention.
        """
        return tuple(
            self_layer(self.denoiser, layer) if layer.kind == "cross" else replace(layer, reads="image")
            for layer in beside
        )

    @property
    def _channels(self) -> int:
        """Of the latent."""
        return int(self.pipe.transformer.config.in_channels)

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Noise of unit variance that an image starts from, (1, c, h, w)."""
        shape = (1, self._channels, *self.latent_size(height, width))
        dtype = next(self.denoiser.parameters()).dtype
        return randn_tensor(shape, generator=generator, device=self.pipe._execution_device, dtype=dtype)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler as the pipeline's call will; how many times the noise its first latents are."""
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)
        return float(getattr(self.pipe.scheduler, "init_noise_sigma", 1.0))

    def _shift(self, height: int, width: int, largest: float) -> float:
        """How far the timesteps of a flow are shifted for an image's size (``mu``), as diffusers' pipelines do it.

        ``largest`` is the pipeline's own default of ``max_shift``, for schedulers that do not say.
        """
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # slow to import without a pipeline

        rows, columns = self.latent_size(height, width)
        config = self.pipe.scheduler.config
        shift: float = calculate_shift(
            (rows // self._patch) * (columns // self._patch),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", largest),
        )
        return shift

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of latents, (n, c, h, w); of a run's middle too, where they are noisy."""
        return decoded(self.pipe, latents)

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it pass (step, latents) through ``move`` after each step."""
        return step_callback(move)

    def text(self) -> tuple[TextSequence, ...]:
        """The token sequences the denoiser sees."""
        raise NotImplementedError

    def text_length(self) -> int:
        """Text positions the denoiser sees, padding included, unless the call sets another ``max_sequence_length``."""
        last = self.text()[-1]
        return last.offset + last.length

    def _t5_length(self) -> int:
        """T5 positions of a call that sets none."""
        return int(call_default(self.pipe, "max_sequence_length"))
