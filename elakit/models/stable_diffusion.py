"""Stable Diffusion 1.x and 2.x: a U-Net and one CLIP text encoder."""

from __future__ import annotations

from typing import ClassVar

from elakit.models.adapter import Conditioning
from elakit.models.encoding import PromptInput
from elakit.models.unet import UNetAdapter


class StableDiffusion(UNetAdapter):
    """Adapter through which elakit reads and runs pipelines with a U-Net and one CLIP text encoder.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        ``StableDiffusionPipeline`` or a pipeline with the same U-Net (img2img, inpainting, ControlNet...).

    Raises
    ------
    ModelError
        Raised when the pipeline is of another family; the message states the difference.
    """

    family: ClassVar[str] = "Stable Diffusion 1.x/2.x"
    two_encoders: ClassVar[bool] = False

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states from the pipeline's ``encode_prompt``.

        For a guidance-distilled U-Net, the result also contains the guidance scale.
        """
        negative = prompt.negative if prompt.guided else None
        embeds, negative_embeds = self.pipe.encode_prompt(
            prompt.text, self.pipe._execution_device, 1, prompt.guided, negative_prompt=negative
        )
        call = {"prompt_embeds": embeds} | ({"negative_prompt_embeds": negative_embeds} if prompt.guided else {})
        return Conditioning(call, {"encoder_hidden_states": embeds, **self._distilled(prompt.guidance_scale)})
