"""Selection of what is kept of a run, and its size in bytes, which is known before the run."""

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
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse

START, END = "<start>", "<end>"
_BYTES = {"float32": 4, "float16": 2}


class NamedLayer(Protocol):
    """Anything with the name of a layer and its side of the network."""

    @property
    def name(self) -> str:
        """Path of the layer in the network."""

    @property
    def place(self) -> str:
        """Side of the network."""


L = TypeVar("L", bound=NamedLayer)


def select_layers(layers: Sequence[L], pattern: str | Sequence[str] = "all") -> tuple[L, ...]:
    """Select layers by place or name.

    Parameters
    ----------
    layers : sequence
        Objects with ``name`` and ``place``, in forward order.
    pattern : str or sequence of str
        ``"all"``, a place (``"down"``, ``"mid"``, ``"up"`` of a UNet; ``"double"``, ``"single"``, ``"block"`` of a
        transformer), a glob on names such as ``"up_blocks.1.*"``, or several of these.

    Returns
    -------
    tuple
        The selected layers, each once, in forward order.

    Raises
    ------
    RecordingError
        When a pattern matches no layer; the message lists the names.

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
            places = ", ".join(dict.fromkeys(layer.place for layer in layers))
            raise RecordingError(
                f"No layer matches {each!r}. Give 'all', a place of this model ({places}), or a pattern such as "
                f"'up_blocks.1.*' that matches some of these names:\n  {names}"
            )
        chosen |= fitting
    if not chosen:
        raise RecordingError("No layer is selected; give 'all', a place such as 'up', or a pattern of names.")
    return tuple(layer for layer in layers if layer.name in chosen)


def find_tokens(prompt: Prompt, which: Any) -> tuple[int, ...]:
    """Return the token positions of a word, label, phrase, entity or position; `RecordingError` if there are none."""
    try:
        return tuple(prompt.find(which))
    except PromptError as error:
        raise RecordingError(str(error)) from error


@dataclass(frozen=True)
class Channels:
    """Columns of the attention over the text that are kept.

    Attributes
    ----------
    labels : tuple of str
        ``"<start>"`` (unless the encoder has no start-of-text token, such as T5), the selected tokens in the order of
        the text, ``"<end>"``.
    indices : tuple of int
        Their positions in the encoder's sequence; -1 for ``"<end>"``, which is a sum.
    rest : tuple of (int, int or None)
        Ranges (first position, position after the last) that ``"<end>"`` sums: end-of-text and padding.
    """

    labels: tuple[str, ...]
    indices: tuple[int, ...]
    rest: tuple[tuple[int, int | None], ...]

    @property
    def named(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Labels and positions."""
        return self.labels, self.indices

    def gather(self, probabilities: Tensor, text: int | None = None) -> Tensor:
        """Keep the selected columns; (..., key positions) -> (..., len(labels)).

        Parameters
        ----------
        probabilities : torch.Tensor
        text : int, optional
            Number of positions that are text; what follows them is not kept. Default: all.

        Raises
        ------
        RecordingError
            When the text of the run has fewer positions than the prompt.

        Examples
        --------
        >>> row = torch.tensor([0.5, 0.125, 0.25, 0.0625, 0.0625])
        >>> Channels(("<start>", "car", "<end>"), (0, 2, -1), ((3, None),)).gather(row)
        tensor([0.5000, 0.2500, 0.1250])
        """
        probabilities = probabilities[..., :text]
        positions = probabilities.shape[-1]
        needed = max(*self.indices, *(first - 1 for first, _ in self.rest))  # no text need be left for the end
        if positions <= needed:
            raise RecordingError(
                f"The run attends to {positions} text positions, but the prompt to record needs position {needed}. "
                "Parse the prompt with the pipeline that you run, and pass its text."
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
        Rows and columns.
    layers : tuple of str
        Names of the layers (of self-attention: of the layers that attend to the text in the same blocks).
    heads : int
        Number of heads kept.
    bytes : int
    keys : {"text", "image"}
        Maps, or self-attention.
    averaged : bool
        Whether the mean of the layers is kept.
    """

    size: tuple[int, int]
    layers: tuple[str, ...]
    heads: int
    bytes: int
    keys: Literal["text", "image"] = "text"
    averaged: bool = False

    def __str__(self) -> str:
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)}"
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
        Largest maps first.
    steps, images : int
        Number of denoiser calls that are kept, and of images in the batch.
    tokens : tuple of str
        Labels of the tokens that are kept.
    dtype : str
    budget : int
        Bytes the specification allows.
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
        """Size of one step in bytes, or of the mean of all steps."""
        return self.bytes if self.accumulate else self.bytes // max(self.steps, 1)

    def __str__(self) -> str:
        steps = f"mean of {self.steps} steps" if self.accumulate else f"{self.steps} steps"
        lines = [
            f"{readable_bytes(self.bytes)} of {readable_bytes(self.budget)}: {steps} x {self.images} "
            f"image{'s' * (self.images > 1)} x {len(self.tokens)} tokens ({' '.join(self.tokens)}) in {self.dtype}"
        ]
        return "\n  ".join(lines + [str(resolution) for resolution in self.resolutions])


@dataclass(frozen=True, kw_only=True)
class SelfAttention:
    """Self-attention to keep: what the locations of maps of one size attend to in the image.

    It takes (h*w)^2 numbers per step, layer and head: 131 kB at 16 x 16 and 2 MB at 32 x 32 in float16.

    In Stable Diffusion, SDXL and PixArt these are layers of their own, next to those that attend to the text. In joint
    attention (Stable Diffusion 3, FLUX) they are the same layers: their attention to the keys of the image, whose rows
    sum to the share of attention that the image receives.

    Parameters
    ----------
    size : int
        Larger side of the maps.
    layers : str or sequence of str, optional
        As in `select_layers`: the layers whose blocks' self-attention is kept. Default: those of the specification.
    heads : {"mean", "all"} or sequence of int
        Their mean, every head, or the heads with these numbers, counted from 0.
    each_layer : bool
        Keep each layer; otherwise their mean.

    Raises
    ------
    SettingError
        When a value is not allowed.

    Examples
    --------
    >>> spec = RecordSpec(self_attention=SelfAttention(size=16, layers="up", heads="all", each_layer=True))
    """

    size: int
    layers: str | Sequence[str] | None = None
    heads: Literal["mean", "all"] | Sequence[int] = "mean"
    each_layer: bool = False

    def __post_init__(self) -> None:
        whole_number(self.size, "self_attention", 1, hint="Give the larger side of the maps, such as 16.")
        _check_heads(self.heads)
        boolean(self.each_layer, "each_layer")


@dataclass(frozen=True)
class RecordSpec:
    """Selection of what is kept of a run.

    Parameters
    ----------
    tokens : {"words", "entities", "all"} or sequence of int or str
        "words": the words of the prompt. "entities": the tokens of its entities and their attributes. "all": every
        position, with end-of-text (``"<eot>"``) and each padding position (``"<pad/1>"``...) apart. A sequence: the
        tokens in it (a word, a label such as ``"red#2"``, a phrase, a position). Start-of-text (if the encoder has one)
        and the summed mass of end-of-text and padding are always kept.
    layers : str or sequence of str
        As in `select_layers`.
    sizes : int or sequence of int, optional
        Keep only maps whose larger side is one of these.
    heads : {"mean", "all"} or sequence of int
        Their mean, every head, or the heads with these numbers, counted from 0.
    steps : slice or int, optional
        Denoiser calls to keep, counted from 0: a slice of them, or every n-th. Default: all.
    self_attention : int or SelfAttention, optional
        Also keep self-attention. A number is the larger side of its maps, and keeps the mean of the heads and of the
        selected layers of that size, as ``maps(refine=...)`` needs it.
    dtype : {"float16", "float32"}
        Type of the stored values; probabilities are always computed, and maps averaged, in float32. float16 keeps
        three significant digits of a probability above 0.00006, and multiples of 0.00000006 below.
    accumulate : bool
        Keep only the mean over the kept steps, as one step whose timestep and sigma are means too.
    device : {"cpu", "model"}
        Where steps are kept during the run: in host memory, to which each step is copied at its end without waiting for
        the copy, or on the model's device. Means are always summed on the model's device.
    budget : int
        Largest size of a recording in bytes; a run that would pass it is refused before it starts.

    Raises
    ------
    SettingError
        When a value is not allowed.

    Examples
    --------
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
                raise SettingError(f"steps is {self.steps}; its stride must be positive.")
        elif self.steps is not None:
            whole_number(self.steps, "steps", 1, hint="It keeps every n-th call; give a slice for a range.")
        for side in self.wanted_sizes or ():
            whole_number(side, "sizes", 1, hint="Give the larger side of the maps, such as 16.")

    @property
    def own(self) -> SelfAttention | None:
        """The self-attention to keep."""
        if self.self_attention is None or isinstance(self.self_attention, SelfAttention):
            return self.self_attention
        return SelfAttention(size=self.self_attention)

    @property
    def wanted_sizes(self) -> tuple[int, ...] | None:
        """``sizes`` as a tuple; None for all sizes."""
        return (self.sizes,) if is_whole(self.sizes) else None if self.sizes is None else tuple(self.sizes)

    def keeps(self, call: int, calls: int | None) -> bool:
        """Return whether a denoiser call is kept, of ``calls`` expected ones (None: unknown)."""
        if self.steps is None:
            return True
        if is_whole(self.steps):
            return call % self.steps == 0
        if calls is None and any(bound is not None and bound < 0 for bound in (self.steps.start, self.steps.stop)):
            raise RecordingError(
                f"steps is {self.steps}, which counts from the end, but the scheduler does not say how many steps this "
                "run has. Count from the start."
            )
        # A run may have more calls than expected.
        return call in range(max(calls or 0, call + 1))[self.steps]

    def channels(self, prompt: Prompt) -> Channels:
        """Return the columns of the attention over the text to keep.

        Raises
        ------
        RecordingError
            When a token is not in the prompt.
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
        """Return the size of a run's recording without running it.

        Parameters
        ----------
        pipe : diffusers.DiffusionPipeline
        prompt : Prompt or str
        steps : int
            Number of denoiser calls: ``num_inference_steps`` with most schedulers, one more with PNDM, nearly twice as
            many with Heun.
        height, width : int, optional
            In pixels; default: those of the model.
        images : int
            Number of images in the batch; of a video, the number of frames of its latent.

        Raises
        ------
        RecordingError
            When the plan passes the budget (the message has the plan and ways to need less), or selects what the model
            does not have.
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
        """Return the plan from the size (h, w) of the latent and the number of kept calls."""
        labels = self.channels(prompt).labels
        by_size = _by_size(select_layers(layers, self.layers), latent)
        wanted = self.wanted_sizes
        there = {max(size) for size in by_size}
        for side in wanted or ():
            if side not in there:
                raise RecordingError(
                    f"No selected layer has maps of size {side}; for this image they have "
                    f"{', '.join(map(size_name, sorted(by_size, reverse=True)))}."
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
            raise RecordingError(f"This recording would exceed its budget: {plan}\n{self._ways_out(plan, layers)}")
        return plan

    def _of_self(
        self, own: SelfAttention, layers: Sequence[AttentionLayer], latent: tuple[int, int], count: int
    ) -> Resolution:
        """The part of the plan that belongs to self-attention, ``count`` times per step and image."""
        by_size = _by_size(select_layers(layers, own.layers or self.layers), latent)
        size = next((size for size in by_size if max(size) == own.size), None)
        if size is None:
            raise RecordingError(
                f"self_attention is {own.size}, but the selected layers have maps of "
                f"{', '.join(map(size_name, sorted(by_size, reverse=True)))}; give the larger side of one of these."
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
        return f"Keep less with RecordSpec({' or '.join(ways)}), or allow it with budget={plan.bytes}."


def _by_size(layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> dict[tuple[int, int], list[AttentionLayer]]:
    """Layers by the size of their maps."""
    found: dict[tuple[int, int], list[AttentionLayer]] = {}
    for layer in layers:
        # A strided convolution rounds up, so an odd latent gives ceil(side / factor).
        found.setdefault((-(-latent[0] // layer.factor), -(-latent[1] // layer.factor)), []).append(layer)
    return found


def _check_heads(heads: Any) -> None:
    if isinstance(heads, str):
        if heads not in ("mean", "all"):
            raise SettingError(f"heads is {heads!r}; give 'mean', 'all' or a list of numbers such as [0, 3].")
    elif not len(heads) or len(set(heads)) < len(heads) or min(heads) < 0:
        raise SettingError(f"heads is {heads}; list different numbers of heads, counted from 0.")


def _heads_of(heads: Any, size: tuple[int, int], members: Sequence[AttentionLayer]) -> int:
    """Number of heads that are kept of the layers of one size."""
    if heads == "mean":
        return 1
    counts = {layer.heads for layer in members}
    if not isinstance(heads, str):
        if max(heads) >= min(counts):
            raise RecordingError(
                f"There is no head {max(heads)} in all layers of size {size_name(size)}: some have {min(counts)} heads "
                f"(0 to {min(counts) - 1}). List heads that all of them have, or select other layers."
            )
        return len(heads)
    if len(counts) > 1:
        raise RecordingError(
            f"Layers of size {size_name(size)} have different numbers of heads; record heads='mean', or select layers "
            "with the same number."
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
    """Format a number of bytes in units of powers of 1000.

    Examples
    --------
    >>> readable_bytes(1_500_000), readable_bytes(12)
    ('1.5 MB', '12 bytes')
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
