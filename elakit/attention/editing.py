"""Edits of attention: changing what the locations of the image attend to, in chosen regions, steps and layers.

An edit is a bias that is added to the attention scores before the softmax. Hooks add the bias to the attention mask of
the layer. Where the attention processor ignores masks, the bias is added to the scores at the attention call instead.
No processor is replaced, and a recording contains the changed attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from torch import Tensor, nn

from elakit.attention.calls import NEVER, AttentionCall, additive, biasing
from elakit.attention.hooks import Hooks
from elakit.attention.running import SeenCall, Watch
from elakit.attention.spec import END, START, find_tokens, select_layers
from elakit.attention.taps import ADDED_SCORES, check_processor, scores_mask
from elakit.checks import is_whole, whole_number
from elakit.errors import RecordingError, SettingError
from elakit.measures.arrays import area_mean
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.models.adapter import Layout as CallLayout
from elakit.models.adapter import argument
from elakit.pipeline import Pipeline
from elakit.prompt import Entity, Prompt, parse


@dataclass(frozen=True, eq=False)  # regions are arrays, whose == is not a single truth value
class Edit:
    """One change of the attention to some tokens of the prompt.

    Parameters
    ----------
    tokens : str, int, Entity or a sequence of these
        Tokens to which the attention is changed: a word, label, phrase, entity or position of the prompt, or several.
        ``"<start>"`` is start-of-text; ``"<end>"`` is end-of-text and padding.
    scale : float
        Factor by which the weights of ``tokens`` are multiplied, before the weights of all tokens are normalized to a
        sum of 1. This adds ``log(scale)`` to the logits of ``tokens``. 0 masks the tokens; 1 changes nothing.
    add : float
        Number from -100 to 100 that is added to the logits of ``tokens``. ``add=math.log(2)`` has the same effect as
        ``scale=2``.
    like : str, int or Entity, optional
        Another token, whose logits replace the logits of ``tokens``. If this other token has several positions, the
        mean of its logits is used. The image then attends to ``tokens`` exactly as to the other token, but still
        receives the values of ``tokens``. ``like`` excludes ``scale`` and ``add``. It requires plain cross-attention
        (Stable Diffusion 1.x and 2.x, SDXL, Kolors, PixArt).
    region : array, (y, x), optional
        Part of the image in which the edit acts, as an array of any resolution. Booleans are True inside the region.
        Numbers from 0 to 1 are the share of each array element that lies inside the region. Default: the whole image.
    steps : int, slice or sequence of int, optional
        Denoiser calls in which the edit acts, counted from 0 at the start of the ``with edit(...)`` block. A second run
        in the block continues the count. Default: all.
    layers : str or sequence of str
        Layers in which the edit acts: ``"all"``, a place such as ``"up"``, a pattern of names, or several of these.
        `select_layers` describes them.

    Raises
    ------
    SettingError
        Raised when a value is not allowed.

    Notes
    -----
    Let ``p`` be the attention probability of one token at a location. If the token's weight is multiplied by ``f``, the
    probability becomes ``f p / (1 + (f - 1) p)``. Inside the region, ``f`` is ``scale * exp(add)``. If the region
    covers only a share ``r`` of the location, the weight is multiplied by ``1 + r (f - 1)`` instead.

    With ``like``, the logit ``x`` of one of ``tokens`` becomes ``(1 - r) x + r y``. Here, ``y`` is the logit of the
    other token at the same location. Without a region, ``r`` is 1.

    Examples
    --------
    Mask the word "car" in the left half of the image, in the first five denoiser calls and in the decoder. ``factor``
    is ``scale * exp(add)``:

    >>> Edit("car", scale=0, region=[[True, False]], steps=slice(0, 5), layers="up").factor
    0.0

    A value that is not allowed raises an error:

    >>> Edit("car", add=float("nan"))
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: add is nan; give a number from -100 to 100 (0 changes nothing), or scale=0 to mask.
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
            raise SettingError(f"scale is {self.scale}; give a finite number, 0 or more (0 masks, 1 changes nothing).")
        if not -100 <= self.add <= 100:
            raise SettingError(
                f"add is {self.add}; give a number from -100 to 100 (0 changes nothing), or scale=0 to mask."
            )
        if self.like is not None and not (self.scale == 1 and self.add == 0):
            raise SettingError(
                f"like={self.like!r} with scale={self.scale} and add={self.add}: an edit either replaces logits by "
                "those of another token (like) or adjusts them (scale, add). Give two edits."
            )
        if not isinstance(self.tokens, str | Entity) and not is_whole(self.tokens) and not self.tokens:
            raise SettingError(f"tokens is {self.tokens!r}; give a word of the prompt, an entity or a position.")
        steps = self.steps
        numbers = (steps.start, steps.stop) if isinstance(steps, slice) else _as_sequence(steps)
        for number in numbers:
            if number is not None:
                whole_number(
                    number,
                    "steps",
                    0,
                    hint="Denoiser calls are counted from the start of the `with edit(...)` block: 0, 1, 2, ...",
                )
        if isinstance(steps, slice) and steps.step is not None and steps.step < 1:
            raise SettingError(f"steps={steps}: the stride must be positive. Give a slice such as slice(0, None, 2).")
        if self.region is not None:
            region = _region(self.region)
            if region.ndim != 2 or not region.size:
                raise SettingError(
                    f"region has shape {region.shape}; give an array of shape (y, x) with at least one element."
                )
            if not np.isfinite(region).all() or region.min() < 0 or region.max() > 1:
                raise SettingError(
                    "region has values that are NaN or outside 0 to 1; give booleans (True inside the region), or "
                    "numbers from 0 to 1: the share of each element that lies inside the region."
                )

    @property
    def factor(self) -> float:
        """Factor by which the weights of ``tokens`` are multiplied inside the region: ``scale * exp(add)``."""
        return self.scale * math.exp(self.add)

    def acts(self, call: int) -> bool:
        """Return whether the edit changes anything in denoiser call number ``call``, counted from 0."""
        if self.factor == 1.0 and self.like is None:
            return False
        if isinstance(self.steps, slice):
            return call in range(call + 1)[self.steps]
        return self.steps is None or call in _as_sequence(self.steps)


