"""Stable Diffusion XL: one UNet, two CLIP text encoders that read the same tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from elakit.models.adapter import OnlyRecorded
from elakit.models.unet import UNetAdapter


class StableDiffusionXL(OnlyRecorded, UNetAdapter):
    """Adapter of SDXL pipelines (text-to-image, img2img, inpainting, ControlNet).

    Both encoders cut the text into the same tokens and their states are laid side by side, so a position stands for
    one token of both; only what they pad with differs. The outermost blocks of the UNet do not attend to text: a
    picture of 1024 pixels has maps of 64 and 32 rows, none of 128.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Stable Diffusion XL"
    two_encoders: ClassVar[bool] = True

    @staticmethod
    def _tokenizer(pipe: Any) -> Any:
        # The refiner has the second encoder only.
        first = getattr(pipe, "tokenizer", None)
        return first if first is not None else getattr(pipe, "tokenizer_2", None)
