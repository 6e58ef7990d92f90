"""What is kept of a run, and what that costs: chosen before the run, stated in bytes, refused when over budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from elakit.errors import PromptError, RecordingError, SettingError
from elakit.models import AttentionLayer, adapter_for
from elakit.prompt import Prompt, parse

START, END = "<start>", "<end>"
_BYTES = {"float32": 4, "float16": 2}


class NamedLayer(Protocol):
    """Anything with a layer's name and its side of the network."""

    @property
    def name(self) -> str:
        """Path of the layer in the network."""

    @property
    def place(self) -> str:
        """Side of the network it is on."""


L = TypeVar("L", bound=NamedLayer)


def select_layers(layers: Sequence[L], pattern: str | Sequence[str] = "all") -> tuple[L, ...]:
    """Choose layers by place or name; the one rule that recording, reading and guidance share.

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
        The chosen layers, each once, in forward order.

    Raises
    ------
    RecordingError
        When a pattern fits no layer; the message lists the names.

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
                f"No layer fits {each!r}. Give 'all', a place that is there ({places}), or a pattern such as "
                f"'up_blocks.1.*' that fits some of these names:\n  {names}"
            )
        chosen |= fitting
    if not chosen:
        raise RecordingError("No layer was asked for; give 'all', a place such as 'up', or a pattern of names.")
    return tuple(layer for layer in layers if layer.name in chosen)


def find_tokens(prompt: Prompt, which: Any) -> tuple[int, ...]:
    """Token positions of a word, label, phrase, entity or position; `RecordingError` when the prompt has none."""
    try:
        return tuple(prompt.find(which))
    except PromptError as error:
        raise RecordingError(str(error)) from error


@dataclass(frozen=True)
class Channels:
    """Which columns of the attention over the text are kept.

    Attributes
    ----------
    labels : tuple of str
        ``"<start>"`` (not of encoders without a start-of-text token, such as T5), the chosen tokens in the order of the
        text, ``"<end>"``.
    indices : tuple of int
        Their positions in the encoder's sequence; -1 for ``"<end>"``, which is a sum.
    rest : tuple of (int, int or None)
        First position and past the last of each stretch that ``"<end>"`` sums: end-of-text and padding, and everything
        that may follow.
    """

    labels: tuple[str, ...]
    indices: tuple[int, ...]
    rest: tuple[tuple[int, int | None], ...]

    def gather(self, probabilities: Tensor) -> Tensor:
        """Keep the chosen columns; (..., text positions) -> (..., len(labels)).

        Raises
        ------
        RecordingError
            When the run's text has fewer positions than the prompt.

        Examples
        --------
        >>> row = torch.tensor([0.5, 0.125, 0.25, 0.0625, 0.0625])
        >>> Channels(("<start>", "car", "<end>"), (0, 2, -1), ((3, None),)).gather(row)
        tensor([0.5000, 0.2500, 0.1250])
        """
        positions = probabilities.shape[-1]
        needed = max(*self.indices, *(first for first, _ in self.rest))
        if positions <= needed:
            raise RecordingError(
                f"The run attends to {positions} text positions, but the prompt to record needs position {needed}. "
                "Parse the prompt with the pipeline you run, and pass its text."
            )
        # Slices of neighboring columns rather than an index, which would have to be copied to the device.
        columns = [probabilities[..., first : last + 1] for first, last in runs(self.indices[:-1])]
        ends = [probabilities[..., first:last].sum(-1, keepdim=True) for first, last in self.rest]
        return torch.cat([*columns, sum(ends[1:], ends[0])], dim=-1)


@dataclass(frozen=True)
class Resolution:
    """The share of one map size in a plan: ``size`` (h, w), names of its layers, heads kept, bytes.

    With ``of_self`` that of self-attention, the mean of those layers and of their heads.
    """

    size: tuple[int, int]
    layers: tuple[str, ...]
    heads: int
    bytes: int
    of_self: bool = False

    def __str__(self) -> str:
        layers = f"{len(self.layers)} layer{'s' * (len(self.layers) > 1)}"
        if self.of_self:
            return f"self-attention at {size_name(self.size)}: mean of {layers}, {readable_bytes(self.bytes)}"
        heads = "head mean" if self.heads == 1 else f"{self.heads} heads"
        return f"{size_name(self.size)}: {layers}, {heads}, {readable_bytes(self.bytes)}"


@dataclass(frozen=True)
class Plan:
    """What a recording takes, known before the run.

    Attributes
    ----------
    resolutions : tuple of Resolution
        Largest maps first.
    steps, images : int
        Denoiser calls kept and images drawn at once.
    tokens : tuple of str
        Labels of what is kept of the text.
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
        """Bytes of the whole recording."""
        return sum(resolution.bytes for resolution in self.resolutions)

    @property
    def step_bytes(self) -> int:
        """Bytes of one step, or of the mean of all."""
        return self.bytes if self.accumulate else self.bytes // max(self.steps, 1)

    def __str__(self) -> str:
        steps = f"mean of {self.steps} steps" if self.accumulate else f"{self.steps} steps"
        lines = [
            f"{readable_bytes(self.bytes)} of {readable_bytes(self.budget)}: {steps} x {self.images} "
            f"image{'s' * (self.images > 1)} x {len(self.tokens)} tokens ({' '.join(self.tokens)}) in {self.dtype}"
        ]
        return "\n  ".join(lines + [str(resolution) for resolution in self.resolutions])


