"""Lumina-Image 2.0: single-stream blocks over one sequence of the states of a language model and image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from elakit.errors import ModelError
from elakit.models.adapter import AttentionLayer, Call, Conditioning, Layout, argument, scheduler_timestep
from elakit.models.encoding import PromptInput
from elakit.models.passes import SeparateNegative
from elakit.pipeline import Pipeline, TransformerPipeline
from elakit.tokens import TextSequence


class Lumina2Pipeline(TransformerPipeline, Protocol):
    """Typing protocol of a Lumina 2 pipeline.

    It adds to `TransformerPipeline` the other members that the adapter `Lumina2` uses.
    """

    system_prompt: str


class Lumina2(SeparateNegative):
    """Adapter of Lumina 2 pipelines.

    The sequence consists of the text without padding, then the image. Several query heads share one key head
    (grouped-query attention). The pipeline puts a system message before the prompt. With classifier-free guidance, it
    makes a second denoiser call for the negative prompt. That call is not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Lumina 2"
    pipe: Lumina2Pipeline
    models: ClassVar[tuple[str, ...]] = ("Lumina2Transformer2DModel",)

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        self._seen: tuple[torch.Tensor, int] | None = None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("layers", "attn", "single", "single", text_first=True)

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        mask = argument(args, kwargs, 3, "encoder_attention_mask")
        if self._seen is None or self._seen[0] is not mask:  # once per run, as it waits for the device
            counts = {int(count) for count in mask.sum(1)}
            if len(counts) > 1:
                raise ModelError(
                    f"The transformer was called with texts of {sorted(counts)} tokens in one batch; record one prompt "
                    "at a time."
                )
            self._seen = mask, counts.pop()
        text = self._seen[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a call of the transformer.

        The timestep is the scheduler's. It is found from the time, 0 (noise) to 1 (image), that the model receives.
        """
        latents = argument(args, kwargs, 0, "hidden_states")
        given = float(torch.as_tensor(argument(args, kwargs, 1, "timestep")).flatten()[0])
        return Call(
            batch=latents.shape[0],
            timestep=scheduler_timestep(self.pipe, self._train_steps * (1 - given)),
            latent=(latents.shape[-2], latents.shape[-1]),
            conditional=not self._is_negative(argument(args, kwargs, 2, "encoder_hidden_states")),
        )

    def _with_text(self, given: dict[str, Any], states: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
        """Arguments of a denoiser call, by name: ``given``, with ``states`` as the text and one patch as the image.

        `elakit.attention.map_concepts` makes this second call after the run's own. In each layer of the second call, it
        replaces the patch's keys and values by those of the whole image, which it kept from the run's own call.
        ``states`` and ``positions`` are those of `TransformerAdapter.text_call`.
        """
        given = super()._with_text(given, states, positions)
        mask = given["encoder_attention_mask"]
        return given | {"encoder_attention_mask": mask.new_ones(len(mask), len(states))}

    @property
    def _train_steps(self) -> int:
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of Gemma tokens: the system message, then the prompt."""
        before = f"{self.pipe.system_prompt} <Prompt Start> "
        return (
            TextSequence(
                name="gemma", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length(), before=before
            ),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Text states with the mask of their padding."""
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            prompt.text, prompt.guided, negative_prompt=prompt.negative, device=self.pipe._execution_device
        )
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        return Conditioning(call, {"encoder_hidden_states": embeds, "encoder_attention_mask": mask})

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Time from 0 (noise) to 1 (image), which the model receives instead of a timestep."""
        return 1 - super()._given(timestep, latents) / self._train_steps

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1: the initial noise is not scaled."""
        # The pipeline takes the number of channels for that of patches.
        self._set_flow(steps, self._flow_shift(self._channels, 1.15))
        return 1.0
