"""Contract of the model adapters: layers, denoiser calls and text sequences (docs/developing/adding-a-family.md)."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import torch
from PIL import Image
from torch import nn

from elakit.errors import ModelError
from elakit.tokens import TextSequence

Place = Literal["down", "mid", "up", "double", "single", "block"]
Kind = Literal["cross", "joint", "single"]
Grid = Callable[[Sequence[Any], Mapping[str, Any]], tuple[int, int]]


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a call, given by position or by name; None when it was not given.

    Examples
    --------
    >>> argument(("sample", 981), {}, 1, "timestep"), argument((), {"timestep": 981}, 1, "timestep")
    (981, 981)
    """
    return args[position] if len(args) > position else kwargs.get(name)


def running(pipe: Any) -> Mapping[str, Any]:
    """Local variables of the ``__call__`` of a pipeline that is running now; empty when it is not.

    For what a pipeline keeps to itself: PixArt does not say otherwise whether it guides, nor FLUX which pass is the
    negative one. They are read, never changed.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


@torch.no_grad()
def decoded(pipe: Any, latents: torch.Tensor) -> list[Image.Image]:
    """Images of latents, (n, c, h, w), as the pipelines of all families decode theirs at the end."""
    vae, config = pipe.vae, pipe.vae.config
    mean, spread = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(spread).view(shape) / config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    precision = vae.dtype
    # what the autoencoder of Stable Diffusion XL computes in half precision overflows
    upcast = precision == torch.float16 and getattr(config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        pixels = vae.decode(latents.to(vae.device, vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(precision)
    images: list[Image.Image] = pipe.image_processor.postprocess(pixels.detach(), output_type="pil")
    return images


def call_default(pipe: Any, name: str) -> Any:
    """What a pipeline's ``__call__`` takes where an argument is not given."""
    return inspect.signature(type(pipe).__call__).parameters[name].default


def decoder_side(places: Iterable[str]) -> str:
    """Layers in which the image takes shape, as `select_layers` takes them, of a model whose layers are so placed.

    Examples
    --------
    >>> decoder_side(["down", "mid", "up"])
    'up'
    >>> decoder_side(["double", "single"])  # a transformer has no sides
    'all'
    """
    return "up" if {"down", "mid", "up"} & set(places) else "all"


def stacked_rows(pipe: Any, batch: int, guided: bool) -> slice:
    """Rows that see the prompt in ``[unconditional..., conditional..., perturbed...]``, as diffusers stacks a batch.

    The last part is there with perturbed-attention guidance only, the first when ``guided``.

    Raises
    ------
    ModelError
        When the batch does not divide into those parts.

    Examples
    --------
    >>> stacked_rows(None, 6, guided=True)
    slice(3, 6, None)
    """
    parts = 1 + guided + bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if batch % parts:
        raise ModelError(
            f"The denoiser was called with {batch} rows, but {type(pipe).__name__} guides now with {parts} "
            "passes stacked in one batch. Calls of your own go inside `elakit.attention.paused(pipe)`."
        )
    images = batch // parts
    return slice(guided * images, (guided + 1) * images)


def scheduler_timestep(pipe: Any, wanted: float) -> float:
    """The scheduler's own timestep nearest to a number that has been through the model's precision.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> scheduler_timestep(SimpleNamespace(scheduler=SimpleNamespace(timesteps=torch.tensor([999.0, 666.7]))), 668.0)
    666.70...
    """
    known = getattr(pipe.scheduler, "timesteps", None)
    if known is None or len(known) == 0:
        return wanted
    return min(known.tolist(), key=lambda one: abs(one - wanted))


class OtherKind(str):
    """A refusal that only says that the pipeline is of quite another kind: not worth telling beside a nearer one."""


