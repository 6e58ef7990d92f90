"""Qwen-Image: an MM-DiT of double-stream blocks; the text states come from a language model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image

from elakit.models.adapter import AttentionLayer, Call, Conditioning, Layout, argument, scheduler_timestep
from elakit.models.chat import chat_sequence
from elakit.models.encoding import PromptInput
from elakit.models.passes import SeparateNegative
from elakit.models.transformer import repeated_text
from elakit.pipeline import PackedPipeline
from elakit.tokens import TextSequence


class QwenImagePipeline(PackedPipeline, Protocol):
    """Typing protocol of a Qwen-Image pipeline.

    The protocol has all members of `PackedPipeline`, and further members that the adapter `QwenImage` uses.
    """

    tokenizer_max_length: int
    prompt_template_encode: str
    prompt_template_encode_start_idx: int


class QwenImage(SeparateNegative):
    """Adapter through which elakit reads and runs Qwen-Image pipelines.

    Text-to-image, img2img, inpainting and ControlNet pipelines are supported. The pipeline puts the prompt into a chat
    with a system message. The denoiser sees the text states of the chat, without the states of the system message. With
    classifier-free guidance, the pipeline makes a second denoiser call for the negative prompt. That call is not
    recorded. The pipeline's argument for the classifier-free guidance scale is ``true_cfg_scale``.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Qwen-Image"
    pipe: QwenImagePipeline
    models: ClassVar[tuple[str, ...]] = ("QwenImageTransformer2DModel",)
    scale_argument: ClassVar[str] = "true_cfg_scale"

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "Edit" in pipeline or "Layered" in pipeline:
            return "its text contains the tokens of input images (Qwen-Image-Edit, Layered), which cannot be read yet"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("transformer_blocks", "attn", "double", "joint", text_first=True)

    @property
    def _patch(self) -> int:
        return 2  # the pipeline's packing

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        shape = argument(args, kwargs, 4, "img_shapes")[0]
        _, rows, columns = shape[0] if isinstance(shape, list) else shape
        return int(rows), int(columns)

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        text = argument(args, kwargs, 1, "encoder_hidden_states").shape[1]
        return Layout(self._grid(args, kwargs), text, (0, text))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call.

        The latent size is the size before each patch of 2x2 locations is packed into one token.
        """
        rows, columns = self._grid(args, kwargs)
        current = getattr(self.pipe, "_current_timestep", None)
        given = float(torch.as_tensor(argument(args, kwargs, 3, "timestep")).flatten()[0])
        return Call(
            batch=argument(args, kwargs, 0, "hidden_states").shape[0],
            timestep=scheduler_timestep(self.pipe, 1000 * given) if current is None else float(current),
            latent=(rows * self._patch, columns * self._patch),
            conditional=not self._is_negative(argument(args, kwargs, 1, "encoder_hidden_states")),
        )

    def _with_text(self, given: dict[str, Any], states: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
        """Arguments, by name, of a denoiser call with another text and with only a few patches of the image.

        ``given`` are the arguments of a denoiser call of the run. After that call, `elakit.attention.map_concepts`
        makes the new call with the returned arguments. In each layer, `map_concepts` replaces the keys and values of
        the few patches by the keys and values that the whole image had in the run's call. The number of these patches
        is the number of patches along the longer side of the whole image. ``states``, (tokens, channels), are the text
        states of the new call. ``positions`` is not used.
        """
        latents, side = given["hidden_states"], max(self._grid((), given))
        given |= {
            # Rotary positions of the text begin behind those of the longer side of the image.
            "hidden_states": latents[:, :side],
            "img_shapes": [[(1, 1, side)]] * len(latents),
            "encoder_hidden_states": repeated_text(states, latents),
            "encoder_hidden_states_mask": None,
        }
        if "txt_seq_lens" in given:  # older diffusers
            given["txt_seq_lens"] = [len(states)] * len(latents)
        return given | dict.fromkeys(given.keys() & {"controlnet_block_samples"})

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        side = self.pipe.default_sample_size * self.pipe.vae_scale_factor
        return side, side

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the chat with the prompt in it, without the system message."""
        return (
            chat_sequence(
                "chat",
                self.pipe.tokenizer,
                self.pipe.prompt_template_encode.format,
                length=int(self.pipe.tokenizer_max_length),
                dropped=int(self.pipe.prompt_template_encode_start_idx),
                padded=False,
            ),
        )

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states and their padding mask.

        The result also contains the size of the image in patches.
        """
        embeds, mask = self._states(prompt.text)
        call = {"prompt_embeds": embeds, "prompt_embeds_mask": mask}
        if prompt.guided:
            negative_embeds, negative_mask = self._states(prompt.negative or " ")  # a space, as the pipeline recommends
            call |= {"negative_prompt_embeds": negative_embeds, "negative_prompt_embeds_mask": negative_mask}
        rows, columns = self.latent_size(*prompt.size)
        shared: dict[str, Any] = {"img_shapes": [[(1, rows // self._patch, columns // self._patch)]]}
        if "txt_seq_lens" in inspect.signature(type(self.denoiser).forward).parameters:  # older diffusers
            shared["txt_seq_lens"] = [embeds.shape[1]]
        inputs = {"encoder_hidden_states": embeds, "encoder_hidden_states_mask": None if bool(mask.all()) else mask}
        return Conditioning(call, inputs, shared)

    def _states(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, mask = self.pipe.encode_prompt(prompt=text, device=self.pipe._execution_device)
        return embeds, torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device) if mask is None else mask

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Number that the model receives as its timestep: a thousandth of the scheduler's ``timestep``.

        The result has one value for each row of ``latents``, and the precision of ``latents``.
        """
        return super()._given(timestep, latents).to(latents.dtype) / 1000

    @property
    def _channels(self) -> int:
        """Number of channels of the latent, before each patch of 2x2 locations is packed into one token."""
        return super()._channels // self._patch**2

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for an image of ``height`` x ``width`` pixels, packed: (1, patches, 4c).

        The latent has c channels. Each patch of 2x2 locations of the latent is packed into one token with 4c channels.
        """
        noise = super().noise(generator, height, width)
        packed: torch.Tensor = self.pipe._pack_latents(noise, *noise.shape)
        return packed

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise."""
        self._set_flow(steps, self._shift(height, width, 1.15))
        return 1.0

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode an image as packed latents, (1, patches, 4c).

        The latent has c channels. Each patch of 2x2 locations of the latent is packed into one token with 4c channels.
        """
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(image.convert("RGB")).to(vae.device, vae.dtype)
        latents = vae.encode(pixels[:, :, None]).latent_dist.mode()  # the autoencoder of a video, of one frame
        mean, spread = self._statistics(latents)
        latents = ((latents - mean) / spread)[:, :, 0]
        packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
        return packed

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Decode packed latents, (n, patches, 4c), to images of ``height`` x ``width`` pixels.

        The latents may come from any step of a run. The latent has c channels. Each patch of 2x2 locations of the
        latent is packed into one token with 4c channels.
        """
        pipe, vae = self.pipe, self.pipe.vae
        frames = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor).to(vae.dtype)
        mean, spread = self._statistics(frames)
        pixels = vae.decode(frames * spread + mean, return_dict=False)[0][:, :, 0]
        images: list[Image.Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Mean and standard deviation of the autoencoder's latents for each channel, both (1, channels, 1, 1, 1).

        Both tensors have the device and precision of ``latents``.
        """
        config = self.pipe.vae.config
        return tuple(
            torch.tensor(values).view(1, -1, 1, 1, 1).to(latents)
            for values in (config.latents_mean, config.latents_std)
        )
