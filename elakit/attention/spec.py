"""Selection of the attention that a recording keeps, and the size of the recording in bytes, known before the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from elakit.checks import boolean, choice, is_whole, whole_number
from elakit.errors import PromptError, RecordingError, SettingError
from elakit.models import AttentionLayer, adapter_for
from elakit.numbering import number_of
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse

START, END = "<start>", "<end>"
_BYTES = {"float32": 4, "float16": 2}


class NamedLayer(Protocol):
    """An object with the name and the place of a layer, such as an `AttentionLayer`."""

    @property
    def name(self) -> str:
        """Path of the layer in the denoiser."""

    @property
    def place(self) -> str:
        """Part of a U-Net that contains the layer ("down", "mid" or "up"), or kind of its transformer block.

        The kinds are "double" and "single" in joint attention, and "block" in a transformer with cross-attention.
        """


L = TypeVar("L", bound=NamedLayer)


def select_layers(layers: Sequence[L], pattern: str | Sequence[str] = "all") -> tuple[L, ...]:
    """Select layers by place or name.

    Parameters
    ----------
    layers : sequence
        Objects with the attributes ``name`` and ``place``, in forward order.
    pattern : str or sequence of str
        ``"all"``, a place (``"down"``, ``"mid"``, ``"up"`` of a U-Net; ``"double"``, ``"single"``, ``"block"`` of a
        transformer), a glob on names such as ``"up_blocks.1.*"``, or several of these.

    Returns
    -------
    tuple
        The selected layers, each once, in forward order.

    Raises
    ------
    RecordingError
        Raised when a pattern matches no layer (the message lists the names), or no pattern is given.

    Examples
    --------
    >>> from types import SimpleNamespace as Layer
    >>> layers = [Layer(name="down_blocks.0.attn2", place="down"), Layer(name="up_blocks.1.attn2", place="up")]
    >>> [layer.name for layer in select_layers(layers, "up")]
    ['up_blocks.1.attn2']
    >>> len(select_layers(layers, ["down", "up_blocks.*"]))
    2
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    chosen: set[str] = set()
    for each in patterns:
        fitting = {layer.name for layer in layers if each in ("all", layer.place) or fnmatchcase(layer.name, each)}
        if not fitting:
            names = "\n  ".join(layer.name for layer in layers)
            places = ", ".join(map(repr, dict.fromkeys(layer.place for layer in layers)))
            raise RecordingError(
                f"No layer matches {each!r}. Give 'all', {places}, or names of layers, in which * stands for any text. "
                f"The names are:\n  {names}"
            )
        chosen |= fitting
    if not chosen:
        raise RecordingError("No layer is selected: the list of layers is empty. Give 'all', or names of layers.")
    return tuple(layer for layer in layers if layer.name in chosen)


def find_tokens(prompt: Prompt, which: Any) -> tuple[int, ...]:
    """Return the positions of the tokens of a word, label, phrase or entity, as `Prompt.find` does.

    Raises
    ------
    RecordingError
        Raised when the prompt contains no match, or several.
    """
    try:
        return tuple(prompt.find(which))
    except PromptError as error:
        raise RecordingError(str(error)) from error


