"""Wan: a video transformer with cross-attention to the text states of a multilingual T5."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from elakit.errors import PromptError
from elakit.models.adapter import AttentionLayer, Call, Layout, argument
from elakit.models.passes import SeparateNegative
from elakit.models.video import VideoAdapter
from elakit.pipeline import Pipeline
from elakit.tokens import TextSequence

_TWO = (
    "its steps are divided between two transformers (Wan 2.2 A14B), of which a recording would contain the first only; "
    "Wan 2.1, or Wan 2.2 TI2V-5B, has one"
)


class Wan(SeparateNegative, VideoAdapter):
    """Adapter through which elakit reads Wan text-to-video pipelines.

    Pipelines with one transformer are supported (Wan 2.1, Wan 2.2 TI2V-5B). With classifier-free guidance, the pipeline
    makes a second denoiser call for the negative prompt. That call is not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Wan"
    models: ClassVar[tuple[str, ...]] = ("WanTransformer3DModel",)
    pipelines: ClassVar[tuple[str, ...]] = ("WanPipeline",)

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        two = getattr(pipe, "transformer_2", None) is not None
        return super().refusal(pipe) or (_TWO if two else None)

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """Reason why this family does not support a model; None if the model is supported.

        ``index`` is the content of the model's ``model_index.json``. Weights are not needed for this decision.
        """
        two = (index.get("transformer_2") or [None, None])[1] is not None
        return super().refusal_of_index(index) or (_TWO if two else None)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("blocks", "attn2", "block")

    @property
    def _patch(self) -> int:
        return int(self.pipe.transformer.config.patch_size[-1])

    def _latent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, rows, columns = argument(args, kwargs, 0, "hidden_states").shape[-3:]
        return frames // self.pipe.transformer.config.patch_size[0], rows, columns

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 2, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), 0, (0, text), self._latent(args, kwargs)[0])

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep, latent size and number of frames of a denoiser call.

        They are found from ``args`` and ``kwargs``, the arguments of the call. The result also states whether the call
        sees the prompt or the negative prompt.
        """
        negative = self._is_negative(argument(args, kwargs, 2, "encoder_hidden_states"))
        return replace(super().read_call(args, kwargs), conditional=not negative)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the tokens of T5, then padding, whose text states are zeros."""
        tokenizer, length = self.pipe.tokenizer, self._t5_length()
        return (TextSequence(name="umt5", tokenizer=tokenizer, offset=0, length=length, read=self._as_read),)

    def _as_read(self, text: str) -> str:
        cleaned = re.sub(r"\s+", " ", html.unescape(html.unescape(text))).strip()
        if text != cleaned:
            raise PromptError(
                f"{type(self.pipe).__name__} reads {text!r} as {cleaned!r}, so the prompt's tokens cannot be matched "
                "to its words: write the prompt as the pipeline reads it."
            )
        return text
