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
    """Argument of a call that is given by position or by name; None if it is not given.

    Examples
    --------
    >>> argument(("sample", 981), {}, 1, "timestep"), argument((), {"timestep": 981}, 1, "timestep")
    (981, 981)
    """
    return args[position] if len(args) > position else kwargs.get(name)


def running(pipe: Pipeline) -> Mapping[str, Any]:
    """Local variables of a pipeline's ``__call__`` from which this function is called; empty outside such a call.

    Some facts are found nowhere else, such as whether PixArt uses classifier-free guidance, and which pass of FLUX
    belongs to the negative prompt. The variables are read, never changed.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "__call__" and frame.f_locals.get("self") is pipe:
            return frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]
    return {}


def is_a(value: Any, *names: str) -> bool:
    """True if the class of an object, or one of its bases, has one of the names.

    Families are distinguished by the names of diffusers' classes, so that no model class has to be imported, and a
    class that an older release of diffusers lacks causes no error.

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
    """Latents of an image, (1, c, h, w); `decoded` returns the image, up to the autoencoder's error."""
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
    """Pattern for `select_layers` that selects the decoder of a model, given its `AttentionLayer.place` values.

    It is "up" for a U-Net and "all" for a transformer, which has no decoder.

    Examples
    --------
    >>> decoder_side(["down", "mid", "up"])
    'up'
    >>> decoder_side(["double", "single"])
    'all'
    """
    return "up" if {"down", "mid", "up"} & set(places) else "all"


def stacked_rows(pipe: Pipeline, batch: int, guided: bool) -> slice:
    """Conditional rows of a batch that diffusers stacks as ``[unconditional..., conditional..., perturbed...]``.

    The perturbed part exists with perturbed-attention guidance only, the unconditional part only if ``guided`` is True.
    All parts have the same number of rows.

    Raises
    ------
    ModelError
        Raised when the batch cannot be divided into those parts.

    Examples
    --------
    >>> stacked_rows(None, 6, guided=True)
    slice(3, 6, None)
    """
    parts = 1 + guided + bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    if batch % parts:
        raise ModelError(
            f"The denoiser was called with {number_of(batch, 'row')}, but {type(pipe).__name__} stacks {parts} passes "
            f"in one batch at its current guidance scale, so the number of rows must be a multiple of {parts}. If your "
            "own code makes this call, make it inside `with elakit.attention.paused(pipe):`; otherwise report this "
            "error."
        )
    images = batch // parts
    return slice(guided * images, (guided + 1) * images)


