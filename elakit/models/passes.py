"""Base classes of adapters, for pipelines with a separate pass for the negative prompt or with float32 latents."""

from __future__ import annotations

from typing import Any

import torch

from elakit.models.adapter import Conditioning, running
from elakit.models.transformer import TransformerAdapter


class SeparateNegative(TransformerAdapter):
    """Base of the adapters for pipelines that make a separate denoiser call for the negative prompt.

    That call is not recorded.
    """

    def conditional_rows(self, batch: int) -> slice:
        """Slice of the rows that see the prompt, in a denoiser call with ``batch`` rows: all rows.

        The rows of the negative prompt have a denoiser call of their own.
        """
        return slice(0, batch)

    def _is_negative(self, text: Any) -> bool:
        """True if ``text`` is the tensor with the text states of the negative prompt.

        The text states of the negative prompt are found in the local variables of the pipeline's running call.
        """
        negative = running(self.pipe).get("negative_prompt_embeds")
        return negative is not None and text is negative


class Float32Latents(TransformerAdapter):
    """Base of the adapters for pipelines that keep the latents in float32, even if the model has another precision."""

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser in one pass that sees the prompt.

        ``latents`` are converted to the model's precision first. ``timestep`` is the scheduler's timestep, and
        ``conditioning`` is the encoded prompt.
        """
        return super().denoise(latents.to(self.denoiser.dtype), timestep, conditioning)  # type: ignore[arg-type]

    @property
    def _noise_dtype(self) -> torch.dtype:
        return torch.float32
