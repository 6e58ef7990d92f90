"""Types of the objects that elakit accepts as a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Pipeline(Protocol):
    """Type of the argument ``pipe`` of elakit's functions: a diffusers pipeline of any supported family.

    This type declares only attributes and methods that diffusers declares for every pipeline. Type checkers therefore
    accept every diffusers pipeline as a `Pipeline`. Components such as ``unet``, ``vae`` and ``scheduler`` are not
    declared here, because diffusers does not declare them. Adapters use these components through `SupportedPipeline`
    and its subclasses.

    Examples
    --------
    >>> def describe(pipe: Pipeline) -> str:
    ...     return f"{type(pipe).__name__} on {pipe.device}"
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images."""

    @property
    def config(self) -> Any:
        """Configuration of the pipeline: the classes of its components, and other arguments of its constructor."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    def set_progress_bar_config(self, **kwargs: Any) -> Any:
        """Configure the progress bar of a call."""

    def maybe_free_model_hooks(self) -> Any:
        """Move the components back to the CPU after a call, if the pipeline uses CPU offloading."""


class SupportedPipeline(Pipeline, Protocol):
    """Type of a pipeline that an adapter supports, with the components and methods that all model families have."""

    scheduler: Any
    vae: Any
    tokenizer: Any
    image_processor: Any
    vae_scale_factor: int

    @property
    def _execution_device(self) -> torch.device:
        """Device on which a call computes, even while the weights are offloaded to another device."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Encode a prompt; the format of the result depends on the model family."""


class UNetPipeline(SupportedPipeline, Protocol):
    """A pipeline that denoises with a U-Net."""

    unet: Any

    def get_guidance_scale_embedding(self, *args: Any, **kwargs: Any) -> Any:
        """Embedding of the guidance scale, which a guidance-distilled U-Net takes as an input."""


class TransformerPipeline(SupportedPipeline, Protocol):
    """A pipeline that denoises with a transformer."""

    transformer: Any


class PackedPipeline(TransformerPipeline, Protocol):
    """A pipeline that packs each 2x2 patch of its latents into one token of the transformer."""

    default_sample_size: int

    def _pack_latents(self, *args: Any) -> torch.Tensor:
        """Pack latents, (n, c, h, w), into patches, (n, patches, 4c)."""

    def _unpack_latents(self, *args: Any) -> torch.Tensor:
        """Unpack patches into latents; the inverse of `_pack_latents`."""


class HasTokenizer(Protocol):
    """Type of an object whose attribute ``tokenizer`` is a CLIP tokenizer.

    `elakit.parse` accepts such an object instead of a pipeline, because parsing runs no model.
    """

    tokenizer: Any