@dataclass(frozen=True)
class RecordSpec:
    """What to keep of a run.

    Parameters
    ----------
    tokens : {"words", "entities", "all"} or sequence of int or str
        Words of the prompt; tokens of its entities and their attributes; every position, end-of-text (``"<eot>"``) and
        each padding position (``"<pad/1>"``...) apart; or chosen ones (a word, a label such as ``"red#2"``, a phrase,
        a position). Start-of-text (where the encoder has one) and the summed mass of end-of-text and padding are kept
        always.
    layers : str or sequence of str
        As in `select_layers`.
    sizes : int or sequence of int, optional
        Keep only maps whose larger side is one of these.
    heads : {"mean", "all"} or sequence of int
        Their mean, every one, or those of these numbers, counted from 0.
    steps : slice or int, optional
        Denoiser calls to keep, counted from 0: a slice of them, or every n-th. Default: all.
    self_attention : int, optional
        Also keep self-attention between the cells of maps whose larger side this is, the mean of the heads and of the
        chosen layers of that size: for ``maps(refine=...)``. It takes cells x cells numbers a step: 131 kB at 16 x 16,
        2 MB at 32 x 32 in float16. Of families with layers of their own for it (Stable Diffusion, SDXL, PixArt).
    dtype : {"float16", "float32"}
        Of what is kept; probabilities are always computed, and read maps averaged, in float32. float16 keeps three
        significant digits of a probability above 0.00006, and steps of 0.00000006 below.
    accumulate : bool
        Keep only the mean over the kept steps, as one step whose timestep and sigma are means too.
    device : {"cpu", "model"}
        Where steps are kept while the run goes on: in host memory, to which each step is copied at its end without
        waiting for it, or on the model's device until the run is over. Means are always summed on the model's device.
    budget : int
        Bytes a recording may take; a run that would take more is refused before it starts.

    Raises
    ------
    SettingError
        When a value is outside what is listed.

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
    self_attention: int | None = None
    dtype: Literal["float32", "float16"] = "float16"
    accumulate: bool = False
    device: Literal["cpu", "model"] = "cpu"
    budget: int = 2**30

    def __post_init__(self) -> None:
        if isinstance(self.tokens, str) and self.tokens not in ("words", "entities", "all"):
            raise SettingError(
                f"tokens is {self.tokens!r}; give 'words', 'entities', 'all' or a list such as [{self.tokens!r}]."
            )
        if isinstance(self.heads, str):
            if self.heads not in ("mean", "all"):
                raise SettingError(f"heads is {self.heads!r}; give 'mean', 'all' or a list of numbers such as [0, 3].")
        elif not len(self.heads) or len(set(self.heads)) < len(self.heads) or min(self.heads) < 0:
            raise SettingError(f"heads is {self.heads}; list different numbers of heads, counted from 0.")
        if self.device not in ("cpu", "model"):
            raise SettingError(f"device is {self.device!r}; give 'cpu' or 'model'.")
        if self.dtype not in _BYTES:
            raise SettingError(f"dtype is {self.dtype!r}; give {' or '.join(map(repr, _BYTES))}.")
        if self.self_attention is not None and self.self_attention < 1:
            raise SettingError(f"self_attention is {self.self_attention}; give the larger side of maps, such as 16.")
        if self.budget <= 0:
            raise SettingError(f"budget is {self.budget} bytes; it must be positive.")
        if isinstance(self.steps, int) and self.steps < 1:
            raise SettingError(f"steps is {self.steps}; to keep every n-th call give n >= 1, or a slice.")
        if isinstance(self.steps, slice) and self.steps.step is not None and self.steps.step < 1:
            raise SettingError(f"steps is {self.steps}; its stride must be positive.")
        if any(side < 1 for side in self.wanted_sizes or ()):
            raise SettingError(f"sizes is {self.sizes}; map sides are positive.")

    @property
    def wanted_sizes(self) -> tuple[int, ...] | None:
        """``sizes`` as a tuple; None for all."""
        return (self.sizes,) if isinstance(self.sizes, int) else None if self.sizes is None else tuple(self.sizes)

    @property
    def wanted_heads(self) -> tuple[int, ...] | None:
        """Numbers of the heads, as a tuple; None for ``"mean"`` and ``"all"``."""
        return None if isinstance(self.heads, str) else tuple(self.heads)

    def keeps(self, call: int, calls: int | None) -> bool:
        """Whether a denoiser call is kept, of ``calls`` expected (None: unknown)."""
        if self.steps is None:
            return True
        if isinstance(self.steps, int):
            return call % self.steps == 0
        if calls is None and any(bound is not None and bound < 0 for bound in (self.steps.start, self.steps.stop)):
            raise RecordingError(
                f"steps is {self.steps}, which counts from the end, but the scheduler does not tell how many steps "
                "this run has. Count from the start."
            )
        # A run may go on beyond what was expected.
        return call in range(max(calls or 0, call + 1))[self.steps]

    def channels(self, prompt: Prompt) -> Channels:
        """The columns of the attention over the text to keep.

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
            which = f"#{nth + 1}" if nth else ""  # of the second sequence, where the text is read twice
            labels |= {i: f"<pad{which}/{i - first}>" for i in range(first + 1, past or prompt.length)}
            labels[first] = f"<eot{which}>"
        if prompt.start_index is not None:
            labels[prompt.start_index] = START
            chosen.add(prompt.start_index)
        indices = sorted(chosen)
        return Channels((*(labels.get(i, f"<{i}>") for i in indices), END), (*indices, -1), rest)

    def plan(
        self,
        pipe: Any,
        prompt: Prompt | str,
        *,
        steps: int,
        height: int | None = None,
        width: int | None = None,
        images: int = 1,
    ) -> Plan:
        """State what a run will take, without running it.

        Parameters
        ----------
        pipe : diffusers.DiffusionPipeline
        prompt : Prompt or str
        steps : int
            Denoiser calls of the run: ``num_inference_steps`` for most schedulers, one more for PNDM, nearly twice
            for Heun.
        height, width : int, optional
            Pixels; default: the model's own.
        images : int
            Images drawn at once.

        Raises
        ------
        RecordingError
            When the plan is over budget (with the plan and ways out), or asks for what the model does not have.
        """
        adapter = adapter_for(pipe)
        if steps < 1:
            raise SettingError(f"steps is {steps}; a run has at least one.")
        if images < 1:
            raise SettingError(f"images is {images}; a run draws at least one.")
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
        """`plan` from a latent of (h, w) and the number of kept calls, as the recorder knows them."""
        labels = self.channels(prompt).labels
        by_size: dict[tuple[int, int], list[AttentionLayer]] = {}
        for layer in select_layers(layers, self.layers):
            # A strided convolution rounds up, so an odd latent gives ceil(side / factor).
            size = (-(-latent[0] // layer.factor), -(-latent[1] // layer.factor))
            by_size.setdefault(size, []).append(layer)
        wanted = self.wanted_sizes
        there = {max(size) for size in by_size}
        for side in wanted or ():
            if side not in there:
                raise RecordingError(
                    f"No selected layer has maps of size {side}; for this image they have "
                    f"{', '.join(map(size_name, sorted(by_size, reverse=True)))}."
                )
        resolutions = []
        for size, members in sorted(by_size.items(), reverse=True):
            if wanted is not None and max(size) not in wanted:
                continue
            heads = self._heads_of(size, members)
            steps = min(kept, 1) if self.accumulate else kept
            cells = steps * images * len(members) * heads * size[0] * size[1] * len(labels)
            names = tuple(layer.name for layer in members)
            resolutions.append(Resolution(size, names, heads, cells * _BYTES[self.dtype]))
        if self.self_attention is not None:
            resolutions.append(self._of_self(by_size, min(kept, 1) if self.accumulate else kept, images))
        plan = Plan(tuple(resolutions), kept, images, labels, self.dtype, self.budget, self.accumulate)
        if plan.bytes > self.budget:
            raise RecordingError(f"This recording would pass its budget: {plan}\n{self._ways_out(plan, layers)}")
        return plan

    def _of_self(self, by_size: dict[tuple[int, int], list[AttentionLayer]], steps: int, images: int) -> Resolution:
        """The share of self-attention, beside the chosen layers of its size."""
        size = next((size for size in by_size if max(size) == self.self_attention), None)
        if size is None:
            raise RecordingError(
                f"self_attention is {self.self_attention}, but the selected layers have maps of "
                f"{', '.join(map(size_name, sorted(by_size, reverse=True)))}; give the larger side of one of these."
            )
        cells = size[0] * size[1]
        names = tuple(layer.name for layer in by_size[size])
        return Resolution(size, names, 1, steps * images * cells**2 * _BYTES[self.dtype], of_self=True)

    def _heads_of(self, size: tuple[int, int], members: Sequence[AttentionLayer]) -> int:
        """How many heads are kept of the layers of one size."""
        if self.heads == "mean":
            return 1
        counts = {layer.heads for layer in members}
        if self.wanted_heads is not None:
            if max(self.wanted_heads) >= min(counts):
                raise RecordingError(
                    f"There is no head {max(self.wanted_heads)} in all layers of size {size_name(size)}: some have "
                    f"{min(counts)} (0 to {min(counts) - 1}). List heads that all have, or choose other layers."
                )
            return len(self.wanted_heads)
        if len(counts) > 1:
            raise RecordingError(
                f"Layers of size {size_name(size)} differ in their number of heads; record heads='mean', or choose "
                "layers that agree."
            )
        return members[0].heads

    def _ways_out(self, plan: Plan, layers: Sequence[AttentionLayer]) -> str:
        ways = []
        places = Counter(layer.place for layer in layers)
        if self.heads != "mean":
            ways.append("heads='mean'")
        if self.dtype == "float32":
            ways.append("dtype='float16'")
        if self.self_attention is not None:
            ways.append("self_attention=None")
        if len(plan.resolutions) > 1 and not plan.resolutions[1].of_self:
            ways.append(f"sizes={max(plan.resolutions[1].size)}")
        if self.layers == "all" and len(places) > 1:
            ways.append(f"layers={'up' if 'up' in places else min(places, key=places.__getitem__)!r}")
        if self.tokens in ("all", "words"):
            ways.append("tokens='entities'")
        if self.steps is None and not self.accumulate:
            ways.append("steps=5 (every fifth)")
        if not self.accumulate:
            ways.append("accumulate=True")
        return f"Keep less with RecordSpec({' or '.join(ways)}), or allow it with budget={plan.bytes}."


def runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch of consecutive numbers.

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
    """``"16x12"`` for maps of 16 rows and 12 columns."""
    return f"{size[0]}x{size[1]}"


def readable_bytes(count: int) -> str:
    """``"1.5 MB"``, in powers of 1000.

    Examples
    --------
    >>> readable_bytes(1_500_000), readable_bytes(12)
    ('1.5 MB', '12 bytes')
    """
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"
