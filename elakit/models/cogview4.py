"""CogView4: joint attention over one sequence of the states of a language model and image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from elakit.models.adapter import AttentionLayer, Call, Conditioning, Layout, argument
from elakit.models.encoding import PromptInput
from elakit.models.passes import Float32Latents, SeparateNegative
from elakit.tokens import TextSequence


class CogView4(SeparateNegative, Float32Latents):
    """Adapter of CogView4 pipelines.

    Text and image form one sequence, in which the text comes first. The pipeline pads the text on the left, to a
    multiple of 16 tokens. The image attends to the text and to the padding. With classifier-free guidance, the pipeline
    makes a second denoiser call for the negative prompt. That call is not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "CogView4"
    models: ClassVar[tuple[str, ...]] = ("CogView4Transformer2DModel",)

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "Control" in pipeline:
            return "its latents are joined with those of a control image (CogView4 Control), which is not supported"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn1", "single", "single", text_first=True)

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, and whether the call sees the prompt."""
        negative = self._is_negative(argument(args, kwargs, 1, "encoder_hidden_states"))
        return replace(super().read_call(args, kwargs), conditional=not negative)

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of GLM tokens, preceded by padding."""
        return (
            TextSequence(
                name="glm",
                tokenizer=self.pipe.tokenizer,
                offset=0,
                length=self._t5_length(),
                padding="left",
                multiple=16,
            ),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and the size of the image."""
        embeds, negative_embeds = self.pipe.encode_prompt(
            prompt.text, prompt.negative, prompt.guided, device=self.pipe._execution_device
        )
        call = {"prompt_embeds": embeds} | ({"negative_prompt_embeds": negative_embeds} if prompt.guided else {})
        sides = embeds.new_tensor([prompt.size])
        sizes = {"original_size": sides, "target_size": sides, "crop_coords": torch.zeros_like(sides)}
        return Conditioning(call, {"encoder_hidden_states": embeds, **sizes})

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1: the initial noise is not scaled."""
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift, retrieve_timesteps

        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        rows, columns = self.latent_size(height, width)
        mu = calculate_shift(
            rows * columns // self._patch**2,
            config.get("base_image_seq_len", 256),
            config.get("base_shift", 0.25),
            config.get("max_shift", 0.75),
        )
        whole = np.linspace(config.num_train_timesteps, 1.0, steps).astype(np.int64).astype(np.float32)
        levels = whole / config.num_train_timesteps
        retrieve_timesteps(scheduler, steps, self.pipe._execution_device, whole, levels, mu=mu)
        return 1.0
