"""LTX-Video: a video transformer with cross-attention to the text states of T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

from elakit.models.adapter import AttentionLayer, Layout, argument
from elakit.models.video import VideoAdapter, VideoPipeline
from elakit.tokens import TextSequence


class LTXVideoPipeline(VideoPipeline, Protocol):
    """Typing protocol of an LTX-Video pipeline.

    The protocol has all members of `VideoPipeline`, and further members that the adapter `LTXVideo` uses.
    """

    vae_spatial_compression_ratio: int


class LTXVideo(VideoAdapter):
    """Adapter through which elakit reads LTX-Video text-to-video pipelines.

    The latents of these pipelines are sequences of patches.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "LTX-Video"
    pipe: LTXVideoPipeline
    models: ClassVar[tuple[str, ...]] = ("LTXVideoTransformer3DModel",)
    pipelines: ClassVar[tuple[str, ...]] = ("LTXPipeline",)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn2", "block")

    def _latent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
        frames = kwargs["num_frames"] // self.pipe.transformer.config.patch_size_t
        return frames, kwargs["height"], kwargs["width"]

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), 0, (0, text), self._latent(args, kwargs)[0])

    @property
    def _side_factor(self) -> int:
        return int(self.pipe.vae_spatial_compression_ratio)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the tokens of T5."""
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length()),)
