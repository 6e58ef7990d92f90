"""Base classes of families whose pipelines run the negative prompt separately, or keep float32 latents."""

from __future__ import annotations

from typing import Any

import torch

from elakit.models.adapter import Conditioning, running
from elakit.models.transformer import TransformerAdapter


class SeparateNegative(TransformerAdapter):
    """Base of the families whose pipeline makes a separate denoiser call for the negative prompt.

    That call is not recorded.
    """

    def conditional_rows(self, batch: int) -> slice:
        """All rows, because the negative prompt has a denoiser call of its own."""
        return slice(0, batch)

    def _is_negative(self, text: Any) -> bool:
        """True if ``text`` is the text states of the negative prompt in the pipeline's running call."""
        negative = running(self.pipe).get("negative_prompt_embeds")
        return negative is not None and text is negative


class Float32Latents(TransformerAdapter):
    """Base of the families whose pipeline keeps float32 latents whatever the model's precision."""

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of one conditional pass, for latents converted to the model's precision; see the base class."""
        return super().denoise(latents.to(self.denoiser.dtype), timestep, conditioning)  # type: ignore[arg-type]

    @property
    def _noise_dtype(self) -> torch.dtype:
        return torch.float32
