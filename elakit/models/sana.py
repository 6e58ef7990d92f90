"""Sana: a transformer with linear self-attention, and cross-attention to the text states of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from elakit.errors import ModelError, PromptError
from elakit.models.adapter import WITHOUT_SELF, AttentionLayer, Call, Conditioning, Layout, argument, call_default
from elakit.models.encoding import PromptInput
from elakit.models.passes import Float32Latents
from elakit.tokens import TextSequence


class Sana(Float32Latents):
    """Adapter through which elakit reads and runs Sana pipelines.

    The pipeline lowercases the prompt, and puts an instruction before the prompt. The denoiser sees the text state of
    the first token of the instruction, then the text states of the prompt. The other states of the instruction are
    discarded.

    `elakit.generate` generates at exactly the given size, because it switches off the pipeline's resolution binning.
    Resolution binning would generate at the nearest size of a list, and then resize the image.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Sana"
    models: ClassVar[tuple[str, ...]] = ("SanaTransformer2DModel",)

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "Sprint" in pipeline:
            return "its scheduler counts time as an angle (Sana Sprint), which is not supported yet"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn2", "block")

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), 0, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call.

        The returned timestep is the scheduler's. The model receives this timestep times ``timestep_scale``.
        """
        call = super().read_call(args, kwargs)
        return replace(call, timestep=call.timestep / self.pipe.transformer.config.timestep_scale)

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        return call_default(self.pipe, "height"), call_default(self.pipe, "width")

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the first token of the instruction, then the prompt.

        The pipeline puts an instruction before the prompt. It discards the text states of all tokens of the instruction
        except the first. The tokenizer is that of the language model Gemma.
        """
        tokenizer = self.pipe.tokenizer
        instruction = "\n".join(call_default(self.pipe, "complex_human_instruction"))
        return (
            TextSequence(
                name="gemma",
                tokenizer=tokenizer,
                offset=0,
                length=self._t5_length(),
                read=self._as_read,
                before=instruction,
                dropped=len(tokenizer.encode(instruction)) - 2,
            ),
        )

    def _as_read(self, text: str) -> str:
        lowered = text.lower()
        if text != text.strip() or len(lowered) != len(text):
            raise PromptError(
                f"{type(self.pipe).__name__} reads {text!r} as {lowered.strip()!r}, so the prompt's tokens cannot be "
                "matched to its words: write the prompt as the pipeline reads it."
            )
        return lowered

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and their padding mask."""
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            prompt.text,
            prompt.guided,
            negative_prompt=prompt.negative or "",
            device=self.pipe._execution_device,
            clean_caption=False,
            max_sequence_length=self._t5_length(),
            complex_human_instruction=call_default(self.pipe, "complex_human_instruction"),
        )
        # The pipeline's default negative prompt is a text, which it does not accept together with text states.
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt": None}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        inputs = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
        return Conditioning(call | {"use_resolution_binning": False}, inputs)

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        return super()._given(timestep, latents) * self.pipe.transformer.config.timestep_scale

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise."""
        super().set_timesteps(steps, height, width)
        return 1.0

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Raise a `ModelError`, because the self-attention of Sana is linear and has no attention probabilities."""
        raise ModelError(f"{self.family} has linear self-attention, which has no attention maps. {WITHOUT_SELF}")
