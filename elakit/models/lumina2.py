"""Lumina-Image 2.0: a transformer over one sequence, the text states of a language model and then the image patches."""

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

    The protocol has all members of `TransformerPipeline`, and further members that the adapter `Lumina2` uses.
    """

    system_prompt: str


class Lumina2(SeparateNegative):
    """Adapter through which elakit reads and runs Lumina 2 pipelines.

    Text and image form one sequence, in which the text comes first, without padding. Several query heads share one key
    head (grouped-query attention). The pipeline puts a system message before the prompt. With classifier-free guidance,
    the pipeline makes a second denoiser call for the negative prompt. That call is not recorded.

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
                    "The transformer was called with prompts of different lengths in one batch "
                    f"({', '.join(map(str, sorted(counts)))} tokens). Record one prompt at a time."
                )
            self._seen = mask, counts.pop()
        text = self._seen[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call.

        Instead of a timestep, the model receives a time from 0 (noise) to 1 (image). The returned timestep is the
        scheduler's timestep for this time.
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
        """Arguments, by name, of a denoiser call with another text and with only one patch of the image.

        ``given`` are the arguments of a denoiser call of the run. After that call, `elakit.attention.map_concepts`
        makes the new call with the returned arguments. In each layer, `map_concepts` replaces the keys and values of
        the patch by the keys and values that the whole image had in the run's call. ``states``, (tokens, channels), are
        the text states of the new call. ``positions`` is not used.
        """
        given = super()._with_text(given, states, positions)
        mask = given["encoder_attention_mask"]
        return given | {"encoder_attention_mask": mask.new_ones(len(mask), len(states))}

    @property
    def _train_steps(self) -> int:
        return int(self.pipe.scheduler.config.num_train_timesteps)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: Gemma tokens of the system message, then of the prompt."""
        before = f"{self.pipe.system_prompt} <Prompt Start> "
        return (
            TextSequence(
                name="gemma", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length(), before=before
            ),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and their padding mask."""
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            prompt.text, prompt.guided, negative_prompt=prompt.negative, device=self.pipe._execution_device
        )
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        return Conditioning(call, {"encoder_hidden_states": embeds, "encoder_attention_mask": mask})

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Number that the model receives as its timestep: the time from 0 (noise) to 1 (image).

        The result has one value for each row of ``latents``.
        """
        return 1 - super()._given(timestep, latents) / self._train_steps

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise."""
        # The pipeline takes the number of channels for that of patches.
        self._set_flow(steps, self._flow_shift(self._channels, 1.15))
        return 1.0
