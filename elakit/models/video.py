"""Base of the families that generate videos, whose layers have a map for each frame.

Runs of these families can be recorded and edited. `elakit.generate` and guidance methods do not support them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from elakit.errors import ModelError
from elakit.models.adapter import WITHOUT_SELF, AttentionLayer, Call, argument, call_default
from elakit.models.transformer import TransformerAdapter
from elakit.models.unet import check_sides
from elakit.pipeline import TransformerPipeline


class VideoPipeline(TransformerPipeline, Protocol):
    """Typing protocol of a video pipeline.

    It adds to `TransformerPipeline` the other members that all adapters of videos use.
    """

    vae_scale_factor_spatial: int


class VideoAdapter(TransformerAdapter):
    """Base of the families that generate videos.

    A family describes its layers, its text, and where the denoiser's arguments state the number of frames (`_latent`).
    """

    pipe: VideoPipeline
    pipelines: ClassVar[tuple[str, ...]]  # class names of the text-to-video pipelines

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if pipeline not in cls.pipelines:
            return (
                f"it takes more than a text prompt, and {cls.family} is supported with "
                f"{' and '.join(cls.pipelines)} only"
            )
        return None

    def _latent(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int, int]:
        """Number of frames, and rows and columns of the latent, in a call of the denoiser.

        The frames are those for which a layer has maps: if patches extend over several frames of the latent, these
        count as one. Rows and columns are those before the latent is divided into patches.
        """
        raise NotImplementedError

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Rows and columns of patches of a frame in a call of the denoiser."""
        _, rows, columns = self._latent(args, kwargs)
        return rows // self._patch, columns // self._patch

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep, latent size and frames of a call of the transformer."""
        frames, rows, columns = self._latent(args, kwargs)
        batch = argument(args, kwargs, 0, "hidden_states").shape[0]
        timestep = float(torch.as_tensor(kwargs["timestep"]).flatten()[0])
        return Call(batch, timestep, (rows, columns), frames=frames)

    @property
    def _side_factor(self) -> int:
        """Side of a frame in pixels divided by that of the latent."""
        return int(self.pipe.vae_scale_factor_spatial)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent of frames of ``height`` x ``width`` pixels, before division into patches.

        Raises
        ------
        SettingError
            Raised when a side is not a positive multiple of the product of the autoencoder's spatial factor and the
            patch size.
        """
        check_sides(height, width, self._side_factor * self._patch)
        return height // self._side_factor, width // self._side_factor

    def default_size(self) -> tuple[int, int]:
        """Default height and width of a frame, in pixels."""
        return call_default(self.pipe, "height"), call_default(self.pipe, "width")

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Raise a `ModelError`, because the self-attention of a video is among the locations of all frames."""
        raise ModelError(
            f"The self-attention of {self.family} is among the locations of all frames, which is not supported. "
            f"{WITHOUT_SELF}"
        )
