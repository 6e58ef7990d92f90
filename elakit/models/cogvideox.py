"""CogVideoX: video transformer with joint attention over one sequence of T5 states and patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from elakit.models.adapter import AttentionLayer, Layout, argument
from elakit.models.video import VideoAdapter
from elakit.tokens import TextSequence


class CogVideoX(VideoAdapter):
    """Adapter of CogVideoX text-to-video pipelines.

    Text and video form one sequence, in which the text comes first.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "CogVideoX"
    models: ClassVar[tuple[str, ...]] = ("CogVideoXTransformer3DModel",)
    pipelines: ClassVar[tuple[str, ...]] = ("CogVideoXPipeline",)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn1", "single", "single", text_first=True)

    def _latent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, _, rows, columns = argument(args, kwargs, 0, "hidden_states").shape[-4:]
        together = self.pipe.transformer.config.patch_size_t or 1  # frames of the latent in a patch (CogVideoX 1.5)
        return -(-frames // together), rows, columns

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text), self._latent(args, kwargs)[0])

    def default_size(self) -> tuple[int, int]:
        """Default height and width of a frame, in pixels."""
        config = self.pipe.transformer.config
        return config.sample_height * self._side_factor, config.sample_width * self._side_factor

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens."""
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length()),)
