"""Kolors: the U-Net of SDXL with cross-attention to the text states of a language model."""

from __future__ import annotations

from typing import Any, ClassVar

from elakit.models.adapter import call_default
from elakit.models.sdxl import StableDiffusionXL
from elakit.models.unet import UNetAdapter
from elakit.pipeline import Pipeline
from elakit.tokens import TextSequence


class Kolors(StableDiffusionXL):
    """Adapter through which elakit reads and runs Kolors pipelines.

    The text encoder is the language model ChatGLM. Its tokenizer pads the prompt on the left. The U-Net projects the
    text states to the number of channels that cross-attention takes. The text state of the last position serves as the
    pooled text state.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Kolors"
    two_encoders: ClassVar[bool] = False
    encoders: ClassVar[tuple[str, ...]] = ("ChatGLMModel",)

    @staticmethod
    def _tokenizer(pipe: Pipeline) -> Any:
        return UNetAdapter._tokenizer(pipe)

    def text_length(self) -> int:
        """Number of text positions, including padding."""
        return int(call_default(self.pipe, "max_sequence_length"))

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: padding, then the tokens of ChatGLM."""
        return (
            TextSequence(
                name="chatglm", tokenizer=self.pipe.tokenizer, offset=0, length=self.text_length(), padding="left"
            ),
        )
