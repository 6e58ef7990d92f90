"""Stable Diffusion XL: a U-Net and two CLIP text encoders that read the same tokens."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch

from elakit.models.adapter import Conditioning
from elakit.models.encoding import PromptInput
from elakit.models.unet import UNetAdapter
from elakit.pipeline import Pipeline, UNetPipeline


class XLPipeline(UNetPipeline, Protocol):
    """Typing protocol of an SDXL pipeline.

    The protocol has all members of `UNetPipeline`, and further members that the adapter `StableDiffusionXL` uses.
    """

    def _get_add_time_ids(self, *args: Any, **kwargs: Any) -> torch.Tensor: ...


class StableDiffusionXL(UNetAdapter):
    """Adapter through which elakit reads and runs SDXL pipelines (text-to-image, img2img, inpainting, ControlNet).

    Both text encoders split the prompt into the same tokens. The states of both encoders are concatenated along the
    channels. A position therefore stands for the same token in both encoders. Only the padding tokens differ.

    The outermost blocks of the U-Net do not attend to text. For an image of 1024 x 1024 pixels, there are maps with 64
    rows and with 32 rows, but none with 128 rows.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Stable Diffusion XL"
    two_encoders: ClassVar[bool] = True
    pipe: XLPipeline

    @staticmethod
    def _tokenizer(pipe: Pipeline) -> Any:
        # The refiner has the second encoder only.
        first = getattr(pipe, "tokenizer", None)
        return first if first is not None else getattr(pipe, "tokenizer_2", None)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states of both encoders.

        The result also contains the pooled state of the second encoder and the size of the image. For a
        guidance-distilled U-Net, the result contains the guidance scale, too.
        """
        device = self.pipe._execution_device
        embeds, negative_embeds, pooled, negative_pooled = self.pipe.encode_prompt(
            prompt.text,
            device=device,
            do_classifier_free_guidance=prompt.guided,
            negative_prompt=prompt.negative if prompt.guided else None,
        )
        call = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_pooled_prompt_embeds": negative_pooled}
        second = getattr(self.pipe, "text_encoder_2", None)
        inputs = {
            "encoder_hidden_states": embeds,
            "added_cond_kwargs": self._added(embeds, pooled, prompt.size, None if second is None else second.config),
            **self._distilled(prompt.guidance_scale),
        }
        return Conditioning(call, inputs)

    def _added(
        self, embeds: torch.Tensor, pooled: torch.Tensor, size: tuple[int, int] | None, config: Any
    ) -> dict[str, torch.Tensor]:
        """Value of the U-Net's argument ``added_cond_kwargs``: pooled text state, and size and crop of the image.

        ``embeds`` are text states that determine the precision of the result. ``pooled`` is the pooled text state.
        ``size`` is the (height, width) of the image in pixels; None stands for the model's default size. ``config`` is
        the configuration of the second text encoder, or None if the pipeline has no second text encoder.
        """
        size = size or self.default_size()
        time_ids = self.pipe._get_add_time_ids(
            size,
            (0, 0),
            size,
            dtype=embeds.dtype,
            text_encoder_projection_dim=pooled.shape[-1] if config is None else config.projection_dim,
        )
        return {"text_embeds": pooled, "time_ids": time_ids.to(self.pipe._execution_device)}
