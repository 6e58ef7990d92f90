"""FLUX.1: an MM-DiT of double and single stream blocks over T5 tokens and a latent packed 2x2; rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from elakit.errors import ModelError
from elakit.models.adapter import AttentionLayer, Call, OtherKind, argument, running, scheduler_timestep
from elakit.models.transformer import TransformerAdapter
from elakit.words import TextSequence


class Flux(TransformerAdapter):
    """Adapter of FLUX.1 pipelines (text-to-image, img2img, inpainting, fill, ControlNet).

    The denoiser sees T5 tokens only (CLIP gives it one pooled vector); they have no start-of-text. Double stream blocks
    project picture and text each by themselves, single stream blocks both in one sequence; in both kinds they attend to
    each other in one softmax, so over the text rows do not sum to 1.

    Guidance is distilled into the model: every row of a batch sees the prompt. With a negative prompt the pipeline
    makes a second call, which is not kept.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "FLUX.1"
    model: ClassVar[type[nn.Module]] = FluxTransformer2DModel
    model_names: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._seen: tuple[torch.Tensor, tuple[int, int]] | None = None

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this adapter cannot serve a pipeline; None when it can."""
        if reason := super().refusal(pipe):
            return reason
        if "Kontext" in type(pipe).__name__:
            return "its pictures attend to those of another picture, too (Kontext)"
        return "it has no T5 tokenizer" if getattr(pipe, "tokenizer_2", None) is None else None

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """As `refusal`, from a ``model_index.json``."""
        if "Kontext" in str(index.get("_class_name")):
            return OtherKind("it is a Kontext pipeline")
        return super().refusal_of_index(index)

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        transformer = self.pipe.transformer
        double = [
            AttentionLayer(
                f"transformer_blocks.{i}.attn",
                "double",
                block.attn.heads,
                block.attn,
                self.denoiser,
                self._patch,
                kind="joint",
                text_first=True,
                grid=self._grid,
            )
            for i, block in enumerate(transformer.transformer_blocks)
        ]
        single = [
            AttentionLayer(
                f"single_transformer_blocks.{i}.attn",
                "single",
                block.attn.heads,
                block.attn,
                self.denoiser,
                self._patch,
                kind="single",
                text_first=True,
                grid=self._grid,
            )
            for i, block in enumerate(transformer.single_transformer_blocks)
        ]
        return (*double, *single)

    @property
    def _patch(self) -> int:
        return 2  # the pipeline's packing, not the model's patch size, which is 1

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        ids = argument(args, kwargs, 4, "img_ids")
        if self._seen is None or self._seen[0] is not ids:  # once a run: it waits for the device
            rows, columns = (ids.reshape(-1, 3)[:, 1:].amax(0) + 1).int().tolist()
            cells = argument(args, kwargs, 0, "hidden_states").shape[1]
            if rows * columns != cells:
                raise ModelError(
                    f"The transformer was called with {cells} picture positions that do not form one picture of "
                    f"{rows} x {columns}; only runs of one picture can be recorded."
                )
            self._seen = ids, (rows, columns)
        return self._seen[1]

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a call of the transformer is, its latent as it was before packing."""
        rows, columns = self._grid(args, kwargs)
        negative = running(self.pipe).get("negative_prompt_embeds")
        text = argument(args, kwargs, 1, "encoder_hidden_states")
        batch = argument(args, kwargs, 0, "hidden_states").shape[0]
        return Call(
            batch,
            self._timestep(torch.as_tensor(argument(args, kwargs, 3, "timestep")).flatten()[0]),
            (rows * self._patch, columns * self._patch),
            conditional=negative is None or text is not negative,
        )

    def _timestep(self, given: torch.Tensor) -> float:
        """The scheduler's own number: the model is given a thousandth of it, rounded to the model's precision."""
        if (current := getattr(self.pipe, "_current_timestep", None)) is not None:
            return float(current)
        return scheduler_timestep(self.pipe, float(given) * 1000)

    def conditional_rows(self, batch: int) -> slice:
        """All rows: a negative prompt has a call of its own."""
        return slice(0, batch)

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the picture drawn when nothing else is asked."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, without a start token."""
        return (TextSequence("t5", self.pipe.tokenizer_2, 0, self._t5_length()),)
