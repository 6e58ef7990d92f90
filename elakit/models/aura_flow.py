"""AuraFlow: an MM-DiT of double- and single-stream blocks over register tokens, T5 tokens and image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    Kind,
    Layout,
    Place,
    argument,
    scheduler_timestep,
)
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.tokens import TextSequence

_STACKS: tuple[tuple[str, Place, Kind], ...] = (
    ("joint_transformer_blocks", "double", "joint"),
    ("single_transformer_blocks", "single", "single"),
)


class AuraFlow(TransformerAdapter):
    """Adapter of AuraFlow pipelines.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "AuraFlow"
    models: ClassVar[tuple[str, ...]] = ("AuraFlowTransformer2DModel",)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        # read at the attention call, because releases of diffusers apply different norms to the text's keys
        return tuple(
            layer
            for stack, place, kind in _STACKS
            for layer in self._layers_at_call(stack, "attn", place, kind, text_first=True)
        )

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        """Layout of the sequence: register tokens and T5 tokens, which both count as text, then the image."""
        registers = self.pipe.transformer.register_tokens.shape[1]
        text = registers + argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call.

        The timestep is the scheduler's. The model receives a thousandth of it.
        """
        call = super().read_call(args, kwargs)
        return replace(call, timestep=scheduler_timestep(self.pipe, 1000 * call.timestep))

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, which follows the model's register tokens."""
        registers = self.pipe.transformer.register_tokens.shape[1]
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer, offset=registers, length=self._t5_length()),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and their padding masks.

        The pipeline's call requires the masks.
        """
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            prompt.text, prompt.negative, prompt.guided, device=self.pipe._execution_device
        )
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        return Conditioning(call, {"encoder_hidden_states": embeds})

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Number that the model receives as its timestep: a thousandth of the scheduler's ``timestep``.

        The result has one value for each row of ``latents``, and the precision of ``latents``.
        """
        return (super()._given(timestep, latents) / 1000).to(latents.dtype)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1: the initial noise is not scaled."""
        super().set_timesteps(steps, height, width)
        return 1.0
