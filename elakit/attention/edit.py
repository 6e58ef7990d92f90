"""Attention that causes: changing what image positions attend to, where, when and in which layers.

A change is a bias added to the attention's scores before their softmax. It enters through the attention mask that
layers take anyway, by hooks, so that no processor is replaced and recording sees what the model sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from elakit.attention.spec import END, START, find_tokens, select_layers
from elakit.attention.taps import is_left_alone
from elakit.errors import RecordingError, SettingError
from elakit.models import AttentionLayer, adapter_for
from elakit.models.adapter import argument
from elakit.prompt import Entity, Prompt, parse

_NEVER = -1e4  # what diffusers adds to hide a position; half precision has room for it, and its exponential is 0


@dataclass(frozen=True, eq=False)  # regions are arrays, which have no one answer to ==
class Edit:
    """One change of the attention to some tokens.

    Parameters
    ----------
    tokens : str, int, Entity or a sequence of these
        What is attended to: a word, label, phrase, entity or position; ``"<start>"``; ``"<end>"`` for end-of-text and
        padding.
    scale : float
        Factor of the tokens' weights, before the weights of all tokens are brought to a sum of 1: that is, its
        logarithm is added to their logits. 0 masks them, 1 changes nothing.
    add : float
        Added to their logits. ``scale=2`` and ``add=math.log(2)`` do the same.
    like : str, int or Entity, optional
        Another token, whose logits replace theirs (the mean over its positions, where it has several): the image then
        attends to them exactly as to it, but still reads their own values. Not together with ``scale`` or ``add``, and
        for cross-attention only (Stable Diffusion, SDXL, PixArt).
    region : array, (y, x), optional
        Where in the image, at any resolution: booleans, or shares from 0 to 1. Default: everywhere.
    steps : int, slice or sequence of int, optional
        Calls of the denoiser, counted from 0 on entry. Default: all.
    layers : str or sequence of str
        As in `select_layers`.

    Raises
    ------
    SettingError
        When a value is outside what is listed.

    Notes
    -----
    Where an attention of p is changed by a factor of f it becomes ``f p / (1 + (f - 1) p)``, if it is the only one that
    is changed; f is ``scale * exp(add)``. In a cell that the region covers by a share r, f is ``1 + r (f - 1)``; logits
    that are replaced become ``(1 - r)`` of their own and ``r`` of the other's.

    Examples
    --------
    >>> Edit("car", scale=0, region=[[True, False]], steps=slice(0, 5), layers="up").factor
    0.0
    >>> Edit("car", add=float("nan"))
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: add is nan; give a finite number, such as 2.0 (0 changes nothing).
    """

    tokens: str | int | Entity | Sequence[str | int | Entity]
    scale: float = 1.0
    add: float = 0.0
    like: str | int | Entity | None = None
    region: Any = None
    steps: int | slice | Sequence[int] | None = None
    layers: str | Sequence[str] = "all"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale >= 0):
            raise SettingError(f"scale is {self.scale}; give a finite number of 0 (masks) or more (1 changes nothing).")
        if not math.isfinite(self.add):
            raise SettingError(f"add is {self.add}; give a finite number, such as 2.0 (0 changes nothing).")
        if abs(self.add) > 100:
            raise SettingError(f"add is {self.add}; give a number from -100 to 100, or scale=0 to mask.")
        if self.like is not None and not (self.scale == 1 and self.add == 0):
            raise SettingError(
                f"like={self.like!r} with scale or add: an edit either replaces logits or changes them; give two edits."
            )
        if not isinstance(self.tokens, str | int | Entity) and not self.tokens:
            raise SettingError("tokens names nothing; give a word of the prompt, an entity or a position.")
        steps = self.steps
        numbers = (steps.start, steps.stop) if isinstance(steps, slice) else _as_sequence(steps)
        if any(number is not None and number < 0 for number in numbers):
            raise SettingError(f"steps is {steps}; count calls from the start, 0, 1, 2...")
        if isinstance(steps, slice) and steps.step is not None and steps.step < 1:
            raise SettingError(f"steps is {steps}; its stride must be positive.")
        if self.region is not None:
            region = _region(self.region)
            if region.ndim != 2 or not region.numel():
                raise SettingError(f"region has shape {tuple(region.shape)}; give (y, x), one cell or more.")
            if not bool(torch.isfinite(region).all()) or float(region.min()) < 0 or float(region.max()) > 1:
                raise SettingError("region has values outside 0 to 1; give booleans or the share of each cell.")

    @property
    def factor(self) -> float:
        """What weights in the region are multiplied by."""
        return self.scale * math.exp(self.add)

    def acts(self, call: int) -> bool:
        """Whether it changes anything in a call of the denoiser."""
        if self.factor == 1.0 and self.like is None:
            return False
        if isinstance(self.steps, slice):
            return call in range(call + 1)[self.steps]
        return self.steps is None or call in _as_sequence(self.steps)


@contextmanager
def edit(pipe: Any, prompt: Prompt | str, edits: Edit | Sequence[Edit]) -> Iterator[None]:
    """Change the attention of whatever runs of ``pipe`` happen inside the ``with`` block.

    Only rows of a batch that see the prompt are changed, and only what image positions attend to. Edits of one block
    act together, and blocks may be nested. What an `elakit.record` inside or outside records is the changed attention.
    An edit that changes nothing leaves the image as it is, bit for bit.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Of a supported family.
    prompt : Prompt or str
        The prompt that the pipeline is called with.
    edits : Edit or sequence of Edit

    Raises
    ------
    RecordingError
        When the prompt has no such token, or the model no such layer.
    ModelError
        When the pipeline is of an unsupported family.

    Notes
    -----
    An active edit gives the layer an attention mask of (image positions x keys). Attention kernels without masks
    (flash attention set as a backend) refuse it. Passes inside `paused`, such as guidance's own, are neither changed
    nor counted.

    Examples
    --------
    >>> import elakit
    >>> from elakit.attention import Edit, edit
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [red car] and a [blue bird]", pipe)
    >>> left = [[True, False]]
    >>> with edit(pipe, prompt, Edit("car", scale=0, region=left)), elakit.record(pipe, prompt) as recording:
    ...     image = pipe(prompt.text, num_inference_steps=1).images[0]
    >>> car = recording.maps("car", layers="up", size=16).isel(step=0, token=0)
    >>> float(car[:, :8].max()), bool(car[:, 8:].min() > 0)
    (0.0, True)
    """
    with _hooked(_Editor(adapter_for(pipe), parse(prompt, pipe), [edits] if isinstance(edits, Edit) else list(edits))):
        yield


BiasOf = Callable[[AttentionLayer, tuple[int, int], int], Tensor | None]


@contextmanager
def biased(pipe: Any, bias_of: BiasOf) -> Iterator[None]:
    """Add to the attention's scores in each pass inside, for each image of a batch its own: the ground of guidance.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Of a supported family.
    bias_of : callable
        ``bias_of(layer, (h, w), text positions)`` is asked as each layer runs, and gives what is added to the scores
        before the softmax, (image, h*w, text positions); None adds nothing, and leaves the pass as it is bit for bit.

    Notes
    -----
    As in `edit`, only rows that see the prompt are changed, and passes inside `paused` are not.

    Examples
    --------
    >>> import elakit, torch
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [cat] and a [lion]", pipe)
    >>> def no_lion(layer, size, positions):
    ...     bias = torch.zeros(1, size[0] * size[1], positions)
    ...     bias[..., list(prompt.entities[1].token_indices)] = -50
    ...     return bias
    >>> with biased(pipe, no_lion), elakit.record(pipe, prompt) as recording:
    ...     image = pipe(prompt.text, num_inference_steps=1).images[0]
    >>> float(recording.maps("lion").max()) < 1e-6 < float(recording.maps("cat").max())
    True
    """
    with _hooked(_Bias(adapter_for(pipe), bias_of)):
        yield


@contextmanager
def _hooked(source: _Source) -> Iterator[None]:
    with ExitStack() as hooks:
        if not all(layer.takes_mask for layer in source.layers):
            hooks.enter_context(source.masked)
        hooks.callback(source.adapter.denoiser.register_forward_pre_hook(source.before_call, with_kwargs=True).remove)
        for layer in source.layers:
            for handle in _LayerHook(source, layer).hook():
                hooks.callback(handle.remove)
        yield


class _Source:
    """Where biases come from, and the call in progress."""

    def __init__(self, adapter: Any, layers: Sequence[AttentionLayer]) -> None:
        self.adapter = adapter
        self.layers = layers
        self.rows = slice(0, 0)  # of the call in progress that see the prompt
        self.batch = 0
        self.masked = _Masked()

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.masked.bias = None
        self.end()
        if is_left_alone(self.adapter.denoiser):
            return
        call = self.adapter.read_call(args, kwargs)
        self.batch = call.batch
        if call.conditional:
            self.rows = self.adapter.conditional_rows(call.batch)
            self.begin()

    def begin(self) -> None:
        """A call that sees the prompt begins."""
        raise NotImplementedError

    def end(self) -> None:
        """The last one is over."""
        raise NotImplementedError

    def bias(self, layer: AttentionLayer, size: tuple[int, int], text: int, like: Tensor) -> Tensor | None:
        """What is added to the scores of a layer, (h*w, text positions) or (row that sees the prompt, h*w, text
        positions); None when that is nothing."""
        raise NotImplementedError

    def replaced(
        self, layer: AttentionLayer, size: tuple[int, int], text: int
    ) -> list[tuple[list[int], list[int], Tensor]]:
        """What is replaced in a layer: positions, those that they become like, and the share of it in each cell."""
        return []


class _Bias(_Source):
    """A bias an image."""

    def __init__(self, adapter: Any, bias_of: BiasOf) -> None:
        super().__init__(adapter, adapter.layers())
        self.bias_of = bias_of
        self.going = False

    def begin(self) -> None:
        self.going = True

    def end(self) -> None:
        self.going = False

    def bias(self, layer: AttentionLayer, size: tuple[int, int], text: int, like: Tensor) -> Tensor | None:
        bias = self.bias_of(layer, size, text) if self.going else None
        return None if bias is None else bias.clamp(min=_NEVER).to(like.device, like.dtype)


class _Editor(_Source):
    """The edits of one block."""

    def __init__(self, adapter: Any, prompt: Prompt, edits: Sequence[Edit]) -> None:
        self.prompt = prompt
        self.edits = edits
        self.calls = 0
        self.active: tuple[int, ...] = ()  # edits that act in it
        known = adapter.layers()
        self.named = [{layer.name for layer in select_layers(known, each.layers)} for each in edits]
        for i, each in enumerate(edits):
            _positions(prompt, each.tokens, prompt.length)
            if each.like is not None:
                _positions(prompt, each.like, prompt.length)
                if joint := [layer.name for layer in known if layer.name in self.named[i] and layer.kind != "cross"]:
                    raise RecordingError(
                        f"like={each.like!r}: layer {joint[0]} attends to image and text at once, where logits "
                        "cannot be replaced. Use scale or add, or a model with cross-attention."
                    )
        super().__init__(adapter, [layer for layer in known if any(layer.name in names for names in self.named)])
        self._made: dict[Any, Tensor | None] = {}

    def begin(self) -> None:
        self.active = tuple(i for i, each in enumerate(self.edits) if each.acts(self.calls))
        self.calls += 1

    def end(self) -> None:
        self.active = ()

    def bias(self, layer: AttentionLayer, size: tuple[int, int], text: int, like: Tensor) -> Tensor | None:
        acting = tuple(i for i in self.active if layer.name in self.named[i])
        if not acting:
            return None
        key = (acting, size, text, like.device, like.dtype)
        if key not in self._made:
            bias = torch.zeros(size[0] * size[1], text, dtype=torch.float64)
            for i in acting:
                bias[:, _positions(self.prompt, self.edits[i].tokens, text)] += _log_factor(self.edits[i], size)
            bias = bias.clamp(min=_NEVER)
            self._made[key] = bias.to(like.device, like.dtype) if bool(bias.any()) else None
        return self._made[key]

    def replaced(
        self, layer: AttentionLayer, size: tuple[int, int], text: int
    ) -> list[tuple[list[int], list[int], Tensor]]:
        found = []
        for i in self.active:
            change = self.edits[i]
            if change.like is None or layer.name not in self.named[i]:
                continue
            there, like = (_positions(self.prompt, which, text) for which in (change.tokens, change.like))
            if there != like:
                found.append((there, like, _share(change, size).reshape(-1, 1)))
        return found


class _LayerHook:
    """Gives one layer its bias."""

    def __init__(self, source: _Source, layer: AttentionLayer) -> None:
        self.source = source
        self.layer = layer
        self.size = (0, 0)

    def hook(self) -> list[Any]:
        # Before all other hooks of the layer, so that recording sees the bias.
        return [
            self.layer.block.register_forward_pre_hook(self.enter_block, with_kwargs=True),
            self.layer.module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True),
            self.layer.module.register_forward_hook(self.leave, always_call=True),
        ]

    def enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = self.layer.grid(args, kwargs)

    def enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        image = argument(args, kwargs, 0, "hidden_states")
        if self.layer.kind == "single":
            text = image.shape[1] - self.size[0] * self.size[1]
        else:
            words = argument(args, kwargs, 1, "encoder_hidden_states")
            text = (words[0] if isinstance(words, tuple) else words).shape[1]  # an IP-Adapter comes in a tuple
        small = self.source.bias(self.layer, self.size, text, image)
        replaced = self.source.replaced(self.layer, self.size, text)
        if small is None and not replaced:
            return None
        bias = None if small is None else self._of_all_keys(small)
        if replaced:
            instead = self._differences(image, words[0] if isinstance(words, tuple) else words, replaced)
            bias = instead if bias is None else bias.repeat_interleave(self.layer.heads, dim=0) + instead
        assert bias is not None
        given = argument(args, kwargs, 2, "attention_mask")
        if given is not None:
            if given.dtype == torch.bool:
                given = torch.zeros_like(given, dtype=bias.dtype).masked_fill(~given, _NEVER)
            given = given.unsqueeze(1) if given.ndim == 3 and bias.ndim == 4 else given
            if given.ndim == 3 and 1 < len(given) < len(bias):
                given = given.repeat_interleave(self.layer.heads, dim=0)
        mask = bias if given is None else bias + given
        if not self.layer.takes_mask:
            self.source.masked.bias = bias
        if len(args) > 2:
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    @torch.no_grad()
    def _differences(
        self, image: Tensor, words: Tensor, replaced: Sequence[tuple[list[int], list[int], Tensor]]
    ) -> Tensor:
        """What brings logits to those of other tokens, (rows x heads, h*w, text).

        Queries and keys are projected once more: the layer's own come only after its mask is prepared.
        """
        module: Any = self.layer.module
        if getattr(module, "norm_cross", None):
            words = module.norm_encoder_hidden_states(words)
        query, key = (x.unflatten(-1, (self.layer.heads, -1)) for x in (module.to_q(image), module.to_k(words)))
        query, key = (
            x if norm is None else norm(x)
            for x, norm in zip(
                (query, key), (getattr(module, name, None) for name in ("norm_q", "norm_k")), strict=True
            )
        )
        logits = module.scale * torch.einsum("rnhd,rkhd->rhnk", query.float(), key.float())
        bias = torch.zeros_like(logits)
        for there, like, share in replaced:
            wanted = logits[..., like].mean(-1, keepdim=True)
            bias[..., there] += share.to(logits) * (wanted - logits[..., there])
        seen = torch.zeros(len(bias), 1, 1, 1, dtype=torch.bool, device=bias.device)
        seen[self.source.rows] = True
        return torch.where(seen, bias, torch.zeros_like(bias)).flatten(0, 1).to(image.dtype)

    def _of_all_keys(self, small: Tensor) -> Tensor:
        """A bias of rows that see the prompt -> of all rows and keys.

        (h*w, text) or (row that sees it, h*w, text) -> (row, h*w, text) for cross-attention, (row, 1, query, key) for
        joint attention.
        """
        cells, words = small.shape[-2:]
        every = small.new_zeros(self.source.batch, cells, words)
        every[self.source.rows] = small
        if self.layer.kind == "cross":
            return every
        before, after = (words, 0) if self.layer.text_first else (0, words)
        columns = (0, cells) if self.layer.text_first else (cells, 0)
        return F.pad(every, (*columns, before, after)).unsqueeze(1)

    def leave(self, *_: Any) -> None:
        self.source.masked.bias = None


class _Masked(TorchFunctionMode):
    """Adds a bias where attention is computed, while there is one: for processors that leave their mask unread."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if self.bias is not None and func is F.scaled_dot_product_attention:
            query, key = (argument(args, kwargs, i, name) for i, name in enumerate(("query", "key")))
            # An IP-Adapter's attention to its image has other keys.
            if (query.shape[-2], key.shape[-2]) == tuple(self.bias.shape[-2:]):
                given = argument(args, kwargs, 3, "attn_mask")
                bias = self.bias.to(query.dtype)
                args, rest = args[:3], args[4:]
                kwargs |= dict(zip(("dropout_p", "is_causal"), rest, strict=False))
                kwargs["attn_mask"] = bias if given is None else bias + given
        return func(*args, **kwargs)


