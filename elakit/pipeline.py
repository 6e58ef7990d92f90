"""Types of the objects that elakit accepts as a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Pipeline(Protocol):
    """A diffusers pipeline of any supported family, as elakit's functions accept it.

    This type declares only what diffusers declares for every pipeline, so that type checkers accept the pipelines of
    diffusers. The classes of pipelines do not declare their components (``unet`` or ``transformer``, text encoders,
    ``vae``, ``scheduler``), which are set when a pipeline is created. Adapters use the components through
    `SupportedPipeline` and its subclasses.

    Examples
    --------
    >>> def describe(pipe: Pipeline) -> str:
    ...     return f"{type(pipe).__name__} on {pipe.device}"
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate images."""

    @property
    def config(self) -> Any:
        """Configuration: classes of the components, and values that the pipeline was created with."""

    @property
    def device(self) -> torch.device:
        """Device of the weights."""

    def set_progress_bar_config(self, **kwargs: Any) -> Any:
        """Configure the progress bar of a call."""

    def maybe_free_model_hooks(self) -> Any:
        """Move components back to the CPU after a call, if they are offloaded."""


class SupportedPipeline(Pipeline, Protocol):
    """A pipeline that an adapter supports: components and methods that all families have."""

    scheduler: Any
    vae: Any
    tokenizer: Any
    image_processor: Any
    vae_scale_factor: int

    @property
    def _execution_device(self) -> torch.device:
        """Device on which a call computes; that of the weights, unless they are offloaded."""

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """Text states of a prompt, in the format of the model family."""


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
    """Any object with a CLIP tokenizer; this is all that `elakit.parse` needs, because parsing runs no model."""

    tokenizer: Any