def compiled(module: Any, path: str) -> str | None:
    """Why a denoiser under torch.compile is refused; None when it is not compiled.

    Hooks would split its graph, or not be seen at all, and the image would not be that of the compiled run.
    """
    if hasattr(module, "_orig_mod"):
        return (
            f"its {path.rpartition('.')[2]} was wrapped by torch.compile, inside which attention cannot be read "
            f"without changing the image; use the plain one, `{path} = {path}._orig_mod`, for recording and guidance"
        )
    parts = list(module.named_modules()) if isinstance(module, nn.Module) else []
    for name, part in parts:
        if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            owner = f"{path}.{name}" if name else path
            return (
                f"the forward method of {owner} was wrapped by torch.compile, inside which attention cannot be read "
                f"without changing the image; set the original one back, for example with `del {owner}.forward`"
            )
    inside = next((name for name, part in parts if getattr(part, "_compiled_call_impl", None) is not None), None)
    if inside is None:
        return None
    return (
        f"its {path.rpartition('.')[2]} was compiled in place ({inside or 'as a whole'}), inside which attention "
        "cannot be read without changing the image; load the pipeline again without `compile()`, or take it back "
        f"with `for part in {path}.modules(): part._compiled_call_impl = None`"
    )


def image_grid(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and columns of a block whose input is an image, (B, C, h, w)."""
    image = argument(args, kwargs, 0, "hidden_states")
    return image.shape[-2], image.shape[-1]


@dataclass(frozen=True)
class Layout:
    """Where image and text stand in an attention call that is read as it is made.

    Attributes
    ----------
    size : tuple of int
        (h, w) of the layer's maps.
    image : int
        Position of the first image location among the queries.
    text : tuple of int
        Position of the first text token among the keys, and the number of text tokens.
    """

    size: tuple[int, int]
    image: int
    text: tuple[int, int]


LayoutOf = Callable[[Sequence[Any], Mapping[str, Any]], Layout]


@dataclass(frozen=True)
class AttentionLayer:
    """One layer of the denoiser in which image positions attend to the text.

    Attributes
    ----------
    name : str
        Path of the attention module in the denoiser, such as
        ``"up_blocks.1.attentions.0.transformer_blocks.0.attn2"``.
    place : {"down", "mid", "up"} or {"double", "single"} or {"block"}
        Side of a UNet; kind of block of an MM-DiT; "block" where all blocks are alike (PixArt).
    heads : int
        Attention heads.
    module : torch.nn.Module
        The attention module; its projections of queries and keys are what recording reads.
    block : torch.nn.Module
        The module around it whose call tells the size of the layer's maps: the block whose input is the image,
        (B, C, h, w), in a UNet; the whole denoiser in a transformer.
    factor : int
        Side of the latent divided by the side of this layer's maps.
    kind : {"cross", "joint", "single"}
        Whether keys are the text alone; image and text, each with projections of its own; or image and text in one
        sequence.
    text_first : bool
        Where image and text are keys side by side: whether the text comes first.
    takes_mask : bool
        Whether its processor heeds an ``attention_mask``; `elakit.attention.edit` goes another way where not.
    reads : {"text", "image"}
        Keys whose attention is read: the text, or the image's own locations (self-attention).
    grid : callable
        ``grid(args, kwargs)`` of a call of ``block`` -> (h, w) of this layer's maps.
    layout : callable, optional
        ``layout(args, kwargs)`` of a call of ``block`` -> `Layout`. A layer that has one is read and biased where it
        calls `torch.nn.functional.scaled_dot_product_attention`, not by hooks on its projections: for layers that do
        more between projection and softmax than the hooks know. Give ``takes_mask=False`` with it.
    """

    name: str
    place: Place
    heads: int
    module: nn.Module
    block: nn.Module
    factor: int
    kind: Kind = "cross"
    text_first: bool = False
    takes_mask: bool = True
    reads: Literal["text", "image"] = "text"
    grid: Grid = field(default=image_grid, compare=False, repr=False)
    layout: LayoutOf | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Call:
    """One call of the denoiser, read off its arguments before it runs.

    Attributes
    ----------
    batch : int
        Rows.
    timestep : float
        As the scheduler counts it, whatever the model is given.
    latent : tuple of int
        (h, w) of the latent before it is cut into patches: a layer's ``factor`` divides it.
    conditional : bool
        False for a pass of the pipeline's own that does not see the prompt (FLUX's negative prompt), or sees it
        through a maimed network (skip-layer guidance of Stable Diffusion 3): such a call is neither kept nor counted.
    """

    batch: int
    timestep: float
    latent: tuple[int, int]
    conditional: bool = True


@dataclass(frozen=True)
class Conditioning:
    """A prompt as a pipeline's call and its denoiser want it.

    Attributes
    ----------
    call : dict
        Arguments of the pipeline's ``__call__`` that stand for the prompt and the negative prompt, for one image, and
        what else the family's call must be told.
    inputs : dict
        Arguments of the denoiser for one conditional row; tensors, or dicts of tensors.
    shared : dict
        Arguments of the denoiser that all rows have in common (FLUX's positions).
    """

    call: dict[str, Any]
    inputs: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)

    def arguments(self, images: int) -> dict[str, Any]:
        """The call's arguments for so many images; not every pipeline repeats given states for each by itself.

        Examples
        --------
        >>> arguments = Conditioning({"prompt_embeds": torch.ones(1, 2, 3), "negative_prompt": None}, {}).arguments(4)
        >>> arguments["prompt_embeds"].shape, arguments["negative_prompt"]
        (torch.Size([4, 2, 3]), None)
        """
        return {
            name: torch.cat([value] * images) if isinstance(value, torch.Tensor) else value
            for name, value in self.call.items()
        }

    def rows(self, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """The denoiser's arguments for so many rows, numbers with a point in a precision.

        Examples
        --------
        >>> Conditioning({}, {"states": torch.ones(1, 2), "more": {"ids": torch.ones(1, 3)}}).rows(4, torch.float64)
        {'states': tensor([[1., 1.],...dtype=torch.float64), 'more': {'ids': tensor(...)}}
        """

        def spread(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: spread(part) for name, part in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            value = value.to(dtype) if value.is_floating_point() else value
            return value.expand(count, *value.shape[1:])

        return {name: spread(value) for name, value in self.inputs.items()} | self.shared


class Adapter(Protocol):
    """What elakit asks of a family; one file in elakit/models each."""

    family: ClassVar[str]
    pipe: Any
    denoiser: nn.Module

    def __init__(self, pipe: Any) -> None:
        """Serve a pipeline that `refusal` does not refuse."""

    @classmethod
    def refusal(cls, pipe: Any) -> str | None:
        """Why this family cannot serve a pipeline; None when it can."""

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """As `refusal`, from a ``model_index.json``: known before any weight is fetched."""

    def layers(self) -> tuple[AttentionLayer, ...]:
        """The layers in which the image attends to the text, in the order in which a pass meets them."""

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """What a call of the denoiser is, from its arguments."""

    def conditional_rows(self, batch: int) -> slice:
        """Rows of a denoiser batch that see the prompt; asked anew at each call, while the pipeline runs."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent (before it is cut into patches) of a picture of so many pixels."""

    def default_size(self) -> tuple[int, int]:
        """Height and width in pixels of the image drawn when nothing else is asked."""

    def text_length(self) -> int:
        """Text positions the denoiser sees, start, end and padding included."""

    def text(self) -> tuple[TextSequence, ...]:
        """The token sequences the denoiser sees, in their order, and where each begins."""

    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """What the pipeline makes of a prompt.

        ``guided`` says whether there is a negative part, for classifier-free guidance (FLUX never has one). ``size`` is
        the image's (height, width), by default the model's. ``guidance_scale`` matters to models into which guidance
        is distilled, whose input it is; by default the pipeline's.
        """

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """One conditional pass over n rows of latents, as the pipeline keeps them, scaled by the scheduler.

        ``timestep`` is the scheduler's own number, whatever the model is given.
        """

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """The layers of self-attention that stand before given layers in their blocks; `ModelError` without any."""

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Noise of unit variance that an image starts from, with one row, as the pipeline takes ``latents``."""

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler as the pipeline's call will; how many times the noise its first latents are."""

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images of latents as the pipeline keeps them; of a run's middle too, where they are noisy."""

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments of the pipeline's call that make it pass (step, latents) through ``move`` after each step."""
