"""What families that denoise with a transformer share: one map size, that of the latent cut into patches."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from elakit.errors import ModelError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    OnlyRecorded,
    OtherKind,
    argument,
    compiled,
    running,
    stacked_rows,
)
from elakit.models.unet import check_sides
from elakit.words import TextSequence


class TransformerAdapter(OnlyRecorded):
    """Base of the families with a transformer, which names its layers and its text."""

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
        """The layers in which the picture attends to the text, in the order in which a pass meets them."""
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
        """Height and width in pixels of the picture drawn when nothing else is asked."""
        side = self.pipe.transformer.config.sample_size * self.pipe.vae_scale_factor
        return side, side

    def text(self) -> tuple[TextSequence, ...]:
        """The token sequences the denoiser sees."""
        raise NotImplementedError

    def text_length(self) -> int:
        """Text positions the denoiser sees, padding included, unless the call sets another ``max_sequence_length``."""
        last = self.text()[-1]
        return last.offset + last.length

    def _t5_length(self) -> int:
        """T5 positions of a call that sets none."""
        return int(inspect.signature(type(self.pipe).__call__).parameters["max_sequence_length"].default)
