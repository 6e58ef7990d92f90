"""Base of the adapters for video pipelines, in which each layer has one map per frame.

Runs of these pipelines can be recorded and edited. `elakit.generate` and guidance methods do not support them.
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

    The protocol has all members of `TransformerPipeline`, and further members that all video adapters use.
    """

    vae_scale_factor_spatial: int


class VideoAdapter(TransformerAdapter):
    """Base of the adapters for video pipelines.

    The adapter of a family is a subclass. It describes the layers and the text of the family. Its method ``_latent``
    finds the number of frames in the arguments of the denoiser.
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
        """Number of frames, rows of the latent, and columns of the latent, found from the arguments of a denoiser call.

        A layer has one map for each of these frames. If patches extend over several frames of the latent, the frames of
        one patch count as a single frame. Rows and columns are those of the latent before it is divided into patches.
        """
        raise NotImplementedError

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        """Number of rows and columns of patches in one frame, found from the arguments of a denoiser call."""
        _, rows, columns = self._latent(args, kwargs)
        return rows // self._patch, columns // self._patch

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep, latent size and number of frames of a denoiser call.

        They are found from ``args`` and ``kwargs``, the arguments of the call.
        """
        frames, rows, columns = self._latent(args, kwargs)
        batch = argument(args, kwargs, 0, "hidden_states").shape[0]
        timestep = float(torch.as_tensor(kwargs["timestep"]).flatten()[0])
        return Call(batch, timestep, (rows, columns), frames=frames)

    @property
    def _side_factor(self) -> int:
        """Height of a frame in pixels, divided by the number of rows of the frame's latent.

        The factor is the same for the width.
        """
        return int(self.pipe.vae_scale_factor_spatial)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent for a video with frames of ``height`` x ``width`` pixels.

        This is the size of the latent before it is divided into patches.

        Raises
        ------
        SettingError
            Raised when ``height`` or ``width`` is not a positive multiple of the autoencoder's spatial factor times the
            patch size.
        """
        check_sides(height, width, self._side_factor * self._patch)
        return height // self._side_factor, width // self._side_factor

    def default_size(self) -> tuple[int, int]:
        """Default height and width of a frame, in pixels."""
        return call_default(self.pipe, "height"), call_default(self.pipe, "width")

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Raise a `ModelError`, because the self-attention of video models is not supported.

        In a video model, each location attends to the locations of all frames.
        """
        raise ModelError(
            f"Self-attention of {self.family} is not supported, because each location attends to the locations of all "
            f"frames. {WITHOUT_SELF}"
        )
