"""FLUX.1: an MM-DiT of double and single stream blocks over T5 tokens and a latent packed 2x2; rotary positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import nn

from elakit.errors import ModelError, SettingError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    OtherKind,
    argument,
    call_default,
    running,
    scheduler_timestep,
)
from elakit.models.transformer import TransformerAdapter
from elakit.tokens import TextSequence


class Flux(TransformerAdapter):
    """Adapter of FLUX.1 pipelines (text-to-image, img2img, inpainting, fill, ControlNet).

    The denoiser sees T5 tokens only (CLIP gives it one pooled vector); they have no start-of-text. Double stream blocks
    project image and text each by themselves, single stream blocks both in one sequence; in both kinds they attend to
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
    # The image attends to the text that T5 reads: prompt_2, or prompt if there is none.
    text_arguments: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt_2", "prompt"),)

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._seen: tuple[torch.Tensor, tuple[int, int]] | None = None

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this adapter cannot serve a pipeline; None when it can."""
        if reason := super().refusal(pipe):
            return reason
        if "Kontext" in type(pipe).__name__:
            return "its images attend to those of another image, too (Kontext)"
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
                    f"The transformer was called with {cells} image positions that do not form one image of "
                    f"{rows} x {columns}; only runs of one image can be recorded."
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

    @property
    def text_limit(self) -> int:
        """Largest number of text positions; what follows them are image tokens (Redux)."""
        return self._t5_length()

    def _timestep(self, given: torch.Tensor) -> float:
        """The scheduler's own number: the model is given a thousandth of it, rounded to the model's precision."""
        if (current := getattr(self.pipe, "_current_timestep", None)) is not None:
            return float(current)
        return scheduler_timestep(self.pipe, float(given) * 1000)

    def conditional_rows(self, batch: int) -> slice:
        """All rows: a negative prompt has a call of its own."""
        return slice(0, batch)

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image drawn when nothing else is asked."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, without a start token."""
        return (TextSequence("t5", self.pipe.tokenizer_2, 0, self._t5_length()),)

    @torch.no_grad()
    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Text states of T5, the pooled state of CLIP, positions of text and image, and the scale of guidance.

        Parameters
        ----------
        text : str
        negative : str, optional
            There is no place for one.
        guided : bool
            Not needed by this family: no call has a negative part.
        size : tuple of int, optional
            (height, width) of the image; by default the model's.
        guidance_scale : float, optional
            By default the pipeline's. Not used by a model without an input for it (FLUX.1 schnell).

        Raises
        ------
        SettingError
            A negative prompt is given.
        """
        if negative:
            raise SettingError(
                f"negative_prompt={negative!r}: {self.family} has its guidance distilled into the model and makes no "
                "pass for a negative prompt. Leave it out, or call the pipeline yourself with `true_cfg_scale`, inside "
                "`with elakit.record(pipe, prompt) as recording:`."
            )
        device = self.pipe._execution_device
        embeds, pooled, text_ids = self.pipe.encode_prompt(text, device=device, max_sequence_length=self._t5_length())
        rows, columns = self.latent_size(*(size or self.default_size()))
        image_ids = self.pipe._prepare_latent_image_ids(
            1, rows // self._patch, columns // self._patch, device, embeds.dtype
        )
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            scale = call_default(self.pipe, "guidance_scale") if guidance_scale is None else guidance_scale
            guidance = torch.tensor([float(scale)], device=device)
        return Conditioning(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            {"encoder_hidden_states": embeds, "pooled_projections": pooled, "guidance": guidance},
            {"txt_ids": text_ids, "img_ids": image_ids},
        )

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """A thousandth of the scheduler's number, in the model's precision."""
        return super()._given(timestep, latents).to(latents.dtype) / 1000

    @property
    def _channels(self) -> int:
        """Of the latent before it is packed, four cells into one."""
        return super()._channels // self._patch**2

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Noise of unit variance that an image starts from, packed: (1, cells, 4c)."""
        noise = super().noise(generator, height, width)
        packed: torch.Tensor = self.pipe._pack_latents(noise, *noise.shape)
        return packed

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler as the pipeline's call will; its first latents are the noise itself."""
        from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps  # slow to import without a pipeline

        scheduler = self.pipe.scheduler
        own = getattr(scheduler.config, "use_flow_sigmas", False)  # then the scheduler itself knows the noise levels
        retrieve_timesteps(
            scheduler,
            steps,
            self.pipe._execution_device,
            sigmas=None if own else np.linspace(1.0, 1 / steps, steps),
            mu=self._shift(height, width, 1.15),
        )
        return 1.0

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of packed latents, (n, cells, 4c); of a run's middle too, where they are noisy."""
        return super().decode(
            self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor), height, width
        )
