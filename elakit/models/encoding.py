"""Encoding of prompts. All families share `PromptEncoder.encode`, which calls the ``_encode`` of the family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from elakit.errors import ModelError
from elakit.models.adapter import Conditioning, call_default
from elakit.pipeline import Pipeline


@dataclass(frozen=True)
class PromptInput:
    """Arguments of `PromptEncoder.encode`, as a family's ``_encode`` receives them.

    Attributes
    ----------
    text : str
        Prompt.
    negative : str or None
        Negative prompt; None if there is none.
    guided : bool
        True if classifier-free guidance is used.
    size : tuple of int
        (height, width) of the image in pixels.
    guidance_scale : float or None
        Guidance scale; None stands for the default of the pipeline.
    """

    text: str
    negative: str | None
    guided: bool
    size: tuple[int, int]
    guidance_scale: float | None


class PromptEncoder:
    """Base of the adapters that encode prompts; a family implements ``_encode``."""

    family: ClassVar[str]
    pipe: Pipeline

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        raise NotImplementedError

    @property
    def encodes(self) -> bool:
        """True if the adapter can encode prompts.

        If False, a call of the pipeline can still be recorded (`elakit.record`) and edited (`elakit.attention.edit`).
        Everything that needs `encode` is then refused: `elakit.generate`, guidance, `elakit.attention.record_image`
        and `elakit.attention.map_concepts`.
        """
        return type(self)._encode is not PromptEncoder._encode

    @torch.no_grad()
    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Encode a prompt as the pipeline does.

        Parameters
        ----------
        text : str
            Prompt.
        negative : str, optional
            Negative prompt, for classifier-free guidance.
        guided : bool
            True if classifier-free guidance is used. If False, the result has no states of a negative prompt. Some
            families ignore ``guided``: with FLUX.1 and distilled FLUX.2 models, the result never has these states; with
            Z-Image, it has them at every guidance scale above 0.
        size : tuple of int, optional
            (height, width) of the image in pixels. Default: the result of `default_size`. Only some denoisers, such as
            that of SDXL, receive the size.
        guidance_scale : float, optional
            Guidance scale. Default: the default of the pipeline's call. Only Z-Image and models that receive the scale
            as an input (guidance-distilled models) use this argument.

        Returns
        -------
        Conditioning

        Raises
        ------
        SettingError
            Raised when ``negative`` is given with FLUX.1 or FLUX.2, for which elakit encodes no negative prompt.
        ModelError
            Raised when the family does not support encoding; see `encodes`.
        """
        return self._encode(
            PromptInput(
                text=text,
                negative=negative,
                guided=guided,
                size=size or self.default_size(),
                guidance_scale=guidance_scale,
            )
        )

    def _scale(self, given: float | None) -> float:
        """Guidance scale: ``given``, or the default of the pipeline's call if ``given`` is None."""
        return float(call_default(self.pipe, "guidance_scale") if given is None else given)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; `elakit.generate` and guidance support the families that implement this method."""
        raise ModelError(
            f"{self.family} can be recorded, but `elakit.generate` and guidance do not support it yet. Call the "
            "pipeline yourself inside `with elakit.record(pipe, prompt) as recording:`."
        )
