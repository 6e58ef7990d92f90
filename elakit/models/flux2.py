"""FLUX.2: an MM-DiT over the states of a language model; its single-stream blocks have fused projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from PIL import Image

from elakit.errors import SettingError
from elakit.models.adapter import Conditioning, call_default, is_a
from elakit.models.chat import chat_sequence
from elakit.models.encoding import PromptInput
from elakit.models.flux import Flux
from elakit.models.unet import seeded_noise
from elakit.pipeline import Pipeline, TransformerPipeline
from elakit.tokens import TextSequence


class Flux2Pipeline(TransformerPipeline, Protocol):
    """Typing protocol of a FLUX.2 pipeline.

    The protocol has all members of `TransformerPipeline`, and further members that the adapter `Flux2` uses. Klein
    pipelines have no ``system_message``.
    """

    default_sample_size: int
    system_message: str

    def _pack_latents(self, *args: Any) -> torch.Tensor: ...

    def _patchify_latents(self, *args: Any) -> torch.Tensor: ...

    def _unpatchify_latents(self, *args: Any) -> torch.Tensor: ...

    def _unpack_latents_with_ids(self, *args: Any) -> torch.Tensor: ...

    def _prepare_latent_ids(self, *args: Any) -> torch.Tensor: ...


class Flux2(Flux):
    """Adapter of FLUX.2 pipelines (dev, Klein).

    The denoiser sees the text states of a chat that contains the prompt, padded to ``max_sequence_length``. Layers are
    read at the attention call, because one projection of a single-stream block computes query, key, value and the input
    of the feed-forward network. Input images follow the generated image in the sequence; the maps are those of the
    generated image.

    FLUX.2 dev is guidance-distilled: every row of a batch sees the prompt. A Klein model that is not distilled uses
    classifier-free guidance: the pipeline makes a second denoiser call with an empty prompt. That call is not recorded.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "FLUX.2"
    # It overrides every method that uses what only pipelines of FLUX.1 have.
    pipe: Flux2Pipeline  # type: ignore[assignment]
    models: ClassVar[tuple[str, ...]] = ("Flux2Transformer2DModel",)
    text_arguments: ClassVar[tuple[tuple[str, ...], ...]] = (("prompt",),)
    positions: ClassVar[dict[str, int]] = {"timestep": 2, "img_ids": 3}

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := super(Flux, cls).refusal(pipe):
            return reason
        return "it has no tokenizer" if getattr(pipe, "tokenizer", None) is None else None

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "KV" in pipeline:
            return "it keeps attention keys of input images from step to step (Klein KV), which is not supported yet"
        return None

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""
        return is_a(self.pipe, "Flux2Pipeline", "Flux2KleinPipeline")

    @property
    def _captured(self) -> bool:
        return True

    @property
    def _klein(self) -> bool:
        return is_a(self.pipe, "Flux2KleinPipeline", "Flux2KleinInpaintPipeline")

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence: the language model's chat template with the prompt in it, followed or preceded by padding."""
        if self._klein:

            def render(prompt: str) -> str:
                chat = [{"role": "user", "content": prompt}]
                return str(
                    self.pipe.tokenizer.apply_chat_template(
                        chat, tokenize=False, add_generation_prompt=True, enable_thinking=False
                    )
                )
        else:

            def render(prompt: str) -> str:
                from diffusers.pipelines.flux2.pipeline_flux2 import format_input

                chats = format_input(prompts=[prompt], system_message=self.pipe.system_message)
                return str(
                    self.pipe.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=False)[0]
                )

        return (chat_sequence("chat", self.pipe.tokenizer, render, length=self._t5_length(), specials=self._klein),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains the text states, and positions of text and image.

        For FLUX.2 dev, the result also contains the guidance scale.
        """
        if prompt.negative:
            raise SettingError(
                f"negative_prompt={prompt.negative!r}: {self.family} pipelines have no negative prompt. Leave "
                "negative_prompt out."
            )
        device = self.pipe._execution_device
        embeds, text_ids = self.pipe.encode_prompt(
            prompt=prompt.text, device=device, max_sequence_length=self._t5_length()
        )
        call = {"prompt_embeds": embeds}
        if self._klein and prompt.guided and not self.pipe.config.is_distilled:
            call["negative_prompt_embeds"] = self.pipe.encode_prompt(
                prompt="", device=device, max_sequence_length=self._t5_length()
            )[0]
        guidance = None
        if not self._klein:
            scale = (
                call_default(self.pipe, "guidance_scale") if prompt.guidance_scale is None else prompt.guidance_scale
            )
            guidance = torch.tensor([float(scale)], device=device)
        return Conditioning(
            call,
            {
                "encoder_hidden_states": embeds,
                "txt_ids": text_ids,
                "img_ids": self._image_ids(*prompt.size),
                "guidance": guidance,
            },
        )

    def _text_ids(self, positions: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """Rotary positions of text tokens.

        The last coordinate is the position of the token in the text. The other coordinates are zero.
        """
        ids = super()._text_ids(positions, like)
        ids[:, -1] = ids.new_tensor(list(positions))
        return ids

    def _image_ids(self, height: int, width: int) -> torch.Tensor:
        rows, columns = self.latent_size(height, width)
        blank = torch.empty(1, 1, rows // self._patch, columns // self._patch)
        ids: torch.Tensor = self.pipe._prepare_latent_ids(blank)
        return ids.to(self.pipe._execution_device)

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser in one pass that sees the prompt.

        ``latents`` may be packed, (n, patches, 4c), or in the form of `noise`, (n, 4c, h, w); the second form is packed
        first. A patch contains 2x2 locations of the autoencoder's latent, which has c channels.
        """
        latents = self.pipe._pack_latents(latents) if latents.ndim == 4 else latents
        return super().denoise(latents, timestep, conditioning)

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for an image of ``height`` x ``width`` pixels.

        The shape is (1, 4c, h, w). The latent has c channels. Each patch of 2x2 locations of the latent is one location
        of the noise, with 4c channels. There are h rows and w columns of patches. The pipeline itself packs the noise
        to (1, patches, 4c).
        """
        rows, columns = self.latent_size(height, width)
        channels = int(self.pipe.transformer.config.in_channels)
        shape = (1, channels, rows // self._patch, columns // self._patch)
        return seeded_noise(shape, generator, self.pipe._execution_device, self._noise_dtype)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        rows, columns = self.latent_size(height, width)
        patches = (rows // self._patch) * (columns // self._patch)
        self._set_flow(steps, compute_empirical_mu(image_seq_len=patches, num_steps=steps))
        return 1.0

    @torch.no_grad()
    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode an image as latents, (1, 4c, h, w), in the form in which `noise` returns the initial noise.

        The autoencoder's latent has c channels. Each patch of 2x2 locations of the latent becomes one location with 4c
        channels. There are h rows and w columns of patches.
        """
        pipe, vae = self.pipe, self.pipe.vae
        pixels = pipe.image_processor.preprocess(image.convert("RGB")).to(vae.device, vae.dtype)
        latents: torch.Tensor = pipe._patchify_latents(vae.encode(pixels).latent_dist.mode())
        mean, spread = self._statistics(latents)
        return (latents - mean) / spread

    @torch.no_grad()
    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Decode latents to images of ``height`` x ``width`` pixels.

        The latents are either packed, (n, patches, 4c), or in the form that `noise` returns, (n, 4c, h, w). A patch
        contains 2x2 locations of the autoencoder's latent, which has c channels. There are h rows and w columns of
        patches. The latents may come from any step of a run.
        """
        pipe, vae = self.pipe, self.pipe.vae
        latents = pipe._pack_latents(latents) if latents.ndim == 4 else latents
        ids = self._image_ids(height, width).expand(len(latents), -1, -1)
        unpacked = pipe._unpack_latents_with_ids(latents, ids)
        mean, spread = self._statistics(unpacked)
        pixels = vae.decode(pipe._unpatchify_latents(unpacked * spread + mean).to(vae.dtype), return_dict=False)[0]
        images: list[Image.Image] = pipe.image_processor.postprocess(pixels, output_type="pil")
        return images

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the autoencoder's latents for each channel, both (1, channels, 1, 1).

        Both tensors have the device and precision of ``latents``.
        """
        norm, epsilon = self.pipe.vae.bn, self.pipe.vae.config.batch_norm_eps
        mean, variance = (each.view(1, -1, 1, 1).to(latents) for each in (norm.running_mean, norm.running_var))
        return mean, torch.sqrt(variance + epsilon)
