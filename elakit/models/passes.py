"""Base classes for properties of a pipeline's passes that several families share."""

from __future__ import annotations

from typing import Any

import torch

from elakit.models.adapter import Conditioning, running
from elakit.models.transformer import TransformerAdapter


class SeparateNegative(TransformerAdapter):
    """Base of the families whose pipeline runs the negative prompt in a pass of its own, which is not recorded."""

    def conditional_rows(self, batch: int) -> slice:
        """All rows; the negative prompt has a call of its own."""
        return slice(0, batch)

    def _is_negative(self, text: Any) -> bool:
        """True if text states belong to the negative prompt."""
        negative = running(self.pipe).get("negative_prompt_embeds")
        return negative is not None and text is negative


class Float32Latents(TransformerAdapter):
    """Base of the families whose pipeline keeps float32 latents whatever the model's precision."""

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of one conditional pass in the model's precision; see `TransformerAdapter.denoise`."""
        return super().denoise(latents.to(self.denoiser.dtype), timestep, conditioning)  # type: ignore[arg-type]

    @property
    def _noise_dtype(self) -> torch.dtype:
        return torch.float32
