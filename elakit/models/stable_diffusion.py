"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder; how one conditional pass runs."""

from __future__ import annotations

from typing import ClassVar

import torch

from elakit.models.unet import UNetAdapter


class StableDiffusion(UNetAdapter):
    """Adapter of pipelines that denoise with one ``UNet2DConditionModel`` and one CLIP text encoder.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        ``StableDiffusionPipeline`` or a pipeline with the same UNet (img2img, inpainting, ControlNet...).

    Raises
    ------
    ModelError
        When the pipeline is of another family; the message says in what it differs.
    """

    family: ClassVar[str] = "Stable Diffusion 1.x/2.x"
    two_encoders: ClassVar[bool] = False

    @torch.no_grad()
    def encode(
        self, text: str, negative: str | None = None, guided: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Text states, as the pipeline itself computes them.

        Returns
        -------
        prompt_embeds : torch.Tensor, (1, positions, channels)
        negative_embeds : torch.Tensor, (1, positions, channels), or None
            None when not ``guided``.
        """
        prompt_embeds, negative_embeds = self.pipe.encode_prompt(
            text, self.pipe._execution_device, 1, guided, negative_prompt=negative if guided else None
        )
        return prompt_embeds, negative_embeds if guided else None

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, embeds: torch.Tensor
    ) -> torch.Tensor:
        """One pass of the denoiser: prediction of the same shape as ``latents``; gradients flow when enabled.

        Parameters
        ----------
        latents : torch.Tensor, (B, C, h, w)
            Already scaled by the scheduler's ``scale_model_input``.
        timestep : torch.Tensor, float or int
        embeds : torch.Tensor, (B, positions, channels)
        """
        return self.denoiser(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
