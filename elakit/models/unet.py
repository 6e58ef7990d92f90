"""Base of the adapters for pipelines with a ``UNet2DConditionModel``.

Such a U-Net has cross-attention to the text, with maps of several sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import torch
from PIL import Image
from torch import nn

from elakit.checks import is_whole
from elakit.errors import ModelError, SettingError
from elakit.models.adapter import (
    WITHOUT_SELF,
    AttentionLayer,
    Call,
    Conditioning,
    OtherKind,
    Place,
    argument,
    compiled,
    decoded,
    encoded,
    is_a,
    modular,
    stacked_rows,
)
from elakit.models.device import compute_dtype
from elakit.models.encoding import PromptEncoder
from elakit.pipeline import Pipeline, UNetPipeline
from elakit.tokens import TextSequence

# Pipelines with a supported U-Net whose batch has another layout, or that make passes of their own.
_OTHER_ROWS = {
    "StableDiffusionInstructPix2PixPipeline": "it guides by three passes (text and image, image, neither)",
    "StableDiffusionXLInstructPix2PixPipeline": "it guides by three passes (text and image, image, neither)",
    "StableDiffusionPanoramaPipeline": "it denoises many crops of one image",
}


class UNetAdapter(PromptEncoder):
    """Base of the adapters for pipelines with a U-Net.

    The adapter of a family is a subclass. It sets the name of the family, and the number and classes of the text
    encoders.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Raises
    ------
    ModelError
        Raised when the pipeline is of another family; the message states the difference.
    """

    family: ClassVar[str]
    two_encoders: ClassVar[bool]
    encoders: ClassVar[tuple[str, ...]] = ("CLIPTextModel", "CLIPTextModelWithProjection")
    scale_argument: ClassVar[str] = "guidance_scale"
    pipe: UNetPipeline

    def __init__(self, pipe: Pipeline) -> None:
        reason = self.refusal(pipe)
        if reason is not None:
            raise ModelError(
                f"{type(pipe).__name__} is not a supported {self.family} pipeline: {reason}. Pass the pipeline to "
                "elakit.models.adapter_for, which chooses the adapter."
            )
        self.pipe = cast(UNetPipeline, pipe)
        self.denoiser: nn.Module = self.pipe.unet
        self._layers = tuple(_layers(self.pipe.unet))

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""
        if reason := modular(pipe):
            return reason
        unet = getattr(pipe, "unet", None)
        if unet is None:
            return OtherKind("it has no U-Net")
        if reason := compiled(unet, "pipe.unet"):
            return reason
        if not is_a(unet, "UNet2DConditionModel"):
            name = type(unet).__name__
            return f"its U-Net has the class {name}, which does not attend to text as a UNet2DConditionModel does"
        second = any(getattr(pipe, name, None) is not None for name in ("tokenizer_2", "text_encoder_2"))
        if second != cls.two_encoders:
            return OtherKind(f"it has {'two text encoders' if second else 'one text encoder'}")
        if cls._tokenizer(pipe) is None:
            return "it has no tokenizer and text encoder"
        encoder = getattr(pipe, "text_encoder", None) or getattr(pipe, "text_encoder_2", None)
        if encoder is not None and not is_a(encoder, *cls.encoders):
            return OtherKind(cls._other_encoder(type(encoder).__name__))
        for kind in type(pipe).__mro__:
            if kind.__name__ in _OTHER_ROWS:
                return _OTHER_ROWS[kind.__name__]
        if not hasattr(type(pipe), "do_classifier_free_guidance"):
            return "it has no `do_classifier_free_guidance`, so the conditional rows of a batch are unknown"
        if next(_layers(unet), None) is None:
            return "no layer of its U-Net attends to text"
        return None

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """Reason why this family does not support a model; None if the model is supported.

        ``index`` is the content of the model's ``model_index.json``. Weights are not needed for this decision.
        """
        unet = (index.get("unet") or [None, None])[1]
        if unet is None:
            return OtherKind("it has no U-Net")
        if unet != "UNet2DConditionModel":
            return f"its U-Net has the class {unet}, which does not attend to text"
        if str(index.get("_class_name")) in _OTHER_ROWS:
            return _OTHER_ROWS[str(index["_class_name"])]
        second = (index.get("tokenizer_2") or [None])[0] is not None
        if second != cls.two_encoders:
            return OtherKind(f"it has {'two text encoders' if second else 'one text encoder'}")
        encoder = (index.get("text_encoder") or [None, None])[1]
        if encoder is not None and encoder not in cls.encoders:
            return OtherKind(cls._other_encoder(encoder))
        return None

    @classmethod
    def _other_encoder(cls, name: str) -> str:
        return f"its text encoder is a {name}, not a {' or '.join(cls.encoders)}"

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""
        return False

    def is_current(self) -> bool:
        """True if the pipeline still has the denoiser of this adapter, and that denoiser is not compiled.

        The pipeline must also still have its tokenizer.
        """
        unet = getattr(self.pipe, "unet", None)
        return unet is self.denoiser and compiled(unet, "pipe.unet") is None and self._tokenizer(self.pipe) is not None

    @staticmethod
    def _tokenizer(pipe: Pipeline) -> Any:
        """The pipeline's tokenizer if its text encoder is loaded; otherwise None."""
        return None if getattr(pipe, "text_encoder", None) is None else getattr(pipe, "tokenizer", None)

    def layers(self) -> tuple[AttentionLayer, ...]:
        """Cross-attention layers, in forward order."""
        return self._layers

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call."""
        sample = argument(args, kwargs, 0, "sample")
        timestep = torch.as_tensor(argument(args, kwargs, 1, "timestep"))
        return Call(sample.shape[0], float(timestep.flatten()[0]), (sample.shape[-2], sample.shape[-1]))

    def conditional_rows(self, batch: int) -> slice:
        """Slice of the rows that see the prompt, in a denoiser call with ``batch`` rows.

        With classifier-free guidance, diffusers puts unconditional rows before the conditional rows in the same batch.
        With perturbed-attention guidance, diffusers appends perturbed rows. Whether guidance is used is read from the
        pipeline at each call, because guidance may end during a run.

        Parameters
        ----------
        batch : int
            Number of rows of the batch.

        Raises
        ------
        ModelError
            Raised when the rows cannot be divided into equal parts, one for each pass that diffusers stacks in the
            batch.
        """
        return stacked_rows(self.pipe, batch, bool(getattr(self.pipe, "do_classifier_free_guidance", False)))

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent for an image of ``height`` x ``width`` pixels.

        Raises
        ------
        SettingError
            Raised when ``height`` or ``width`` is not a positive multiple of ``vae_scale_factor``.
        """
        factor = self.pipe.vae_scale_factor
        check_sides(height, width, factor)
        return height // factor, width // factor

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""
        side = self.pipe.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self.pipe.vae_scale_factor, width * self.pipe.vae_scale_factor

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser in one pass that sees the prompt.

        The output is differentiable if gradients are enabled.

        Parameters
        ----------
        latents : torch.Tensor, (n, c, h, w)
            Latents, already scaled by the scheduler's ``scale_model_input``.
        timestep : torch.Tensor, float or int
            The scheduler's timestep.
        conditioning : Conditioning
            The encoded prompt.

        Returns
        -------
        torch.Tensor, (n, c, h, w)
            Output of the denoiser.
        """
        return self.denoiser(latents, timestep, **conditioning.rows(len(latents), latents.dtype), return_dict=False)[0]

    def _distilled(self, guidance_scale: float | None) -> dict[str, Any]:
        """Argument ``timestep_cond`` for a guidance-distilled U-Net (latent consistency), as a dictionary.

        The value of the argument is the embedding of the guidance scale. If ``guidance_scale`` is None, the default of
        the pipeline's call is used. For a U-Net that is not guidance-distilled, the dictionary is empty.
        """
        width = self.pipe.unet.config.time_cond_proj_dim
        if width is None:
            return {}
        scale = self._scale(guidance_scale)
        embedding = self.pipe.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=width)
        return {"timestep_cond": embedding.to(self.pipe._execution_device)}

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Self-attention layers, one for each cross-attention layer in ``beside``.

        The self-attention layer is in the same block as the cross-attention layer.

        Raises
        ------
        ModelError
            Raised when a block has no self-attention.
        """
        return tuple(self_layer(self.denoiser, layer) for layer in beside)

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for an image of ``height`` x ``width`` pixels: a latent, (1, c, h, w)."""
        shape = (1, self.pipe.unet.config.in_channels, *self.latent_size(height, width))
        dtype = compute_dtype(self.denoiser)
        return seeded_noise(shape, generator, self.pipe._execution_device, dtype)

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return the scale of the initial noise.

        The first latents of a run are the result of `noise` times this scale. ``height`` and ``width`` are those of the
        image in pixels.
        """
        self.pipe.scheduler.set_timesteps(steps, device=self.pipe._execution_device)
        return float(self.pipe.scheduler.init_noise_sigma)

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Decode latents, (n, c, h, w), to images of ``height`` x ``width`` pixels.

        The latents may come from any step of a run.
        """
        return decoded(self.pipe, latents)

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode an image as latents, (1, c, h, w)."""
        return encoded(self.pipe, image)

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments that make the pipeline's call replace the latents by ``move(step, latents)`` after each step.

        ``step`` is the index of the completed step, counted from 0 along the scheduler's timesteps.
        """
        return step_callback(move)

    def text_length(self) -> int:
        """Number of text positions, including start-of-text, end-of-text and padding."""
        return int(self._tokenizer(self.pipe).model_max_length)

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequence that the denoiser sees: the tokens of CLIP."""
        return (TextSequence(name="clip", tokenizer=self._tokenizer(self.pipe), offset=0, length=self.text_length()),)


