"""Stable Diffusion 3 and 3.5: an MM-DiT in which image and text (CLIP and T5) attend to each other in one softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol

from elakit.models.adapter import AttentionLayer, Call, Conditioning
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.pipeline import Pipeline, TransformerPipeline
from elakit.tokens import TextSequence


class StableDiffusion3Pipeline(TransformerPipeline, Protocol):
    """Typing protocol of a Stable Diffusion 3 pipeline.

    The protocol has all members of `TransformerPipeline`, and further members that the adapter `StableDiffusion3` uses.
    """

    tokenizer_max_length: int
    tokenizer_3: Any
    text_encoder_3: Any


class StableDiffusion3(TransformerAdapter):
    """Adapter through which elakit reads and runs Stable Diffusion 3 pipelines.

    The text consists of two token sequences. The first sequence is read by both CLIP encoders, whose states are
    concatenated along the channels. The second sequence is read by T5. If the pipeline was loaded without T5
    (``text_encoder_3=None``), the positions of T5 hold zeros and count as padding.

    Image locations attend to image and text in one softmax. Their attention to the text therefore sums to less than 1.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Stable Diffusion 3/3.5"
    models: ClassVar[tuple[str, ...]] = ("SD3Transformer2DModel",)
    pipe: StableDiffusion3Pipeline

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := super().refusal(pipe):
            return reason
        return "it has no CLIP tokenizer" if getattr(pipe, "tokenizer", None) is None else None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return tuple(
            AttentionLayer(
                name=f"transformer_blocks.{i}.attn",
                place="double",
                heads=block.attn.heads,
                module=block.attn,
                block=self.denoiser,
                factor=self._patch,
                kind="joint",
                takes_mask=False,
                grid=self._grid,
            )
            for i, block in enumerate(self.pipe.transformer.transformer_blocks)
        )

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call.

        The result also states whether the call is recorded. A pass of skip-layer guidance is not recorded.
        """
        return replace(super().read_call(args, kwargs), conditional=kwargs.get("skip_layers") is None)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequences that the denoiser sees: the tokens of CLIP, then the tokens of T5 if T5 is loaded.

        Both CLIP encoders read the same tokens.
        """
        clip = TextSequence(
            name="clip", tokenizer=self.pipe.tokenizer, offset=0, length=int(self.pipe.tokenizer_max_length)
        )
        if self.pipe.text_encoder_3 is None or self.pipe.tokenizer_3 is None:
            return (clip,)
        return clip, TextSequence(
            name="t5", tokenizer=self.pipe.tokenizer_3, offset=clip.length, length=self._t5_length()
        )

    def text_length(self) -> int:
        """Number of text positions, including the positions of T5, even if T5 is not loaded."""
        return int(self.pipe.tokenizer_max_length) + self._t5_length()

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states of all encoders.

        The result also contains the pooled states of both CLIP encoders.
        """
        embeds, negative_embeds, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt.text,
            None,
            None,
            device=self.pipe._execution_device,
            do_classifier_free_guidance=prompt.guided,
            negative_prompt=prompt.negative if prompt.guided else None,
            max_sequence_length=self._t5_length(),
        )
        call = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
        return Conditioning(call, {"encoder_hidden_states": embeds, "pooled_projections": pooled})

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise."""
        scheduler = self.pipe.scheduler
        shift = {"mu": self._shift(height, width, 1.16)} if scheduler.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, device=self.pipe._execution_device, **shift)
        return 1.0
