"""HunyuanDiT: a transformer with cross-attention to the text states of BERT and T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from elakit.models.adapter import AttentionLayer, Call, Conditioning, Layout, argument, call_default
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.pipeline import TransformerPipeline
from elakit.tokens import TextSequence

# Lengths that the pipeline's call passes to its text encoders.
_BERT, _T5 = 77, 256


class HunyuanDiTPipeline(TransformerPipeline, Protocol):
    """Typing protocol of a HunyuanDiT pipeline.

    The protocol has all members of `TransformerPipeline`, and further members that the adapter `HunyuanDiT` uses.
    """

    tokenizer_2: Any


class HunyuanDiT(TransformerAdapter):
    """Adapter through which elakit reads and runs HunyuanDiT pipelines.

    The transformer replaces the text states of padding by learned states. In cross-attention, the rotary embedding of
    the patches is applied to the queries only.

    `elakit.generate` generates at exactly the given size, because it switches off the pipeline's resolution binning.
    Resolution binning would replace the size by the nearest size of a list.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "HunyuanDiT"
    pipe: HunyuanDiTPipeline
    models: ClassVar[tuple[str, ...]] = ("HunyuanDiT2DModel",)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("blocks", "attn2", "block")

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        return Layout(self._grid(args, kwargs), 0, (0, _BERT + _T5))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call."""
        return super().read_call(args, {**kwargs, "timestep": argument(args, kwargs, 1, "timestep")})

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequences that the denoiser sees: the tokens of BERT, then the tokens of T5."""
        return (
            TextSequence(name="bert", tokenizer=self.pipe.tokenizer, offset=0, length=_BERT),
            TextSequence(name="t5", tokenizer=self.pipe.tokenizer_2, offset=_BERT, length=_T5),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and padding masks of BERT and T5.

        The result also contains the size of the image, and the rotary embedding of the patches.
        """
        device = self.pipe._execution_device
        call: dict[str, Any] = {"use_resolution_binning": False}
        inputs: dict[str, Any] = {}
        for index, (length, ending, suffix) in enumerate(((_BERT, "", ""), (_T5, "_2", "_t5"))):
            embeds, negative_embeds, mask, negative_mask = self.pipe.encode_prompt(
                prompt.text,
                device=device,
                dtype=self.pipe.transformer.dtype,
                do_classifier_free_guidance=prompt.guided,
                negative_prompt=prompt.negative if prompt.guided else None,
                max_sequence_length=length,
                text_encoder_index=index,
            )
            call |= {f"prompt_embeds{ending}": embeds, f"prompt_attention_mask{ending}": mask}
            if prompt.guided:
                call |= {
                    f"negative_prompt_embeds{ending}": negative_embeds,
                    f"negative_prompt_attention_mask{ending}": negative_mask,
                }
            inputs |= {f"encoder_hidden_states{suffix}": embeds, f"text_embedding_mask{suffix}": mask}
        height, width = prompt.size
        meta = [*call_default(self.pipe, "original_size"), height, width, 0, 0]
        inputs |= {
            "image_meta_size": inputs["encoder_hidden_states"].new_tensor([meta]),
            "style": torch.zeros(1, dtype=torch.long, device=device),
        }
        return Conditioning(call, inputs, {"image_rotary_emb": self._positions(height, width)})

    def _positions(self, height: int, width: int) -> Any:
        """Rotary embedding of the patches of an image of ``height`` x ``width`` pixels.

        The pipeline's call computes the same embedding.
        """
        from diffusers.models.embeddings import get_2d_rotary_pos_embed
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        net = self.pipe.transformer
        grid = height // 8 // self._patch, width // 8 // self._patch
        crops = get_resize_crop_region_for_grid(grid, 512 // 8 // self._patch)
        device = self.pipe._execution_device
        return get_2d_rotary_pos_embed(net.inner_dim // net.num_heads, crops, grid, device=device, output_type="pt")

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Timestep in the form in which the model receives it: in the precision of ``latents``.

        The result has one value for each row of ``latents``.
        """
        return super()._given(timestep, latents).to(latents.dtype)
