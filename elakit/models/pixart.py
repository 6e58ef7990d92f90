"""PixArt-Alpha and PixArt-Sigma: a transformer with cross-attention to T5 tokens, padding masked."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers import PixArtTransformer2DModel
from diffusers.utils import is_bs4_available, is_ftfy_available
from torch import nn

from elakit.errors import PromptError
from elakit.models.adapter import AttentionLayer
from elakit.models.transformer import TransformerAdapter
from elakit.words import TextSequence


class PixArt(TransformerAdapter):
    """Adapter of PixArt pipelines.

    T5 tokens have no start-of-text; padding is masked, so its attention is 0. The pipeline reads prompts in lower case.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "PixArt-Alpha/Sigma"
    model: ClassVar[type[nn.Module]] = PixArtTransformer2DModel
    # PixArt-Alpha's files name the class that its transformer had at first.
    model_names: ClassVar[tuple[str, ...]] = ("PixArtTransformer2DModel", "Transformer2DModel")

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this adapter cannot serve a pipeline; None when it can."""
        if reason := super().refusal(pipe):
            return reason
        if getattr(pipe, "tokenizer", None) is None or not hasattr(pipe, "_text_preprocessing"):
            return "it has no T5 tokenizer"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return tuple(
            AttentionLayer(
                f"transformer_blocks.{i}.attn2",
                "block",
                block.attn2.heads,
                block.attn2,
                self.denoiser,
                self._patch,
                grid=self._grid,
            )
            for i, block in enumerate(self.pipe.transformer.transformer_blocks)
        )

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, without a start token."""
        return (TextSequence("t5", self.pipe.tokenizer, 0, self._t5_length(), self._as_read),)

    def _as_read(self, text: str) -> str:
        """The text as the pipeline gives it to the tokenizer, character for character; it lowers and cleans prompts."""
        clean = is_bs4_available() and is_ftfy_available()  # what the pipeline asks, too
        (read,) = self.pipe._text_preprocessing(text, clean_caption=clean)
        lowered = text.lower()
        if read != lowered.strip() or len(lowered) != len(text):
            raise PromptError(
                f"{type(self.pipe).__name__} reads {text!r} as {read!r}, so its tokens cannot be followed: give it as "
                "the pipeline reads it."
            )
        return lowered