def scheduler_timestep(pipe: SupportedPipeline, wanted: float) -> float:
    """Timestep of the scheduler that is nearest to ``wanted``.

    ``wanted`` is a timestep of the scheduler after rounding to the model's precision. It is returned unchanged if the
    scheduler has no timesteps yet.

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
    """Text of the reason why a pipeline is refused, which states how to turn the pipeline into a supported one.

    The `ModelError` for the pipeline shows this reason and no other.
    """


class OtherKind(str):
    """Text of the reason why a family refuses a pipeline of another kind, such as "it has no U-Net".

    The `ModelError` for the pipeline shows such reasons only if no family has a reason that is not an `OtherKind`.
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
    """Reason why a denoiser under torch.compile is refused; None if it is not compiled.

    Hooks would split the compiled graph or not run at all, and the image would not be that of the compiled run.
    ``path`` is the expression for the denoiser in the message, such as ``"pipe.unet"``.
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
    """(height, width) of ``hidden_states``, a tensor (B, C, height, width), in the arguments of a U-Net block."""
    image = argument(args, kwargs, 0, "hidden_states")
    return image.shape[-2], image.shape[-1]


@dataclass(frozen=True)
class Layout:
    """Positions of image and text in an attention call, for layers that are read at this call.

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
        Part of a U-Net that contains the layer; kind of block (double- or single-stream) in joint attention; "block"
        in a transformer with cross-attention.
    heads : int
        Number of attention heads.
    module : torch.nn.Module
        Attention module, whose query and key projections are read.
    block : torch.nn.Module
        Module that contains the attention module, and whose arguments give the size of the layer's maps: in a U-Net the
        block whose input is the image, (B, C, h, w); in a transformer the whole denoiser.
    factor : int
        Side of the latent divided by the side of this layer's maps.
    kind : {"cross", "joint", "single"}
        "cross": the keys are the text alone. "joint": the keys are image and text, each with projections of its own.
        "single": the keys are image and text as one sequence, with projections in common.
    text_first : bool
        With "joint" and "single", whether the text precedes the image in the sequence of keys.
    takes_mask : bool
        Whether the attention processor applies an ``attention_mask``. `elakit.attention.edit` adds a bias to the
        attention scores: if True, by passing the bias as this mask; if False, at the attention call.
    reads : {"text", "image"}
        Keys whose attention is read: the text, or the image's own locations (self-attention).
    grid : callable
        Function that is called with the arguments of ``block``, ``grid(args, kwargs)``, and returns the size (h, w) of
        the layer's maps.
    layout : callable, optional
        Function that is called with the arguments of ``block``, ``layout(args, kwargs)``, and returns a `Layout`. A
        layer with a ``layout`` is read and biased where it calls `torch.nn.functional.scaled_dot_product_attention`,
        not by hooks on its projections. Layers that do more between projection and softmax than the hooks can read
        need a ``layout``. A ``layout`` requires ``takes_mask=False``.
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
    """One call of the denoiser, read from its arguments before it runs.

    Attributes
    ----------
    batch : int
        Number of rows of the batch.
    timestep : float
        The scheduler's timestep, which may differ from the number that the model receives.
    latent : tuple of int
        (h, w) of the latent before it is divided into patches. The maps of a layer have 1/``factor`` of these sides.
    conditional : bool
        False for a pass of the pipeline that does not see the prompt (FLUX's negative prompt), or that sees it through
        a reduced network (skip-layer guidance of Stable Diffusion 3). Such a call is neither recorded nor counted.
    frames : int
        In a video, the number of frames for which a layer has maps. It is 0 for images (`Layout.frames` is then 1).
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
        """Arguments of the denoiser for a batch of ``count`` rows, with floating-point tensors converted to ``dtype``.

        The arguments in `shared` are neither repeated nor converted.

        Examples
        --------
        >>> Conditioning({}, {"states": torch.ones(1, 2), "more": {"ids": torch.ones(1, 3)}}).rows(4, torch.float64)
        {'states': tensor([[1., 1.],...dtype=torch.float64), 'more': {'ids': tensor(...)}}
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
    """Description of a family of models: its layers, its text, and how it is run. Each family has a file of its own.

    Attributes
    ----------
    family : str
        Name of the family in error messages.
    scale_argument : str
        Name of the guidance scale in the pipeline's call.
    pipe : diffusers.DiffusionPipeline
        The pipeline that the adapter reads and runs.
    denoiser : torch.nn.Module
        The U-Net or transformer of the pipeline.
    """

    family: ClassVar[str]
    scale_argument: ClassVar[str]
    denoiser: nn.Module

    def __init__(self, pipe: Pipeline) -> None:
        """Adapt a pipeline; raise a `ModelError` if `refusal` returns a reason."""

    @property
    def pipe(self) -> SupportedPipeline:
        """The pipeline.

        An adapter that uses members of its pipeline that `SupportedPipeline` lacks annotates this property with a
        subclass of `SupportedPipeline` that has these members.
        """

    @classmethod
    def refusal(cls, pipe: Pipeline) -> str | None:
        """Reason why a pipeline is not of this family; None if it is."""

    @classmethod
    def refusal_of_index(cls, index: Mapping[str, Any]) -> str | None:
        """Same as `refusal`, from a ``model_index.json``, which is read before any weight is downloaded."""

    @property
    def image_optional(self) -> bool:
        """True if the pipeline's call takes an image, but also generates from text alone."""

    @property
    def encodes(self) -> bool:
        """True if the adapter can encode prompts.

        Otherwise calls of the pipeline can be recorded (`elakit.record`) and edited (`elakit.attention.edit`), but
        everything that needs `encode` is refused: `elakit.generate`, guidance, `elakit.attention.record_image` and
        `elakit.attention.map_concepts`.
        """

    def is_current(self) -> bool:
        """True if the pipeline has not changed since it was adapted: same denoiser, not compiled."""

    def layers(self) -> tuple[AttentionLayer, ...]:
        """Layers in which the image attends to the text, in forward order."""

    def read_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Batch size, timestep and latent size of a call of the denoiser, from its arguments."""

    def conditional_rows(self, batch: int) -> slice:
        """Rows of a batch of the denoiser that see the prompt; they may differ between the calls of one run."""

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the latent, before it is divided into patches, for an image of a given size in pixels."""

    def default_size(self) -> tuple[int, int]:
        """Default height and width of an image, in pixels."""

    def text_length(self) -> int:
        """Number of text positions that the denoiser sees, including start-of-text, end-of-text and padding."""

    def text(self) -> tuple[TextSequence, ...]:
        """Token sequences that the denoiser sees, in their order, with the first position of each."""

    def encode(
        self,
        text: str,
        negative: str | None = None,
        guided: bool = True,
        size: tuple[int, int] | None = None,
        guidance_scale: float | None = None,
    ) -> Conditioning:
        """Encode a prompt as the pipeline does.

        ``text`` is the prompt, and ``negative`` the negative prompt. ``guided`` states whether the result contains the
        negative prompt, for classifier-free guidance. FLUX.1, distilled FLUX.2 models and Z-Image ignore ``guided``.
        ``size`` is the (height, width) of the image in pixels, by default the model's. ``guidance_scale``, by default
        that of the pipeline's call, matters only to models that receive it as an input, and to Z-Image.
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
        """Images decoded from latents in the pipeline's format, which may be those of an unfinished run.

        ``height`` and ``width`` are those of the images in pixels.
        """

    def encode_image(self, image: Image.Image) -> torch.Tensor:
        """Encode an image as latents in the form of `noise`, with batch size 1.

        From these latents, `decode` returns the image up to the autoencoder's error.
        """

    def on_step(self, move: Callable[[int, torch.Tensor], torch.Tensor]) -> dict[str, Any]:
        """Arguments that make the pipeline's call replace the latents by ``move(step, latents)`` after each step.

        ``step`` is the index, among the scheduler's timesteps, of the step that has ended.
        """