@contextmanager
def edit(pipe: Pipeline, prompt: Prompt | str, edits: Edit | Sequence[Edit]) -> Iterator[None]:
    """Change the attention of the runs of ``pipe`` inside the ``with`` block.

    Only the attention of the image's locations is changed, and only in the rows of a batch that see the prompt. The
    edits of one block, and those of nested blocks, add up. `elakit.record` records the changed attention, whether its
    block is the inner or the outer one. An edit that changes nothing leaves the image the same, bit for bit.

    Edits act in the pipeline's own denoiser calls. A guidance method makes further denoiser calls, to compute gradients
    or to search for the initial noise. Edits do not act in these further calls, so the method sees the unedited
    attention. ``Edit.steps`` does not count the further calls, so it has the same meaning with and without guidance.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline of a supported family.
    prompt : Prompt or str
        The prompt that the pipeline is called with.
    edits : Edit or sequence of Edit
        Changes to make.

    Raises
    ------
    RecordingError
        Raised when an edit names a token that is not in the prompt, or a layer that is not in the model; when ``like``
        is used in a layer without plain cross-attention; and for the reasons listed in `elakit.record`.
    PromptError
        Raised when the prompt cannot be parsed.
    ModelError
        Raised when the pipeline's family is not supported.

    Notes
    -----
    While an edit acts in a layer, the layer has an attention mask of shape (image locations, keys). Some attention
    kernels take no mask, for example flash attention if it is set as the backend. These kernels then raise an error of
    their own.

    Examples
    --------
    Mask the word "car" in the left half of the image. The map of the car is then 0 in the left half, and positive in
    the right half:

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
    editor = _Editor(adapter_for(pipe), parse(prompt, pipe), [edits] if isinstance(edits, Edit) else list(edits))
    for layer in editor.layers:
        check_processor(layer)
    with ExitStack() as stack:
        stack.callback(editor.watch.close)
        if not all(layer.takes_mask for layer in editor.layers):
            stack.enter_context(biasing(editor.pending.bias_of))
        hooks = stack.enter_context(Hooks())
        hooks.before(editor.adapter.denoiser, editor.before_call)
        for layer in editor.layers:
            _LayerHook(editor, layer).place(hooks)
        yield


class _Editor:
    """State of one `edit` block: its edits, and the denoiser call in progress."""

    def __init__(self, adapter: Adapter, prompt: Prompt, edits: Sequence[Edit]) -> None:
        self.adapter = adapter
        self.prompt = prompt
        self.edits = edits
        self.watch = Watch(adapter, prompt)
        self.seen: SeenCall | None = None  # the call in progress
        self.pending = _Pending()
        self.calls = 0
        self.active: tuple[int, ...] = ()  # edits that act in the call in progress
        known = adapter.layers()
        self.named = [{layer.name for layer in select_layers(known, each.layers)} for each in edits]
        for i, each in enumerate(edits):
            _positions(prompt, each.tokens, prompt.length)
            if each.like is not None:
                _positions(prompt, each.like, prompt.length)
                if others := [
                    layer.name for layer in known if layer.name in self.named[i] and not _takes_other_logits(layer)
                ]:
                    raise RecordingError(
                        f"like={each.like!r}: layer {others[0]} is not a plain cross-attention layer, so its logits "
                        "cannot be replaced. Use scale or add, or a model with plain cross-attention (Stable Diffusion "
                        "1.x, 2.x, XL, Kolors, PixArt)."
                    )
        self.layers = [layer for layer in known if any(layer.name in names for names in self.named)]
        self._made: dict[Any, Tensor | None] = {}

    def before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.pending.clear()
        self.active = ()
        self.seen = self.watch.read(args, kwargs)
        if self.seen is not None:
            self.active = tuple(i for i, each in enumerate(self.edits) if each.acts(self.calls))
            self.calls += 1

    def bias(self, layer: AttentionLayer, size: tuple[int, int], text: int, like: Tensor) -> Tensor | None:
        """Compute the bias of a layer's scores in the current call, from ``scale`` and ``add`` of the edits.

        Parameters
        ----------
        layer : AttentionLayer
        size : (h, w)
            Size of the layer's maps.
        text : int
            Number of text positions.
        like : torch.Tensor
            Tensor whose data type and device the bias gets. It is not the option `Edit.like`.

        Returns
        -------
        torch.Tensor or None, (h*w, text)
            The bias. None if no edit changes the scores of this layer by ``scale`` or ``add``.
        """
        acting = tuple(i for i in self.active if layer.name in self.named[i])
        if not acting:
            return None
        key = (acting, size, text, like.device, like.dtype)
        if key not in self._made:
            bias = torch.zeros(size[0] * size[1], text, dtype=torch.float64)
            for i in acting:
                bias[:, self._positions(self.edits[i].tokens, text)] += _log_factor(self.edits[i], size)
            bias = bias.clamp(min=NEVER)
            self._made[key] = bias.to(like.device, like.dtype) if bool(bias.any()) else None
        return self._made[key]

    def replaced(
        self, layer: AttentionLayer, size: tuple[int, int], text: int
    ) -> list[tuple[list[int], list[int], Tensor]]:
        """List the replacements of logits in a layer, one for each active edit with ``like``.

        Each replacement is a tuple of three elements. The first lists the text positions whose logits are replaced. The
        second lists the text positions whose mean logit is used instead. The third is the share of each location that
        lies in the edit's region, (h*w, 1).

        ``size`` is the (h, w) of the layer's maps. ``text`` is the number of text positions.
        """
        found = []
        for i in self.active:
            change = self.edits[i]
            if change.like is None or layer.name not in self.named[i]:
                continue
            there, like = (self._positions(which, text) for which in (change.tokens, change.like))
            if there != like:
                found.append((there, like, _share(change, size).reshape(-1, 1)))
        return found

    def _positions(self, tokens: Any, length: int) -> list[int]:
        """Return the positions of ``tokens`` in the text of the denoiser call in progress.

        ``length`` is the number of positions that the layer receives as text. Image tokens that follow the text (FLUX
        Redux) are left out, so that they do not count as padding.
        """
        limit = self.seen.text if self.seen is not None else None
        return _positions(self.prompt, tokens, length if limit is None else min(length, limit))


class _LayerHook:
    """Hooks that add the edits' bias to one layer."""

    def __init__(self, editor: _Editor, layer: AttentionLayer) -> None:
        self.editor = editor
        self.layer = layer
        self.size = (0, 0)
        self.layout: CallLayout | None = None

    def place(self, hooks: Hooks) -> None:
        hooks.before(self.layer.block, self.enter_block)
        # Before all other hooks of the layer, so that recording sees the bias.
        hooks.before(self.layer.module, self.enter, first=True)
        hooks.after(self.layer.module, self.leave, always=True)

    def enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layout = None if self.layer.layout is None else self.layer.layout(args, kwargs)
        self.size = self.layer.grid(args, kwargs) if self.layout is None else self.layout.size

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.editor.seen is None:
            return None
        if self.layout is not None:
            pending = self.editor.pending
            like = argument(args, kwargs, 0, "hidden_states")
            pending.small = self.editor.bias(self.layer, self.size, self.layout.text[1], like)
            pending.rows, pending.layout = self.editor.seen.rows, self.layout
            return None
        image = argument(args, kwargs, 0, "hidden_states")
        if self.layer.kind == "single":
            text = image.shape[1] - self.size[0] * self.size[1]
        else:
            words = argument(args, kwargs, 1, "encoder_hidden_states")
            text = (words[0] if isinstance(words, tuple) else words).shape[1]  # an IP-Adapter comes in a tuple
        small = self.editor.bias(self.layer, self.size, text, image)
        replaced = self.editor.replaced(self.layer, self.size, text)
        if small is None and not replaced:
            return None
        check_processor(self.layer)
        batch = self.editor.seen.call.batch
        bias = None if small is None else self._of_all_keys(small)
        if replaced:
            instead = self._differences(image, words[0] if isinstance(words, tuple) else words, replaced)
            bias = instead if bias is None else bias.repeat_interleave(self.layer.heads, dim=0) + instead
        assert bias is not None
        if not self.layer.takes_mask:
            self.editor.pending.full = bias
            ADDED_SCORES[module] = bias if module not in ADDED_SCORES else ADDED_SCORES[module] + bias
            return None
        mask = bias
        given = scores_mask(argument(args, kwargs, 2, "attention_mask"), self.layer, batch, bias.shape[-1])
        if given is not None:
            given = additive(given, bias.dtype)
            # (row, 1 or head, query, key)
            mask = (bias.unflatten(0, (batch, -1)) if self.layer.kind == "cross" else bias) + given
            mask = mask.flatten(0, 1) if self.layer.kind == "cross" else mask
        if len(args) > 2:
            return (*args[:2], mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    @torch.no_grad()
    def _differences(
        self, image: Tensor, words: Tensor, replaced: Sequence[tuple[list[int], list[int], Tensor]]
    ) -> Tensor:
        """Compute the bias that replaces the logits of some tokens by those of other tokens, (rows x heads, h*w, text).

        The bias of a token is its new logit minus its old logit, times the share of the location that lies in the
        region. The bias is 0 in rows that do not see the prompt.

        ``image`` and ``words`` are the hidden states that the layer receives. ``replaced`` is the result of
        `_Editor.replaced`. Queries and keys are computed here once more, because the layer prepares its mask before it
        computes its own queries and keys.
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
        assert self.editor.seen is not None
        seen[self.editor.seen.rows] = True
        return torch.where(seen, bias, torch.zeros_like(bias)).flatten(0, 1).to(image.dtype)

    def _of_all_keys(self, small: Tensor) -> Tensor:
        """Extend the bias ``small``, (h*w, text), to all rows, queries and keys of the layer.

        ``small`` is the bias for the rows that see the prompt, the queries of the image, and the keys of the text. All
        other elements of the result are 0. The result is (row, h*w, text) for cross-attention, and (row, 1, query, key)
        for joint attention.
        """
        seen = self.editor.seen
        assert seen is not None
        locations, words = small.shape[-2:]
        every = small.new_zeros(seen.call.batch, locations, words)
        every[seen.rows] = small
        if self.layer.kind == "cross":
            return every
        before, after = (words, 0) if self.layer.text_first else (0, words)
        columns = (0, locations) if self.layer.text_first else (locations, 0)
        return F.pad(every, (*columns, before, after)).unsqueeze(1)

    def leave(self, module: nn.Module, *_: Any) -> None:
        self.editor.pending.clear()
        ADDED_SCORES.pop(module, None)


class _Pending:
    """Bias of the layer that is running, kept until it is added to the scores at the layer's attention call.

    Layers that receive the bias as part of their attention mask do not need this object.
    """

    def __init__(self) -> None:
        self.small: Tensor | None = None  # (h*w, text positions)
        self.rows = slice(0, 0)
        self.layout: CallLayout | None = None
        self.full: Tensor | None = None  # of all rows, queries and keys

    def bias_of(self, call: AttentionCall) -> Tensor | None:
        sides = call.query.shape[-2], call.key.shape[-2]
        if self.full is not None:
            # The attention of an IP-Adapter to its image has other keys.
            return self.full if sides == tuple(self.full.shape[-2:]) else None
        if self.small is None or self.layout is None:
            return None
        small, layout, self.small = self.small, self.layout, None  # only the first call of the layer is to the text
        small = small.repeat(layout.frames, 1)
        bias = small.new_zeros(call.query.shape[0], 1, *sides)
        locations, (first, count) = small.shape[-2], layout.text
        bias[self.rows, 0, layout.image : layout.image + locations, first : first + count] = small
        return bias

    def clear(self) -> None:
        self.small = self.full = self.layout = None


def _takes_other_logits(layer: AttentionLayer) -> bool:
    """Return whether the option ``like`` of an edit is possible in a layer.

    The layer's keys must be those of the text alone, and hooks must see the layer's projections.
    """
    return layer.kind == "cross" and layer.layout is None


def _as_sequence(what: Any) -> tuple[Any, ...]:
    return () if what is None else tuple(what) if isinstance(what, Sequence) and not isinstance(what, str) else (what,)


def _region(region: Any) -> np.ndarray:
    """Return a region as a float64 array, (y, x).

    An `xarray.DataArray` may have its dimensions in either order.
    """
    if isinstance(region, xr.DataArray):
        if set(region.dims) != {"y", "x"}:
            raise SettingError(
                f"region has dimensions {region.dims}; give y and x only, for instance "
                'run.regions.sel(step=10, entity="car").'
            )
        region = region.transpose("y", "x").values
    return np.asarray(region.detach().cpu() if isinstance(region, Tensor) else region, np.float64)


def _log_factor(change: Edit, size: tuple[int, int]) -> Tensor:
    """Logarithm of the factor by which an edit multiplies the tokens' weights at each location, (h*w, 1).

    The factor is 1 outside the edit's region. ``size`` is the (h, w) of the map.
    """
    return torch.log1p(_share(change, size) * (change.factor - 1)).clamp(min=NEVER).reshape(-1, 1)


def _share(change: Edit, size: tuple[int, int]) -> Tensor:
    """Share of each location's area that lies in the edit's region, (h, w); 1 if the edit has no region."""
    if change.region is None:
        return torch.ones(size, dtype=torch.float64)
    return torch.from_numpy(area_mean(_region(change.region), size))


def _positions(prompt: Prompt, tokens: Any, length: int) -> list[int]:
    found: set[int] = set()
    for which in _as_sequence(tokens):
        if which == START:
            if prompt.start_index is None:
                raise RecordingError(
                    "'<start>' cannot be edited, because this model's text encoder has no start-of-text token; give "
                    "'<end>' or a word of the prompt."
                )
            found.add(prompt.start_index)
        elif which == END:
            found.update(prompt.end_positions(length))
        else:
            found.update(find_tokens(prompt, which))
    return sorted(position for position in found if position < length)
