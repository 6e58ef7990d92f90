"""Stable Diffusion 1.x and 2.x: a UNet and one CLIP text encoder."""

from __future__ import annotations

from typing import ClassVar

import torch

from elakit.models.adapter import Conditioning
from elakit.models.unet import UNetAdapter


class StableDiffusion(UNetAdapter):
    """Adapter of pipelines with one ``UNet2DConditionModel`` and one CLIP text encoder.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        ``StableDiffusionPipeline`` or a pipeline with the same UNet (img2img, inpainting, ControlNet...).

    Raises
    ------
    ModelError
        When the pipeline is of another family; the message says how it differs.
    """

    family: ClassVar[str] = "Stable Diffusion 1.x/2.x"
    two_encoders: ClassVar[bool] = False

    @torch.no_grad()
    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Text states, as the pipeline itself computes them.

        Parameters
        ----------
        text, negative : str
        guided : bool
            Whether classifier-free guidance is used; without it there are no negative states.
        size : tuple of int, optional
            Not used by this family.
        guidance_scale : float, optional
            Used by guidance-distilled UNets only; by default the pipeline's.
        """
        embeds, negative_embeds = self.pipe.encode_prompt(
            text, self.pipe._execution_device, 1, guided, negative_prompt=negative if guided else None
        )
        call = {"prompt_embeds": embeds} | ({"negative_prompt_embeds": negative_embeds} if guided else {})
        return Conditioning(call, {"encoder_hidden_states": embeds, **self._distilled(guidance_scale)})
