"""Chroma: the blocks of FLUX.1 over T5 tokens, with a mask of their padding, and with classifier-free guidance."""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

from elakit.models.adapter import Conditioning
from elakit.models.encoding import PromptInput
from elakit.models.flux import Flux
from elakit.pipeline import PackedPipeline, Pipeline
from elakit.tokens import TextSequence


class ChromaPipeline(PackedPipeline, Protocol):
    """Typing protocol of a Chroma pipeline.

    The protocol has all members of `PackedPipeline`, and further members that the adapter `Chroma` uses.
    """

    def _prepare_latent_image_ids(self, *args: Any) -> Any: ...

    def _prepare_attention_mask(self, *args: Any) -> Any: ...


class Chroma(Flux):
    """Adapter of Chroma pipelines.

    The attention mask is 0 at every padding token but the first, and 1 at all other positions of text and image. The
    model uses the mask in an unusual way. Each attention score is increased by the product of two mask values: that of
    the query and that of the key. Padding therefore receives less attention, but is not excluded. Layers are read at
    the attention call, which receives these products as its mask.

    With classifier-free guidance, the pipeline makes a second denoiser call for the negative prompt. That call is not
    recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Chroma"
    # It overrides every method that uses what only pipelines of FLUX.1 have.
    pipe: ChromaPipeline  # type: ignore[assignment]
    models: ClassVar[tuple[str, ...]] = ("ChromaTransformer2DModel",)
    text_arguments: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",),)
    positions: ClassVar[dict[str, int]] = {"timestep": 2, "img_ids": 3}

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := super(Flux, cls).refusal(pipe):
            return reason
        return "it has no T5 tokenizer" if getattr(pipe, "tokenizer", None) is None else None

    @property
    def _captured(self) -> bool:
        return True

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, without a start token."""
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length()),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states, their padding mask, and positions of text and image."""
        device = self.pipe._execution_device
        embeds, text_ids, mask, negative_embeds, _, negative_mask = self.pipe.encode_prompt(
            prompt.text,
            prompt.negative,
            device=device,
            do_classifier_free_guidance=prompt.guided,
            max_sequence_length=self._t5_length(),
        )
        call = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
        if prompt.guided:
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_attention_mask": negative_mask}
        rows, columns = (side // self._patch for side in self.latent_size(*prompt.size))
        whole_mask = self.pipe._prepare_attention_mask(1, rows * columns, embeds.dtype, mask)
        inputs: dict[str, Any] = {"encoder_hidden_states": embeds, "attention_mask": whole_mask}
        image_ids = self.pipe._prepare_latent_image_ids(1, rows, columns, device, embeds.dtype)
        return Conditioning(call, inputs, {"txt_ids": text_ids, "img_ids": image_ids})
