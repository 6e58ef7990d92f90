"""CogView3-Plus: joint attention over one sequence of T5 states and image patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from elakit.models.adapter import AttentionLayer, Conditioning, Layout, argument
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.tokens import TextSequence


class CogView3Plus(TransformerAdapter):
    """Adapter of CogView3-Plus pipelines.

    Text and image form one sequence, in which the text comes first. The image attends to the text and to the padding of
    the text. Without a negative prompt, the text states of the unconditional pass are zeros.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "CogView3-Plus"
    models: ClassVar[tuple[str, ...]] = ("CogView3PlusTransformer2DModel",)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn1", "single", "single", text_first=True)

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, followed by padding."""
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer, offset=0, length=self._t5_length()),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and the size of the image."""
        embeds, _ = self.pipe.encode_prompt(
            prompt.text, None, False, device=self.pipe._execution_device, max_sequence_length=self._t5_length()
        )
        call: dict[str, Any] = {"prompt_embeds": embeds}
        if prompt.guided and prompt.negative is not None:
            # As text: the pipeline replaces given negative states by zeros.
            call["negative_prompt"] = prompt.negative
        sides = embeds.new_tensor([prompt.size])
        sizes = {"original_size": sides, "target_size": sides, "crop_coords": torch.zeros_like(sides)}
        return Conditioning(call, {"encoder_hidden_states": embeds, **sizes})