def seeded_noise(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Gaussian noise, sampled as diffusers' pipelines sample it.

    With a CPU generator, the noise is the same on every device.
    """
    from diffusers.utils.torch_utils import randn_tensor

    noise: torch.Tensor = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    return noise


def step_callback(move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """Arguments that make a pipeline's call replace the latents by ``move(step, latents)`` after each step.

    The arguments are ``callback_on_step_end`` and ``callback_on_step_end_tensor_inputs``. ``step`` is the index that
    diffusers passes to this callback.
    """

    def callback(pipe: Pipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {**tensors, "latents": move(step, tensors["latents"])}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents"]}


def self_layer(denoiser: nn.Module, beside: AttentionLayer) -> AttentionLayer:
    """Self-attention layer in the same block as ``beside``, a cross-attention layer of the denoiser.

    Raise a `ModelError` if the block has no self-attention layer.
    """
    name = beside.name.rpartition(".")[0] + ".attn1"
    module: Any
    try:
        module = denoiser.get_submodule(name)
    except AttributeError:
        module = None
    if not is_a(module, "Attention") or module.is_cross_attention:
        raise ModelError(f"The block of the layer {beside.name} has no self-attention layer. {WITHOUT_SELF}")
    return replace(beside, name=name, heads=module.heads, module=module, reads="image")


def check_sides(height: int, width: int, factor: int) -> None:
    """Raise a `SettingError` if the height or width of an image in pixels is not a positive multiple of ``factor``."""
    for name, side in (("height", height), ("width", width)):
        if not is_whole(side) or side <= 0 or side % factor:
            raise SettingError(f"{name}={side!r}: give a number of pixels that is a positive multiple of {factor}.")


def _layers(unet: Any) -> Iterator[AttentionLayer]:
    """Yield the cross-attention layers of a U-Net in forward order.

    The order of ``named_modules`` is different: it lists the middle block last.
    """
    factor = 1
    for i, block in enumerate(unet.down_blocks):
        yield from _block_layers(block, f"down_blocks.{i}", "down", factor)
        factor *= 2 if block.downsamplers else 1
    if unet.mid_block is not None:
        yield from _block_layers(unet.mid_block, "mid_block", "mid", factor)
    for i, block in enumerate(unet.up_blocks):
        yield from _block_layers(block, f"up_blocks.{i}", "up", factor)
        factor //= 2 if block.upsamplers else 1


def _block_layers(block: nn.Module, prefix: str, place: Place, factor: int) -> Iterator[AttentionLayer]:
    for path, transformer in block.named_modules(prefix=prefix):
        if not is_a(transformer, "Transformer2DModel"):
            continue
        for name, module in transformer.named_modules(prefix=path):
            if is_a(module, "Attention") and module.is_cross_attention:
                yield AttentionLayer(
                    name=name, place=place, heads=module.heads, module=module, block=transformer, factor=factor
                )
