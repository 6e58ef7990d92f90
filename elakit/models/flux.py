"""FLUX.1: an MM-DiT of double- and single-stream blocks over T5 tokens and a latent packed in patches of 2x2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image

from elakit.errors import ModelError, SettingError
from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    Kind,
    Layout,
    Place,
    argument,
    call_default,
    encoded,
    is_a,
    scheduler_timestep,
)
from elakit.models.encoding import PromptInput
from elakit.models.passes import SeparateNegative
from elakit.models.transformer import repeated_text
from elakit.pipeline import PackedPipeline, Pipeline
from elakit.tokens import TextSequence

_CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples")


class FluxPipeline(PackedPipeline, Protocol):
    """Typing protocol of a FLUX.1 pipeline.

    The protocol has all members of `PackedPipeline`, and further members that the adapter `Flux` uses.
    """

    tokenizer_2: Any

    def _prepare_latent_image_ids(self, *args: Any) -> torch.Tensor: ...


class Flux(SeparateNegative):
    """Adapter of FLUX.1 pipelines (text-to-image, img2img, inpainting, Fill, Kontext, ControlNet).

    The denoiser attends to T5 tokens only, without a start-of-text token; from CLIP it receives one pooled vector.
    Double-stream blocks project image and text separately. Single-stream blocks project image and text as one sequence.
    In both kinds of block, image and text attend to each other in one softmax. The attention of a location to the text
    therefore sums to less than 1.

    Classifier-free guidance is distilled into the model: every row of a batch sees the prompt. A call of the pipeline
    with a negative prompt and ``true_cfg_scale`` above 1 makes a second denoiser call for the negative prompt. That
    second call is not recorded. `encode` refuses negative prompts.

    Kontext pipelines append the patches of the input image to the sequence. These patches are keys like all others, but
    the maps cover only the generated image.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "FLUX.1"
    pipe: FluxPipeline
    models: ClassVar[tuple[str, ...]] = ("FluxTransformer2DModel",)
    # The image attends to the text that T5 reads: prompt_2, or prompt if there is none.
    text_arguments: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt_2", "prompt"),)
    positions: ClassVar[dict[str, int]] = {"timestep": 3, "img_ids": 4}  # among the arguments of the denoiser

    def __init__(self, pipe: Pipeline) -> None:
        super().__init__(pipe)
        self._seen: tuple[torch.Tensor, tuple[int, int]] | None = None

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := super().refusal(pipe):
            return reason
        return "it has no T5 tokenizer" if getattr(pipe, "tokenizer_2", None) is None else None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        net = self.pipe.transformer
        kinds: tuple[tuple[str, Place, Kind], ...] = (
            ("transformer_blocks", "double", "joint"),
            ("single_transformer_blocks", "single", "single"),
        )
        captured = self._captured
        return tuple(
            AttentionLayer(
                name=f"{stack}.{i}.attn",
                place=place,
                heads=block.attn.heads,
                module=block.attn,
                block=self.denoiser,
                factor=self._patch,
                kind=kind,
                text_first=True,
                takes_mask=not captured,
                grid=self._grid,
                layout=self._layout if captured else None,
            )
            for stack, place, kind in kinds
            for i, block in enumerate(getattr(net, stack))
        )

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""
        return is_a(self.pipe, "FluxKontextPipeline")

    @property
    def _captured(self) -> bool:
        """True for Kontext, whose layers are read at the attention call.

        The sequence of Kontext has the patches of the input image after those of the generated image.
        """
        return "Kontext" in type(self.pipe).__name__

    @property
    def _patch(self) -> int:
        return 2  # the pipeline's packing, not the model's patch size, which is 1

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        ids = argument(args, kwargs, self.positions["img_ids"], "img_ids")
        if self._seen is None or self._seen[0] is not ids:  # once per run, as it waits for the device
            flat = ids[0] if ids.ndim == 3 else ids
            generated = flat[flat[:, 0] == 0]  # patches of Kontext's input image have a nonzero first coordinate
            rows, columns = (generated[:, 1:3].amax(0) + 1).int().tolist()
            patches = argument(args, kwargs, 0, "hidden_states").shape[1]
            if rows * columns != len(generated) or patches != len(flat):
                of_all = f"{len(flat)} positions for {patches} image patches"
                of_one = f"{len(generated)} positions for an image of {rows} x {columns} patches"
                raise ModelError(
                    f"img_ids has {of_one if patches == len(flat) else of_all}; each patch must have one position. "
                    "Call the pipeline instead of its transformer, with one height and width for all images."
                )
            self._seen = ids, (rows, columns)
        return self._seen[1]

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        """Layout of the sequence: the text, then the generated image, then the input image of Kontext."""
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size (before packing) of a call of the transformer."""
        rows, columns = self._grid(args, kwargs)
        batch = argument(args, kwargs, 0, "hidden_states").shape[0]
        return Call(
            batch,
            self._timestep(
                torch.as_tensor(argument(args, kwargs, self.positions["timestep"], "timestep")).flatten()[0]
            ),
            (rows * self._patch, columns * self._patch),
            conditional=not self._is_negative(argument(args, kwargs, 1, "encoder_hidden_states")),
        )

    def _with_text(self, given: dict[str, Any], states: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
        """Arguments, by name, of a denoiser call with another text and with only one patch of the image.

        ``given`` are the arguments of a denoiser call of the run. After that call, `elakit.attention.map_concepts`
        makes the new call with the returned arguments. In each layer, `map_concepts` replaces the keys and values of
        the patch by those that the whole image had in the run's call. ``states`` are the text states of the new call.
        ``positions`` has the position of each state's token, counted from 0 in the text from which the state was
        encoded.
        """
        latents = given["hidden_states"]
        given |= {
            "hidden_states": latents[:, :1],
            "encoder_hidden_states": repeated_text(states, latents),
            "img_ids": given["img_ids"][..., :1, :],
            "txt_ids": self._text_ids(positions, given["img_ids"]),
        }
        # These have the length of the whole sequence, or of the image.
        return given | dict.fromkeys(given.keys() & {"attention_mask", *_CONTROL})

    def _text_ids(self, positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Rotary positions of text tokens; all coordinates are zero."""
        return like.new_zeros(len(positions), like.shape[-1])

    @property
    def text_limit(self) -> int:
        """Largest number of text positions, without the image tokens that FLUX Redux appends to the text."""
        return self._t5_length()

    def _timestep(self, given: torch.Tensor) -> float:
        """The scheduler's timestep, found from ``given``, the number that the model receives.

        ``given`` is the scheduler's timestep divided by 1000 and rounded to the model's precision.
        """
        if (current := getattr(self.pipe, "_current_timestep", None)) is not None:
            return float(current)
        return scheduler_timestep(self.pipe, float(given) * 1000)

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of T5 tokens, without a start token."""
        return (TextSequence(name="t5", tokenizer=self.pipe.tokenizer_2, offset=0, length=self._t5_length()),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states of T5 and the pooled state of CLIP.

        The result also contains positions of text and image, and the guidance scale if the model receives it.
        """
        if prompt.negative:
            raise SettingError(
                f"negative_prompt={prompt.negative!r}: {self.family} is guidance-distilled and makes no pass for a "
                "negative prompt. Leave negative_prompt out, or call the pipeline yourself with `true_cfg_scale` "
                "inside `with elakit.record(pipe, prompt) as recording:`."
            )
        device = self.pipe._execution_device
        embeds, pooled, text_ids = self.pipe.encode_prompt(
            prompt=prompt.text, prompt_2=None, device=device, max_sequence_length=self._t5_length()
        )
        rows, columns = self.latent_size(*prompt.size)
        image_ids = self.pipe._prepare_latent_image_ids(
            1, rows // self._patch, columns // self._patch, device, embeds.dtype
        )
        guidance = None
        if self.pipe.transformer.config.guidance_embeds:
            scale = (
                call_default(self.pipe, "guidance_scale") if prompt.guidance_scale is None else prompt.guidance_scale
            )
            guidance = torch.tensor([float(scale)], device=device)
        return Conditioning(
            {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled},
            {"encoder_hidden_states": embeds, "pooled_projections": pooled, "guidance": guidance},
            {"txt_ids": text_ids, "img_ids": image_ids},
        )

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Number that the model receives as its timestep: a thousandth of the scheduler's ``timestep``.

        The result has one value for each row of ``latents``, and the precision of ``latents``.
        """
        return super()._given(timestep, latents).to(latents.dtype) / 1000

    @property
    def _channels(self) -> int:
        """Number of channels of the latent before patches of 2x2 are packed."""
        return super()._channels // self._patch**2

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for an image of ``height`` x ``width`` pixels, packed: (1, patches, 4c).

        A patch contains 2x2 locations of the latent, which has c channels.
        """
        noise = super().noise(generator, height, width)
        packed: torch.Tensor = self.pipe._pack_latents(noise, *noise.shape)
        return packed

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1: the initial noise is not scaled."""
        self._set_flow(steps, self._shift(height, width, 1.15))
        return 1.0

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Packed latents of an image, in the form of `noise`: (1, patches, 4c)."""
        latents = encoded(self.pipe, image)
        packed: torch.Tensor = self.pipe._pack_latents(latents, *latents.shape)
        return packed

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images decoded from packed latents, (n, patches, 4c).

        The latents may come from any step of a run. A patch contains 2x2 locations of the latent, which has c channels.
        ``height`` and ``width`` are those of the
        images in pixels.
        """
        return super().decode(
            self.pipe._unpack_latents(latents, height, width, self.pipe.vae_scale_factor), height, width
        )
