"""Contract of the model adapters.

An adapter describes one family of models: the attention layers, the denoiser calls and the text sequences. The page
docs/developing/adding-a-family.md describes how to write an adapter.
"""

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
from elakit.numbering import number_of
from elakit.pipeline import Pipeline, SupportedPipeline
from elakit.tokens import TextSequence

Place = Literal["down", "mid", "up", "double", "single", "block"]
Kind = Literal["cross", "joint", "single"]
Grid = Callable[[Sequence[Any], Mapping[str, Any]], tuple[int, int]]
# Next step in the errors of `self_layers`.
WITHOUT_SELF = (
    "Leave out RecordSpec(self_attention=...), or guide with a method that reads no self-attention, such as "
    "elakit.ELA()."
)


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """Value of one argument of a call.

    ``args`` and ``kwargs`` are the positional and keyword arguments of the call. The value is taken from ``args`` at
    ``position`` or, if ``args`` is shorter, from ``kwargs`` by ``name``. The value is None if the call does not
    give the argument.

    Examples
    --------
    >>> argument(("sample", 981), {}, 1, "timestep"), argument((), {"timestep": 981}, 1, "timestep")
    (981, 981)
    """
    return args[position] if len(args) > position else kwargs.get(name)


def running(pipe: Pipeline) -> Mapping[str, Any]:
    """Local variables of a pipeline's ``__call__`` while it runs; empty at any other time.

    The variables are read from the call stack and never changed. Some facts are found only there: whether PixArt uses
    classifier-free guidance, and which denoiser call of FLUX is for the negative prompt.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def is_a(value: Any, *names: str) -> bool:
    """True if an object's class or any base class has one of the given names.

    With names, families of models are distinguished without an import of diffusers' model classes. A class that is
    missing from an older release of diffusers causes no error.

    Examples
    --------
    >>> is_a(torch.nn.Linear(1, 1), "Module"), is_a(torch.nn.Linear(1, 1), "Conv2d")
    (True, False)
    """
    return any(kind.__name__ in names for kind in type(value).__mro__)


@torch.no_grad()
def decoded(pipe: SupportedPipeline, latents: torch.Tensor) -> list[Image.Image]:
    """Images decoded from latents, (n, c, h, w), as most pipelines decode them at the end of a run."""
    vae, config = pipe.vae, pipe.vae.config
    mean, spread = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        latents = latents * latents.new_tensor(spread).view(shape) / config.scaling_factor
        latents = latents + latents.new_tensor(mean).view(shape)
    else:
        latents = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
    precision = vae.dtype
    # Activations of Stable Diffusion XL's autoencoder overflow in half precision.
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


@torch.no_grad()
def encoded(pipe: SupportedPipeline, image: Image.Image) -> torch.Tensor:
    """Encode an image as latents, (1, c, h, w).

    `decoded` turns the latents into the same image again, up to the error of the autoencoder.
    """
    vae, config = pipe.vae, pipe.vae.config
    pixels = pipe.image_processor.preprocess(image.convert("RGB"))
    precision = vae.dtype
    # Activations of Stable Diffusion XL's autoencoder overflow in half precision.
    upcast = precision == torch.float16 and getattr(config, "force_upcast", False)
    if upcast:
        vae.to(torch.float32)
    try:
        found = vae.encode(pixels.to(vae.device, vae.dtype))
    finally:
        if upcast:
            vae.to(precision)
    direct = next((getattr(found, name) for name in ("latents", "latent") if hasattr(found, name)), None)
    latents: torch.Tensor = found.latent_dist.mode() if direct is None else direct
    mean, spread = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
    if mean is not None and spread is not None:
        shape = (1, -1, 1, 1)
        latents = latents - latents.new_tensor(mean).view(shape)
        return latents * config.scaling_factor / latents.new_tensor(spread).view(shape)
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def call_default(pipe: Pipeline, name: str) -> Any:
    """Default of an argument of a pipeline's ``__call__``.

    If the argument has no default, ``inspect.Parameter.empty`` is returned. If the call has no such argument, a
    ``KeyError`` is raised.
    """
    return inspect.signature(type(pipe).__call__).parameters[name].default


def decoder_side(places: Iterable[str]) -> str:
    """Pattern for `select_layers`: "up", the decoder of a U-Net, or "all", every layer of a transformer.

    ``places`` has the `AttentionLayer.place` of each layer of the model. A transformer has no decoder.

    Examples
    --------
    >>> decoder_side(["down", "mid", "up"])
    'up'
    >>> decoder_side(["double", "single"])
    'all'
    """
    return "up" if {"down", "mid", "up"} & set(places) else "all"


def stacked_rows(pipe: Pipeline, batch: int, guided: bool) -> slice:
    """Slice of the conditional rows, those that see the prompt, in a batch that diffusers stacks from several parts.

    The order of the parts is ``[unconditional..., conditional..., perturbed...]``. All parts have the same number of
    rows. The unconditional part exists only if ``guided`` is True. The perturbed part exists only if the pipeline uses
    perturbed-attention guidance. ``batch`` is the number of rows of all parts together.

    Raises
    ------
    ModelError
        Raised when ``batch`` is not a multiple of the number of parts.

    Examples
    --------
    Three unconditional rows are followed by three conditional rows:

    >>> stacked_rows(None, 6, guided=True)
    slice(3, 6, None)
    """
    parts = 1 + guided + bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if batch % parts:
        raise ModelError(
            f"The denoiser was called with a batch of {number_of(batch, 'row')}, but {type(pipe).__name__} stacks "
            f"{parts} passes in each batch. The number of rows must be a multiple of {parts}. If your own code makes "
            "this call, make it inside `with elakit.attention.paused(pipe):`. Otherwise report this error."
        )
    images = batch // parts
    return slice(guided * images, (guided + 1) * images)


def scheduler_timestep(pipe: SupportedPipeline, wanted: float) -> float:
    """Find the scheduler's timestep that is nearest to ``wanted``.

    ``wanted`` is a timestep that was rounded to the model's precision, so it can differ from all timesteps of the
    scheduler. If the scheduler has no timesteps yet, ``wanted`` is returned unchanged.

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


