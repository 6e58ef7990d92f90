"""CogView4: joint attention over one sequence of the states of a language model and image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from elakit.models.adapter import AttentionLayer, Call, Conditioning, Layout, argument
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.tokens import TextSequence


class CogView4(TransformerAdapter):
    """Adapter of CogView4 pipelines.

    The text comes first; the pipeline pads it on the left to a multiple of 16 tokens, and the image attends to the
    padding as well. Guidance is a second call with the negative prompt, which is not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "CogView4"
    models: ClassVar[tuple[str, ...]] = ("CogView4Transformer2DModel",)

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "Control" in pipeline:
            return "its latents are concatenated with those of a control image (CogView4 Control), not supported yet"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return tuple(
            AttentionLayer(
                name=f"transformer_blocks.{i}.attn1",
                place="single",
                heads=block.attn1.heads,
                module=block.attn1,
                block=self.denoiser,
                factor=self._patch,
                kind="single",
                text_first=True,
                takes_mask=False,
                grid=self._grid,
                layout=self._layout,
            )
            for i, block in enumerate(self.pipe.transformer.transformer_blocks)
        )

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Rows, timestep and latent size of a call of the transformer, and whether it sees the prompt."""
        negative = self._is_negative(argument(args, kwargs, 1, "encoder_hidden_states"))
        return replace(super().read_call(args, kwargs), conditional=not negative)

    def conditional_rows(self, batch: int) -> slice:
        """All rows; the negative prompt has a call of its own."""
        return slice(0, batch)

    def text(self) -> tuple[TextSequence, ...]:
        """Sequence of GLM's tokens, preceded by padding."""
        return (TextSequence("glm", self.pipe.tokenizer, 0, self._t5_length(), padding="left", multiple=16),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Text states and the size of the image."""
        embeds, negative_embeds = self.pipe.encode_prompt(
            prompt.text, prompt.negative, prompt.guided, device=self.pipe._execution_device
        )
        call = {"prompt_embeds": embeds} | ({"negative_prompt_embeds": negative_embeds} if prompt.guided else {})
        sides = embeds.new_tensor([prompt.size])
        sizes = {"original_size": sides, "target_size": sides, "crop_coords": torch.zeros_like(sides)}
        return Conditioning(call, {"encoder_hidden_states": embeds, **sizes})

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """One conditional pass; the pipeline keeps float32 latents whatever the model's precision."""
        return super().denoise(latents.to(self.denoiser.dtype), timestep, conditioning)  # type: ignore[arg-type]

    @property
    def _noise_dtype(self) -> torch.dtype:
        return torch.float32

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does; the initial latents are the noise itself."""
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