def _as_sequence(what: Any) -> tuple[Any, ...]:
    return () if what is None else tuple(what) if isinstance(what, Sequence) and not isinstance(what, str) else (what,)


def _region(region: Any) -> Tensor:
    values = region.values if hasattr(region, "dims") else region
    return torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values.detach().cpu()).double()


def _log_factor(change: Edit, size: tuple[int, int]) -> Tensor:
    """Logarithm of the factor of each cell, (h*w, 1)."""
    return torch.log1p(_share(change, size) * (change.factor - 1)).clamp(min=_NEVER).reshape(-1, 1)


def _share(change: Edit, size: tuple[int, int]) -> Tensor:
    """Share of each cell that the region covers, (h, w)."""
    if change.region is None:
        return torch.ones(size, dtype=torch.float64)
    return F.interpolate(_region(change.region)[None, None], size=size, mode="area")[0, 0]


def _positions(prompt: Prompt, tokens: Any, length: int) -> list[int]:
    found: set[int] = set()
    for which in _as_sequence(tokens):
        if which == START:
            if prompt.start_index is None:
                raise RecordingError("This model's text has no start token; give '<end>' or a word.")
            found.add(prompt.start_index)
        elif which == END:
            found.update(prompt.end_positions(length))
        else:
            found.update(find_tokens(prompt, which))
    return sorted(position for position in found if position < length)