class Remediable(str):
    """Reason why a pipeline is refused, with advice on how to turn the pipeline into a supported one.

    If there is such a reason, the `ModelError` for the pipeline shows this reason alone.
    """


class OtherKind(str):
    """Reason why a family refuses a pipeline of an entirely different kind, such as "it has no U-Net".

    The `ModelError` for the pipeline shows such reasons only if the reasons of all families are of this class.
    """


def modular(pipe: Pipeline) -> str | None:
    """Reason why a modular pipeline is refused; None for other pipelines."""
    if not is_a(pipe, "ModularPipeline"):
        return None
    return Remediable(
        "it is a modular pipeline, whose guiders and blocks elakit does not read; load the standard pipeline of the "
        "same model with `elakit.load`"
    )


def compiled(module: Any, path: str) -> str | None:
    """Reason why a denoiser compiled with torch.compile is refused; None if the denoiser is not compiled.

    In a compiled denoiser, hooks would split the graph or not run at all, and the image would change. ``path`` is the
    Python expression with which the message names the denoiser, such as ``"pipe.unet"``.
    """
    name = path.rpartition(".")[2]
    if hasattr(module, "_orig_mod"):
        return Remediable(
            f"its {name} was wrapped by torch.compile, inside which attention cannot be read without changing the "
            f"image; use the original module, `{path} = {path}._orig_mod`, for recording and guidance"
        )
    parts = list(module.named_modules()) if isinstance(module, nn.Module) else []
    for part_name, part in parts:
        if hasattr(vars(part).get("forward"), "_torchdynamo_orig_callable"):
            owner = f"{path}.{part_name}" if part_name else path
            return Remediable(
                f"the forward method of {owner} was wrapped by torch.compile, inside which attention cannot be read "
                f"without changing the image; set the original one back, for example with `del {owner}.forward`"
            )
    inside = next((part_name for part_name, part in parts if _is_compiled(part)), None)
    if inside is None:
        return None
    return Remediable(
        f"its {name} was compiled in place ({inside or 'as a whole'}), inside which attention cannot be read without "
        "changing the image; load the pipeline again without compiling it, or undo it with "
        f"`for part in {path}.modules(): part._compiled_call_impl = None`"
    )