@dataclass(frozen=True)
class Channels:
    """Text positions whose attention is kept: the columns of a recording.

    Attributes
    ----------
    labels : tuple of str
        Labels of the columns: ``"<start>"``, the selected tokens in the order of the text, and ``"<end>"``. Encoders
        without a start-of-text token, such as T5, have no ``"<start>"``.
    indices : tuple of int
        Position of each label in the encoder's sequence. ``"<end>"``, the sum over several positions, has -1.
    rest : tuple of (int, int or None)
        Ranges of positions that ``"<end>"`` sums: end-of-text and padding. A range is a pair (start, stop), in which
        ``stop`` is excluded. None as ``stop`` stands for the end of the sequence.
    """

    labels: tuple[str, ...]
    indices: tuple[int, ...]
    rest: tuple[tuple[int, int | None], ...]

    @property
    def named(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The pair of ``labels`` and ``indices``."""
        return self.labels, self.indices

    def gather(self, probabilities: Tensor, text: int | None = None) -> Tensor:
        """Return the attention of the columns to keep. The column ``"<end>"`` is the sum over end-of-text and padding.

        Parameters
        ----------
        probabilities : torch.Tensor, (..., positions)
            Attention to each text position. Positions of image tokens may follow the text.
        text : int, optional
            Number of positions that are text; later positions are ignored. Default: all positions are text.

        Returns
        -------
        torch.Tensor, (..., len(labels))

        Raises
        ------
        RecordingError
            Raised when the text of the run has fewer positions than the prompt.

        Examples
        --------
        ``"<end>"`` sums the positions from 3 on:

        >>> row = torch.tensor([0.5, 0.125, 0.25, 0.0625, 0.0625])
        >>> Channels(("<start>", "car", "<end>"), (0, 2, -1), ((3, None),)).gather(row)
        tensor([0.5000, 0.2500, 0.1250])
        """
        probabilities = probabilities[..., :text]
        positions = probabilities.shape[-1]
        needed = max(*self.indices, *(first - 1 for first, _ in self.rest))  # no text need be left for the end
        if positions <= needed:
            raise RecordingError(
                f"The run attends to {positions} text positions, but the prompt to record needs {needed + 1}. "
                "Parse the prompt with the pipeline that you run, and call the pipeline with `prompt.text`."
            )
        # Slices of neighboring columns, because an index would have to be copied to the device.
        columns = [probabilities[..., first : last + 1] for first, last in runs(self.indices[:-1])]
        ends = [probabilities[..., first:last].sum(-1, keepdim=True) for first, last in self.rest]
        return torch.cat([*columns, sum(ends[1:], ends[0])], dim=-1)


@dataclass(frozen=True)
class Resolution:
    """The part of a plan that belongs to one map size.

    Attributes
    ----------
    size : (int, int)
        Rows and columns of the maps.
    layers : tuple of str
        Names of layers that attend to the text. For self-attention, the self-attention in the blocks of these layers is
        kept.
    heads : int
        Number of heads that are kept of each layer; 1 if their mean is kept.
    bytes : int
        Size of this part in bytes, for the whole recording.
    keys : {"text", "image"}
        Keys of the attention: "text" for maps, "image" for self-attention.
    averaged : bool
        True if the mean of the layers is kept instead of each layer.
    """

    size: tuple[int, int]
    layers: tuple[str, ...]
    heads: int
    bytes: int
    keys: Literal["text", "image"] = "text"
    averaged: bool = False

    def __str__(self) -> str:
        layers = number_of(len(self.layers), "layer")
        heads = "head mean" if self.heads == 1 else f"{self.heads} heads"
        what = "self-attention at " if self.keys == "image" else ""
        return (
            f"{what}{size_name(self.size)}: {'mean of ' * self.averaged}{layers}, {heads}, {readable_bytes(self.bytes)}"
        )


@dataclass(frozen=True)
class Plan:
    """Content and size of a recording, known before the run.

    Attributes
    ----------
    resolutions : tuple of Resolution
        Parts of the plan by map size, largest first; self-attention is last.
    steps, images : int
        Number of denoiser calls that are kept, and number of images in the batch.
    tokens : tuple of str
        Labels of the tokens that are kept.
    dtype : str
        Type of the stored values.
    budget : int
        Number of bytes that the `RecordSpec` allows.
    accumulate : bool
        Whether only the mean of the steps is kept.
    """

    resolutions: tuple[Resolution, ...]
    steps: int
    images: int
    tokens: tuple[str, ...]
    dtype: str
    budget: int
    accumulate: bool = False

    @property
    def bytes(self) -> int:
        """Size of the whole recording in bytes."""
        return sum(resolution.bytes for resolution in self.resolutions)

    @property
    def step_bytes(self) -> int:
        """Size of one step in bytes; with ``accumulate``, size of the mean."""
        return self.bytes if self.accumulate else self.bytes // max(self.steps, 1)

    def __str__(self) -> str:
        steps = f"{'mean of ' * self.accumulate}{number_of(self.steps, 'step')}"
        lines = [
            f"{readable_bytes(self.bytes)} (budget: {readable_bytes(self.budget)}): {steps} x "
            f"{number_of(self.images, 'image')} x {number_of(len(self.tokens), 'token')} ({' '.join(self.tokens)}) "
            f"in {self.dtype}"
        ]
        return "\n  ".join(lines + [str(resolution) for resolution in self.resolutions])


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Selection of the self-attention that a recording keeps: the attention among the locations of one map size.

    Self-attention has (h*w)^2 values per step, image, layer and head. In float16, these values take 131 kB at 16 x 16
    and 2 MB at 32 x 32.

    Stable Diffusion, SDXL and PixArt have separate layers for self-attention. In joint attention (Stable Diffusion 3,
    FLUX), the same layers attend to text and image. The self-attention of a location then sums to the share of
    attention that the image receives.

    Parameters
    ----------
    size : int
        Longer side of the maps whose locations attend to each other.
    layers : str or sequence of str, optional
        Layers that attend to the text: ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see
        `select_layers`). The self-attention in the blocks of these layers is kept. Default: the layers that the
        `RecordSpec` selects.
    heads : {"mean", "all"} or sequence of int
        The mean over the heads, every head, or the heads with these indices, counted from 0.
    each_layer : bool
        True keeps each layer separately; False keeps the mean of the layers.

    Raises
    ------
    SettingError
        Raised when a value is not allowed.

    Examples
    --------
    Keep every head of every decoder layer at 16 x 16:

    >>> spec = RecordSpec(self_attention=SelfAttention(size=16, layers="up", heads="all", each_layer=True))
    """

    size: int
    layers: str | Sequence[str] | None = None
    heads: Literal["mean", "all"] | Sequence[int] = "mean"
    each_layer: bool = False

    def __post_init__(self) -> None:
        whole_number(self.size, "self_attention", 1, hint="Give the longer side of the maps, such as 16.")
        _check_heads(self.heads)
        boolean(self.each_layer, "each_layer")


@dataclass(frozen=True)
class RecordSpec:
    """Selection of the attention that a recording keeps.

    Parameters
    ----------
    tokens : {"words", "entities", "all"} or sequence of int or str
        "words": the words of the prompt. "entities": the nouns and attributes of the entities. "all": every position,
        including end-of-text (``"<eot>"``) and each padding position (``"<pad/1>"``, ...). A sequence: words, labels
        such as ``"red#2"``, phrases or positions. Start-of-text (if the encoder has this token) and the summed mass of
        end-of-text and padding are always kept in addition.
    layers : str or sequence of str
        Layers to keep: ``"all"``, a place such as ``"up"``, a glob on names, or several of these (see `select_layers`).
    sizes : int or sequence of int, optional
        Longer sides of the maps to keep. Default: all sizes.
    heads : {"mean", "all"} or sequence of int
        The mean over the heads of a layer, every head, or the heads with these indices, counted from 0.
    steps : slice or int, optional
        Denoiser calls to keep. A slice selects calls by number, counted from 0. An integer n selects every n-th call:
        0, n, 2n, and so on. Default: all calls.
    self_attention : int or SelfAttention, optional
        Self-attention to keep in addition. A number n stands for ``SelfAttention(size=n)``, which keeps one mean per
        step and image. This mean is over the heads of all selected layers whose maps have the longer side n. The
        argument ``refine`` of `Recording.maps` requires self-attention. Default: no self-attention.
    dtype : {"float16", "float32"}
        Type of the stored values. Probabilities are always computed in float32, and maps are averaged in float32.
        float16 keeps three significant digits of probabilities above 0.00006. Smaller probabilities are rounded to
        multiples of 0.00000006.
    accumulate : bool
        True keeps only the mean over the steps. The recording then has one step, with the mean timestep and sigma.
    device : {"cpu", "model"}
        Memory that keeps the steps during the run. "cpu" keeps them on the host, to which each step is copied
        asynchronously. "model" keeps them on the model's device. The mean of ``accumulate=True`` is always computed on
        the model's device.
    budget : int
        Largest size of a recording in bytes, by default 1 GiB; a larger recording is refused before the first denoiser
        call runs.

    Raises
    ------
    SettingError
        Raised when a value is not allowed.

    Examples
    --------
    By default, every denoiser call is kept. With ``steps=5``, call 3 is not kept:

    >>> RecordSpec(layers="up", sizes=16, dtype="float32").keeps(3, calls=20)
    True
    >>> RecordSpec(steps=5).keeps(3, calls=20)
    False
    """

    tokens: str | Sequence[int | str] = "words"
    layers: str | Sequence[str] = "all"
    sizes: int | Sequence[int] | None = None
    heads: Literal["mean", "all"] | Sequence[int] = "mean"
    steps: slice | int | None = None
    self_attention: int | SelfAttention | None = None
    dtype: Literal["float32", "float16"] = "float16"
    accumulate: bool = False
    device: Literal["cpu", "model"] = "cpu"
    budget: int = 2**30

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str) and self.tokens not in ("words", "entities", "all"):
            raise SettingError(
                f"tokens is {self.tokens!r}; give 'words', 'entities', 'all' or a list such as [{self.tokens!r}]."
            )
        _check_heads(self.heads)
        choice(self.device, "device", ("cpu", "model"))
        choice(self.dtype, "dtype", tuple(_BYTES))
        boolean(self.accumulate, "accumulate")
        whole_number(self.budget, "budget", 1, hint="Give the largest size of the recording in bytes.")
        if self.self_attention is not None and not isinstance(self.self_attention, SelfAttention):
            SelfAttention(size=self.self_attention)
        if isinstance(self.steps, slice):
            if self.steps.step is not None and self.steps.step < 1:
                raise SettingError(
                    f"steps={self.steps}: the stride must be positive. Give a slice such as slice(0, None, 2)."
                )
        elif self.steps is not None:
            whole_number(self.steps, "steps", 1, hint="It keeps every n-th call; give a slice for a range.")
        for side in self.wanted_sizes or ():
            whole_number(side, "sizes", 1, hint="Give the longer side of the maps, such as 16.")

    @property
    def own(self) -> SelfAttention | None:
        """The attribute ``self_attention`` as a `SelfAttention`; None if no self-attention is kept."""
        if self.self_attention is None or isinstance(self.self_attention, SelfAttention):
            return self.self_attention
        return SelfAttention(size=self.self_attention)

    @property
    def wanted_sizes(self) -> tuple[int, ...] | None:
        """The attribute ``sizes`` as a tuple; None for all sizes."""
        return (self.sizes,) if is_whole(self.sizes) else None if self.sizes is None else tuple(self.sizes)

    def keeps(self, call: int, calls: int | None) -> bool:
        """Return whether a denoiser call is kept.

        Parameters
        ----------
        call : int
            Number of the call, counted from 0.
        calls : int or None
            Number of calls of the whole run; None if it is unknown.

        Raises
        ------
        RecordingError
            Raised when ``steps`` counts from the end and the number of calls is unknown.
        """
        if self.steps is None:
            return True
        if is_whole(self.steps):
            return call % self.steps == 0
        if calls is None and any(bound is not None and bound < 0 for bound in (self.steps.start, self.steps.stop)):
            raise RecordingError(
                f"steps is {self.steps}, which counts from the end, but the scheduler does not state how many steps "
                "this run has. Count from the start."
            )
        # A run may have more calls than expected.
        return call in range(max(calls or 0, call + 1))[self.steps]

    def channels(self, prompt: Prompt) -> Channels:
        """Return the text positions to keep.

        Raises
        ------
        RecordingError
            Raised when a token is not in the prompt, or its word occurs several times.
        """
        words = {token.index: token.label for token in prompt.tokens}
        if self.tokens == "words":
            chosen = set(words)
        elif self.tokens == "all":
            chosen = set(range(prompt.length))
        elif self.tokens == "entities":
            chosen = {i for entity in prompt.entities for i in (*entity.token_indices, *entity.attribute_indices)}
        else:
            named = (which for which in self.tokens if which not in (START, END))
            chosen = {i for which in named for i in find_tokens(prompt, which)}
        rest = prompt.ends or ((prompt.end_index, None),)
        labels = dict(words)
        for nth, (first, past) in enumerate(rest):
            which = f"#{nth + 1}" if nth else ""  # the second sequence, if two encoders read the text
            labels |= {i: f"<pad{which}/{i - first}>" for i in range(first + 1, past or prompt.length)}
            labels[first] = f"<eot{which}>"
        if prompt.start_index is not None:
            labels[prompt.start_index] = START
            chosen.add(prompt.start_index)
        indices = sorted(chosen)
        return Channels((*(labels.get(i, f"<{i}>") for i in indices), END), (*indices, -1), rest)

    def plan(
        self,
        pipe: Pipeline,
        prompt: Prompt | str,
        *,
        steps: int,
        height: int | None = None,
        width: int | None = None,
        images: int = 1,
    ) -> Plan:
        """Return the content and size of a run's recording, without running the pipeline.

        Parameters
        ----------
        pipe : diffusers.DiffusionPipeline
        prompt : Prompt or str
        steps : int
            Number of denoiser calls: ``num_inference_steps`` with most schedulers, one more with PNDM, nearly twice as
            many with Heun.
        height, width : int, optional
            Size of the image in pixels. Default: the model's default size.
        images : int
            Number of images in the batch or, for a video, number of frames of its latent.

        Returns
        -------
        Plan

        Raises
        ------
        RecordingError
            Raised when the plan exceeds the budget (the message shows the plan and ways to keep less), or selects
            layers, sizes, heads or tokens that do not exist.
        SettingError
            Raised when ``steps``, ``images`` or a side of the image is not allowed.
        PromptError, ModelError
            Raised when the prompt cannot be parsed, or the pipeline's family is not supported.
        """
        adapter = adapter_for(pipe)
        whole_number(steps, "steps", 1)
        whole_number(images, "images", 1)
        own_height, own_width = adapter.default_size()
        latent = adapter.latent_size(height or own_height, width or own_width)
        kept = sum(self.keeps(call, steps) for call in range(steps))
        return self.plan_layers(adapter.layers(), parse(prompt, pipe), latent, kept, images)

    def plan_layers(
        self,
        layers: Sequence[AttentionLayer],
        prompt: Prompt,
        latent: tuple[int, int],
        kept: int,
        images: int,
    ) -> Plan:
        """Return the content and size of a recording, given the layers of the model and the size of the latent.

        Parameters
        ----------
        layers : sequence of AttentionLayer
            All layers of the model.
        prompt : Prompt
        latent : tuple of int
            (h, w) of the latent.
        kept : int
            Number of denoiser calls that are kept.
        images : int
            Number of images in the batch or, for videos, number of the frames of all videos.

        Returns
        -------
        Plan

        Raises
        ------
        RecordingError
            Raised when the plan exceeds the budget, or selects layers, sizes, heads or tokens that do not exist.
        """
        labels = self.channels(prompt).labels
        by_size = _by_size(select_layers(layers, self.layers), latent)
        wanted = self.wanted_sizes
        there = {max(size) for size in by_size}
        for side in wanted or ():
            if side not in there:
                raise RecordingError(
                    f"sizes={self.sizes}: for this image, the selected layers have no maps of size {side}. Give the "
                    f"longer side of their maps: {', '.join(map(size_name, sorted(by_size, reverse=True)))}."
                )
        steps = min(kept, 1) if self.accumulate else kept
        resolutions = []
        for size, members in sorted(by_size.items(), reverse=True):
            if wanted is not None and max(size) not in wanted:
                continue
            heads = _heads_of(self.heads, size, members)
            numbers = steps * images * len(members) * heads * size[0] * size[1] * len(labels)
            names = tuple(layer.name for layer in members)
            resolutions.append(Resolution(size=size, layers=names, heads=heads, bytes=numbers * _BYTES[self.dtype]))
        if self.own is not None:
            resolutions.append(self._of_self(self.own, layers, latent, steps * images))
        plan = Plan(
            resolutions=tuple(resolutions),
            steps=kept,
            images=images,
            tokens=labels,
            dtype=self.dtype,
            budget=self.budget,
            accumulate=self.accumulate,
        )
        if plan.bytes > self.budget:
            raise RecordingError(
                f"This recording would exceed its budget. It needs {plan}\n{self._ways_out(plan, layers)}"
            )
        return plan

    def _of_self(
        self, own: SelfAttention, layers: Sequence[AttentionLayer], latent: tuple[int, int], count: int
    ) -> Resolution:
        """Return the part of the plan that belongs to self-attention.

        ``own`` selects the self-attention. ``layers`` are all layers of the model, and ``latent`` is the size (h, w) of
        the latent. ``count`` is the number of steps to keep, multiplied by the number of images.
        """
        by_size = _by_size(select_layers(layers, own.layers or self.layers), latent)
        size = next((size for size in by_size if max(size) == own.size), None)
        if size is None:
            raise RecordingError(
                f"self_attention={own.size}: for this image, the selected layers have no maps of size {own.size}. Give "
                f"the longer side of their maps: {', '.join(map(size_name, sorted(by_size, reverse=True)))}."
            )
        names = tuple(layer.name for layer in by_size[size])
        heads = _heads_of(own.heads, size, by_size[size])
        numbers = count * (len(names) if own.each_layer else 1) * heads * (size[0] * size[1]) ** 2
        return Resolution(
            size=size,
            layers=names,
            heads=heads,
            bytes=numbers * _BYTES[self.dtype],
            keys="image",
            averaged=not own.each_layer,
        )

    def _ways_out(self, plan: Plan, layers: Sequence[AttentionLayer]) -> str:
        ways = []
        places = Counter(layer.place for layer in layers)
        if self.heads != "mean":
            ways.append("heads='mean'")
        if self.dtype == "float32":
            ways.append("dtype='float16'")
        if self.self_attention is not None:
            ways.append("self_attention=None")
        if len(plan.resolutions) > 1 and plan.resolutions[1].keys == "text":
            ways.append(f"sizes={max(plan.resolutions[1].size)}")
        if self.layers == "all" and len(places) > 1:
            ways.append(f"layers={'up' if 'up' in places else min(places, key=places.__getitem__)!r}")
        if self.tokens in ("all", "words"):
            ways.append("tokens='entities'")
        if self.steps is None and not self.accumulate:
            ways.append("steps=5 (every fifth step)")
        if not self.accumulate:
            ways.append("accumulate=True")
        less = f"To record less, set {' or '.join(ways)} in the RecordSpec. " if ways else ""
        return f"{less}To record all of it, set budget={plan.bytes}."


