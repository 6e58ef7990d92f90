"""PixArt-Alpha and PixArt-Sigma: a transformer with cross-attention to T5 tokens; padding is masked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch

from elakit.errors import PromptError
from elakit.models.adapter import AttentionLayer, Conditioning
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.pipeline import Pipeline, TransformerPipeline
from elakit.tokens import TextSequence


class PixArtPipeline(TransformerPipeline, Protocol):
    """Typing protocol of a PixArt pipeline.

    The protocol has all members of `TransformerPipeline`, and further members that the adapter `PixArt` uses.
    """

    def _text_preprocessing(self, *args: Any, **kwargs: Any) -> list[str]: ...


class PixArt(TransformerAdapter):
    """Adapter through which elakit reads and runs PixArt pipelines.

    T5 has no start-of-text token. Padding is masked, so the image does not attend to padding. The pipeline lowercases
    prompts.

    `elakit.generate` generates at exactly the given size, because it switches off the pipeline's resolution binning.
    Resolution binning would generate at the nearest size of a list, and then resize the image.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "PixArt-Alpha/Sigma"
    pipe: PixArtPipeline
    models: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel",)
    # The files of PixArt-Alpha name the class that its transformer had at first.
    index_models: ClassVar[tuple[str, ...]] = ("Transformer2DModel",)

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := super().refusal(pipe):
            return reason
        if getattr(pipe, "tokenizer", None) is None or not hasattr(pipe, "_text_preprocessing"):
            return "it has no T5 tokenizer"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return tuple(
            AttentionLayer(
                name=f"transformer_blocks.{i}.attn2",
                place="block",
                heads=block.attn2.heads,
                module=block.attn2,
                block=self.denoiser,
                factor=self._patch,
                grid=self._grid,
            )
            for i, block in enumerate(self.pipe.transformer.transformer_blocks)
        )

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the tokens of T5, without a start token."""
        return (
            TextSequence(
                name="t5", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length(), read=self._as_read
            ),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and their padding mask.

        If the model takes the size of the image as an input, the result also contains the size.
        """
        embeds, mask, negative_embeds, negative_mask = self.pipe.encode_prompt(
            prompt.text,
            prompt.guided,
            negative_prompt=prompt.negative or "",
            device=self.pipe._execution_device,
            clean_caption=_cleans(),
            max_sequence_length=self._t5_length(),
        )
        # The pipeline's default negative prompt is a text, which it does not accept together with text states.
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask, "negative_prompt": None}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        sizes: dict[str, torch.Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.pipe.transformer.use_additional_conditions:
            height, width = prompt.size
            sizes["resolution"] = embeds.new_tensor([[height, width]])
            sizes["aspect_ratio"] = embeds.new_tensor([[height / width]])
        inputs = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}
        return Conditioning(call | {"use_resolution_binning": False}, inputs)

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments that make the pipeline's call replace the latents by ``move(step, latents)`` after each step.

        ``step`` is the index of the latest denoiser call, counted from 0 along the scheduler's timesteps. With a Heun
        scheduler, a step consists of two denoiser calls, and ``move`` is called only after the second call. The latents
        are changed in place, because the pipeline's callback cannot return latents.
        """

        def callback(step: int, timestep: Any, latents: torch.Tensor) -> None:
            scheduler = self.pipe.scheduler
            call = min((step + 1) * scheduler.order, len(scheduler.timesteps)) - 1  # the callback counts whole steps
            moved = move(call, latents)
            if moved is not latents:
                latents.copy_(moved)

        return {"callback": callback, "callback_steps": 1}

    def _as_read(self, text: str) -> str:
        """Prompt in lowercase, as the pipeline tokenizes it.

        Raise a `PromptError` if the pipeline changes the prompt in any other way.
        """
        (read,) = self.pipe._text_preprocessing(text, clean_caption=_cleans())
        lowered = text.lower()
        if read != lowered.strip() or len(lowered) != len(text):
            raise PromptError(
                f"{type(self.pipe).__name__} reads {text!r} as {read!r}, so the prompt's tokens cannot be matched to "
                "its words: write the prompt as the pipeline reads it."
            )
        return lowered


def _cleans() -> bool:
    """True if the pipeline cleans prompts, which requires the packages bs4 and ftfy."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    return bool(is_bs4_available() and is_ftfy_available())