def _is_compiled(part: nn.Module) -> bool:
    return getattr(part, "_compiled_call_impl", None) is not None


def image_grid(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of the input of a U-Net block, the tensor ``hidden_states`` (B, C, height, width).

    ``args`` and ``kwargs`` are the arguments with which the block is called.
    """
    image = argument(args, kwargs, 0, "hidden_states")
    return image.shape[-2], image.shape[-1]


@dataclass(frozen=True)
class Layout:
    """Positions of image and text in one attention call.

    A layer needs a layout if its attention is read at the attention call, and not by hooks on its projections.

    Attributes
    ----------
    size : tuple of int
        (h, w) of the layer's maps.
    image : int
        Position of the first image location among the queries.
    text : tuple of int
        Position of the first text token among the keys, and the number of text tokens.
    frames : int
        Number of maps that follow each other in the sequence: 1 for an image, the number of frames for a video.
    """

    size: tuple[int, int]
    image: int
    text: tuple[int, int]
    frames: int = 1


LayoutOf = Callable[[Sequence[Any], Mapping[str, Any]], Layout]


@dataclass(frozen=True)
class AttentionLayer:
    """One layer of the denoiser in which the locations of the image attend to the text, or to each other.

    Attributes
    ----------
    name : str
        Path of the attention module in the denoiser, such as
        ``"up_blocks.1.attentions.0.transformer_blocks.0.attn2"``.
    place : {"down", "mid", "up"} or {"double", "single"} or {"block"}
        Part of the denoiser that contains the layer. In a U-Net: "down", "mid" or "up". In a transformer with joint
        attention: "double" (double-stream block) or "single" (single-stream block). In a transformer with
        cross-attention: "block".
    heads : int
        Number of attention heads.
    module : torch.nn.Module
        Attention module, whose query and key projections are read.
    block : torch.nn.Module
        Module whose arguments give the size of the layer's maps. In a U-Net, this is the block that contains the layer
        and receives ``hidden_states``, (B, C, h, w). In a transformer, this is the whole denoiser.
    factor : int
        Side of the latent divided by the side of this layer's maps.
    kind : {"cross", "joint", "single"}
        Keys of the layer. "cross": the text alone. "joint": image and text, which have separate projections. "single":
        image and text as one sequence, with common projections.
    text_first : bool
        True if the text precedes the image in the sequence of keys. This has a meaning only if ``kind`` is "joint" or
        "single".
    takes_mask : bool
        True if the attention processor applies an ``attention_mask``. `elakit.attention.edit` then passes the bias of
        the attention scores as this mask. If False, `edit` adds the bias at the attention call.
    reads : {"text", "image"}
        Keys whose attention is read: the text, or the image's own locations (self-attention).
    grid : callable
        Function that returns the size (h, w) of the layer's maps. It is called as ``grid(args, kwargs)`` with the
        arguments of ``block``.
    layout : callable, optional
        Function that returns a `Layout`. It is called as ``layout(args, kwargs)`` with the arguments of ``block``. A
        layer with this function is read and edited where it calls `torch.nn.functional.scaled_dot_product_attention`.
        A layer without this function is read by hooks on its projections. The hooks miss some operations between
        projection and softmax; a layer with such operations needs a ``layout``. With a ``layout``, ``takes_mask`` must
        be False.
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
    """Properties of one denoiser call, read from the arguments of the call before the denoiser runs.

    Attributes
    ----------
    batch : int
        Number of rows of the batch.
    timestep : float
        The scheduler's timestep, which may differ from the number that the model receives.
    latent : tuple of int
        (h, w) of the latent before it is divided into patches. The sides of a layer's maps are these sides divided
        by the layer's ``factor``.
    conditional : bool
        False if the call is neither recorded nor counted. This holds for a call without the prompt (FLUX's negative
        prompt), and for a call of a reduced network (skip-layer guidance of Stable Diffusion 3).
    frames : int
        Number of frames for which a layer has maps, if the model generates videos; 0 for images.
    """

    batch: int
    timestep: float
    latent: tuple[int, int]
    conditional: bool = True
    frames: int = 0


@dataclass(frozen=True)
class Conditioning:
    """A prompt in the form that a pipeline's call and its denoiser take.

    Attributes
    ----------
    call : dict
        Arguments of the pipeline's ``__call__`` for one image: the encoded prompt and negative prompt, and further
        arguments that the family needs.
    inputs : dict
        Arguments of the denoiser for one conditional row: tensors, lists with one tensor per row, or dicts of these.
    shared : dict
        Arguments of the denoiser that all rows have in common (FLUX's positions).
    """

    call: dict[str, Any]
    inputs: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)

    def arguments(self, images: int) -> dict[str, Any]:
        """Arguments of the pipeline's call for a batch of ``images`` images, with text states repeated.

        Examples
        --------
        >>> arguments = Conditioning({"prompt_embeds": torch.ones(1, 2, 3), "negative_prompt": None}, {}).arguments(4)
        >>> arguments["prompt_embeds"].shape, arguments["negative_prompt"]
        (torch.Size([4, 2, 3]), None)
        """

        def repeated(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return torch.cat([value] * images)
            return value * images if isinstance(value, list) else value

        return {name: repeated(value) for name, value in self.call.items()}

    def rows(self, count: int, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of the denoiser for a batch of ``count`` rows.

        The tensors in `inputs` are repeated for each row. Floating-point tensors among them are converted to ``dtype``.
        The arguments in `shared` are added unchanged.

        Examples
        --------
        >>> rows = Conditioning({}, {"states": torch.ones(1, 2)}, {"ids": torch.zeros(3)}).rows(4, torch.float64)
        >>> rows["states"].shape, rows["states"].dtype, rows["ids"].shape
        (torch.Size([4, 2]), torch.float64, torch.Size([3]))
        """

        def spread(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: spread(part) for name, part in value.items()}
            if isinstance(value, list):
                return [part.to(dtype) for part in value] * count
            if not isinstance(value, torch.Tensor):
                return value
            value = value.to(dtype) if value.is_floating_point() else value
            return value.expand(count, *value.shape[1:])

        return {name: spread(value) for name, value in self.inputs.items()} | self.shared


class Adapter(Protocol):
    """Protocol of the adapters. An adapter reads and runs a pipeline of one family of models.

    Each family has an adapter class in a file of its own.

    Attributes
    ----------
    family : str
        Name of the family in error messages.
    scale_argument : str
        Name of the argument of the pipeline's call that sets the guidance scale.
    pipe : diffusers.DiffusionPipeline
        The pipeline that the adapter reads and runs.
    denoiser : torch.nn.Module
        The U-Net or transformer of the pipeline.
    """

    family: ClassVar[str]
    scale_argument: ClassVar[str]
    denoiser: nn.Module

    def __init__(self, pipe: Pipeline) -> None:
        """Create the adapter of a pipeline; raise a `ModelError` if `refusal` returns a reason."""

    @property
    def pipe(self) -> SupportedPipeline:
        """The pipeline that the adapter reads and runs.

        The type `SupportedPipeline` declares the members that pipelines of all families have. If an adapter uses
        further members, it annotates this property with a subclass of `SupportedPipeline` that declares them.
        """

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why this family does not support a pipeline; None if the pipeline is supported."""

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """Reason why this family does not support a model; None if the model is supported.

        ``index`` is the content of the model's ``model_index.json``. This file alone decides, so that a model can be
        refused before its weights are downloaded.
        """

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""

    @property
    def encodes(self) -> bool:
        """True if the adapter can encode prompts.

        If False, a call of the pipeline can still be recorded (`elakit.record`) and edited (`elakit.attention.edit`).
        Everything that needs `encode` is then refused: `elakit.generate`, guidance, `elakit.attention.record_image`
        and `elakit.attention.map_concepts`.
        """

    def is_current(self) -> bool:
        """True if the pipeline still has the denoiser of this adapter, and that denoiser is not compiled."""

    def layers(self) -> tuple[AttentionLayer, ...]:
        """Layers in which the image attends to the text, in forward order."""

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a denoiser call, found from the arguments of the call."""

    def conditional_rows(self, batch: int) -> slice:
        """Slice of the rows that see the prompt, in a denoiser call with ``batch`` rows.

        The slice may differ between the calls of one run.
        """

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent, before it is divided into patches, for an image of a given size in pixels."""

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""

    def text_length(self) -> int:
        """Number of text positions that the denoiser sees, including start-of-text, end-of-text and padding."""

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequences that the denoiser sees, in the order in which it sees them."""

    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Encode a prompt as the pipeline does.

        ``text`` is the prompt, and ``negative`` the negative prompt. ``guided`` is True if classifier-free guidance is
        used; only then does the result contain the negative prompt. FLUX.1, distilled FLUX.2 models and Z-Image ignore
        ``guided``. ``size`` is the (height, width) of the image in pixels; None stands for the result of
        `default_size`. ``guidance_scale`` is used only by Z-Image and by models that receive the scale as an input;
        None stands for the default of the pipeline's call.
        """

    def denoise(
        self, latents: torch.Tensor, timestep: torch.Tensor | float | int, conditioning: Conditioning
    ) -> torch.Tensor:
        """Output of the denoiser for latents, in one pass that sees the prompt.

        ``latents`` have any number of rows, are in the pipeline's format, and were already scaled by the scheduler
        (``scale_model_input``). ``timestep`` is the scheduler's; the adapter converts it to the number that the model
        receives.
        """

    def self_layers(self, beside: Sequence[AttentionLayer]) -> tuple[AttentionLayer, ...]:
        """Self-attention layers, one for each of the given layers.

        ``beside`` contains layers that `layers` returns. For a cross-attention layer, the result contains the
        self-attention layer of the same block. For a layer with joint attention, it contains the layer itself with
        ``reads="image"``. Raise a `ModelError` if there is no such self-attention.
        """

    def noise(self, generator: torch.Generator, height: int, width: int) -> torch.Tensor:
        """Initial noise of unit variance for one image, in the form in which the pipeline takes ``latents``.

        ``height`` and ``width`` are those of the image in pixels.
        """

    def set_timesteps(self, steps: int, height: int, width: int) -> float:
        """Set the scheduler's timesteps as the pipeline's call does, and return the scale of the initial noise.

        ``height`` and ``width`` are those of the image in pixels. The first latents of a run are the result of `noise`
        times the returned scale.
        """

    def decode(self, latents: torch.Tensor, height: int, width: int) -> list[Image.Image]:
        """Images decoded from latents in the pipeline's format.

        The latents may come from any step of a run. ``height`` and ``width`` are those of the images in pixels.
        """

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode one image as latents, in the form in which `noise` returns the initial noise.

        `decode` turns the latents into the same image again, up to the error of the autoencoder.
        """

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments that make the pipeline's call replace the latents by ``move(step, latents)`` after each step.

        ``step`` is the index of the completed step, counted from 0 along the scheduler's timesteps.
        """