def _by_size(layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> dict[tuple[int, int], list[AttentionLayer]]:
    """Group layers by the size of their maps, (rows, columns); ``latent`` is the size (h, w) of the latent."""
    found: dict[tuple[int, int], list[AttentionLayer]] = {}
    for layer in layers:
        # A strided convolution rounds up, so an odd latent gives ceil(side / factor).
        found.setdefault((-(-latent[0] // layer.factor), -(-latent[1] // layer.factor)), []).append(layer)
    return found


def _check_heads(heads: Any) -> None:
    if isinstance(heads, str):
        if heads not in ("mean", "all"):
            raise SettingError(f"heads is {heads!r}; give 'mean', 'all' or a list of head indices, such as [0, 3].")
    elif not len(heads) or len(set(heads)) < len(heads) or min(heads) < 0:
        raise SettingError(
            f"heads is {heads}; give one or more head indices, counted from 0, without repetition, such as [0, 3]."
        )


def _heads_of(heads: Any, size: tuple[int, int], members: Sequence[AttentionLayer]) -> int:
    """Return the number of heads to keep per layer; 1 if ``heads`` is "mean".

    ``members`` are the layers whose maps have the given size. A `RecordingError` is raised if a layer does not have all
    heads that ``heads`` names. It is also raised if ``heads`` is "all" and the layers have different numbers of heads.
    """
    if heads == "mean":
        return 1
    counts = {layer.heads for layer in members}
    if not isinstance(heads, str):
        if max(heads) >= min(counts):
            raise RecordingError(
                f"heads={list(heads)}: some layers with maps of size {size_name(size)} have only "
                f"{number_of(min(counts), 'head')}. Give indices below {min(counts)}, or select other layers."
            )
        return len(heads)
    if len(counts) > 1:
        raise RecordingError(
            f"heads={heads!r}: layers with maps of size {size_name(size)} have different numbers of heads "
            f"({', '.join(map(str, sorted(counts)))}). Use heads='mean', or select layers with equally many heads."
        )
    return members[0].heads


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Return the first and last number of each range of consecutive numbers.

    Examples
    --------
    >>> runs([0, 1, 2, 5, 7, 8])
    [(0, 2), (5, 5), (7, 8)]
    """
    found: list[tuple[int, int]] = []
    for n in numbers:
        if found and n == found[-1][1] + 1:
            found[-1] = (found[-1][0], n)
        else:
            found.append((n, n))
    return found


def size_name(size: tuple[int, int]) -> str:
    """Name of a map size, rows x columns.

    Examples
    --------
    >>> size_name((16, 12))
    '16x12'
    """
    return f"{size[0]}x{size[1]}"


def readable_bytes(count: int) -> str:
    """Format a number of bytes in kB, MB or GB (powers of 1000).

    Examples
    --------
    >>> readable_bytes(1_500_000), readable_bytes(12)
    ('1.5 MB', '12 bytes')
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
