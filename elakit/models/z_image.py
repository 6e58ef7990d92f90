"""Z-Image: a transformer over one sequence, the image patches and then the text states of a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from elakit.models.adapter import (
    AttentionLayer,
    Call,
    Conditioning,
    Layout,
    argument,
    running,
    scheduler_timestep,
)
from elakit.models.chat import chat_sequence
from elakit.models.encoding import PromptInput
from elakit.models.transformer import TransformerAdapter
from elakit.tokens import TextSequence

_MULTIPLE = 32  # image and text are each padded to a multiple of it, by learned tokens that are keys too


class ZImage(TransformerAdapter):
    """Adapter through which elakit reads and runs Z-Image pipelines.

    Image and text form one sequence, in which the image comes first. Image and text are each padded to a multiple of 32
    positions. The padding of the text counts as end-of-text. The pipeline uses classifier-free guidance at every scale
    above 0. A batch is then ``[conditional..., unconditional...]``.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """

    family: ClassVar[str] = "Z-Image"
    models: ClassVar[tuple[str, ...]] = ("ZImageTransformer2DModel",)

    @classmethod
    def _refusal_of_relative(cls, pipeline: str) -> str | None:
        if "Omni" in pipeline or "ControlNet" in pipeline:
            return "its tokens have another order (Z-Image Omni and ControlNet), which is not supported yet"
        return None

    def _make_layers(self) -> tuple[AttentionLayer, ...]:
        return self._layers_at_call("layers", "attention", "single", "single")

    @property
    def _patch(self) -> int:
        return int(self.pipe.transformer.config.all_patch_size[0])

    def _grid(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
        image = argument(args, kwargs, 0, "x")[0]
        return image.shape[-2] // self._patch, image.shape[-1] // self._patch

    def _layout(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Layout:
        rows, columns = self._grid(args, kwargs)
        text = len(argument(args, kwargs, 2, "cap_feats")[0])  # the first rows are those that see the prompt
        return Layout((rows, columns), 0, (_padded(rows * columns), _padded(text)))

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call.

        In these arguments, the images and the texts are lists with one entry per row.
        """
        images, texts = argument(args, kwargs, 0, "x"), argument(args, kwargs, 2, "cap_feats")
        negative = {id(one) for one in running(self.pipe).get("negative_prompt_embeds") or ()}
        self._conditional = sum(id(one) not in negative for one in texts)
        given = float(torch.as_tensor(argument(args, kwargs, 1, "t")).flatten()[0])
        return Call(
            batch=len(images),
            timestep=scheduler_timestep(self.pipe, 1000 * (1 - given)),
            latent=(images[0].shape[-2], images[0].shape[-1]),
            conditional=self._conditional > 0,
        )

    def conditional_rows(self, batch: int) -> slice:
        """Slice of the rows that see the prompt: the first n rows of the batch.

        n is the number of rows that had the prompt as their text in the latest denoiser call.
        """
        return slice(0, min(batch, getattr(self, "_conditional", batch)))

    def _with_text(self, given: dict[str, Any], states: torch.Tensor, positions: Sequence[int]) -> dict[str, Any]:
        """Arguments, by name, of a denoiser call with another text and with only one patch of the image.

        ``given`` are the arguments of a denoiser call of the run. After that call, `elakit.attention.map_concepts`
        makes the new call with the returned arguments. In each layer, `map_concepts` replaces the keys and values of
        the patch by the keys and values that the whole image had in the run's call. ``states``, (tokens, channels), are
        the text states of the new call. ``positions`` is not used.
        """
        patches = [image[..., : self._patch, : self._patch] for image in given["x"]]
        return given | {"x": patches, "cap_feats": [states.to(patches[0].dtype)] * len(patches)}

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        return 1024, 1024  # of the pipeline's call; the model has no size of its own

    def text(self) -> tuple[TextSequence, ...]:
        """One sequence of tokens: the model's chat template with the prompt in it, without padding."""

        def render(prompt: str) -> str:
            chat = [{"role": "user", "content": prompt}]
            return str(
                self.pipe.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=True, enable_thinking=True
                )
            )

        return (chat_sequence("chat", self.pipe.tokenizer, render, length=self._t5_length(), padded=False),)

    def _encode(self, prompt: PromptInput) -> Conditioning:
        """Encode a prompt; the result contains its text states without padding, as a list of one tensor."""
        scale = self._scale(prompt.guidance_scale)
        embeds, negative_embeds = self.pipe.encode_prompt(
            prompt.text,
            device=self.pipe._execution_device,
            do_classifier_free_guidance=scale > 0,
            negative_prompt=prompt.negative,
        )
        return Conditioning({"prompt_embeds": embeds, "negative_prompt_embeds": negative_embeds}, {"cap_feats": embeds})

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser for latents, in one pass that sees the prompt.

        The output is differentiable if gradients are enabled.

        Parameters
        ----------
        latents : torch.Tensor, (n, c, h, w)
            Latents of n images, in any floating-point precision.
        timestep : torch.Tensor, float or int
            Timestep of the scheduler.
        conditioning : Conditioning
            The encoded prompt.

        Returns
        -------
        torch.Tensor, (n, c, h, w)
            Output of the denoiser for each image.
        """
        typed = latents.to(self.denoiser.dtype)  # type: ignore[arg-type]
        outputs = self.denoiser(
            list(typed.unsqueeze(2).unbind(0)),
            self._given(timestep, latents),
            return_dict=False,
            **conditioning.rows(len(latents), typed.dtype),
        )[0]
        return torch.stack(list(outputs)).squeeze(2)

    def _given(self, timestep: torch.Tensor | float | int, latents: torch.Tensor) -> torch.Tensor:
        """Time that the model receives instead of the scheduler's ``timestep``: 0 for pure noise, 1 for the image.

        The result has one value for each row of ``latents``.
        """
        return (1000 - super()._given(timestep, latents)) / 1000

    @property
    def _noise_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def _channels(self) -> int:
        return int(self.pipe.transformer.in_channels)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return 1, the scale of the initial noise.

        The timesteps depend on the number of steps, and on the height and the width of the image in pixels.
        """
        self._set_flow(steps, self._shift(height, width, 1.15))
        return 1.0


def _padded(count: int) -> int:
    return count + -count % _MULTIPLE
