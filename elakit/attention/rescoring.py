"""Changes of attention scores that are computed as each layer runs, in all layers of all families.

`elakit.attention.edit` adds a bias that is known before the run. Here a function is called for each layer and each
image of a pass, and returns the bias that is added to the layer's scores before the softmax; the function may compute
it from the scores. In layers of plain cross- and self-attention the bias is added to the attention mask; in all other
layers it is added at the attention call (`elakit.attention.calls.biasing`). No processor is replaced, and a recording
contains the changed attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from elakit.attention.calls import NEVER, AttentionCall, additive, biasing
from elakit.attention.hooks import Hooks, is_left_alone
from elakit.attention.running import Watch
from elakit.attention.taps import LATE_SCORES, check_processor, scores_mask
from elakit.errors import ModelError, RecordingError, SettingError
from elakit.models import Adapter, AttentionLayer
from elakit.models.adapter import Layout, argument


class Scores(Protocol):
    """Attention scores of one image in one layer, which are computed when they are requested."""

    def __call__(self, *, masked: bool = False) -> Tensor:
        """Compute the scores before the softmax, (head, h*w, keys), in float32 or float64.

        ``masked`` adds the layer's own attention mask.
        """


@dataclass(frozen=True)
class Change:
    """Change of a layer's scores for one image.

    Attributes
    ----------
    bias : Tensor, (head or 1, h*w, keys)
        Numbers that are added to the scores before the softmax.
    kept : tuple of int
        Positions of keys whose attention weights are to remain what they are without the bias. The softmax over all
        keys would change them, so the output of the layer is corrected afterwards; with this correction, the weights of
        a location no longer sum to 1. A recording does not contain the correction: it shows the softmax of the biased
        scores for all keys. Only layers of plain cross- and self-attention can keep weights.
    unconditional : bool
        Whether the bias is also added in the rows of this image that do not see the prompt.
    keys : slice, optional
        Keys of the layer to which the last dimension of ``bias`` belongs. Default: all keys.
    """

    bias: Tensor
    kept: tuple[int, ...] = ()
    unconditional: bool = False
    keys: slice | None = None


@dataclass(frozen=True)
class Site:
    """Layer, image and timestep at which scores are changed.

    Attributes
    ----------
    layer : AttentionLayer
    size : tuple of int
        (h, w) of the layer's maps.
    image : int
        Index of the image in the batch.
    time : float
        Timestep divided by the number of training timesteps, from 1 (noise) to 0 (image).
    keys : int
        Number of keys of the layer.
    text : slice, optional
        Keys that are text positions; None in self-attention.
    own : slice, optional
        Keys that are locations of the image; None in cross-attention.
    position : float
        Share of the denoiser's layers that run before this one, from 0 to 1.
    read : bool
        Whether the layer is in the ``read`` argument of `rescored`.
    gradient : bool
        True in a pass in which guidance computes a gradient, False in a pass of the pipeline.
    """

    layer: AttentionLayer
    size: tuple[int, int]
    image: int
    time: float
    keys: int
    text: slice | None = None
    own: slice | None = None
    position: float = 0.0
    read: bool = True
    gradient: bool = False


ChangeOf = Callable[[Site, Scores], Change | None]


@contextmanager
def rescored(
    adapter: Adapter,
    layers: Sequence[AttentionLayer],
    change_of: ChangeOf,
    *,
    read: Sequence[AttentionLayer] = (),
    gradient: bool = False,
) -> Iterator[None]:
    """Change the attention scores of some layers in each pass of the denoiser inside the ``with`` block.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers to change, among those of `changeable_layers`.
    change_of : callable
        Function that is called as ``change_of(site, scores)`` when a layer runs, for each image of the batch, and
        returns a `Change` or None. ``scores()`` computes the scores of the image's row that sees the prompt. If all
        calls in a pass return None, the pass is unchanged, bit for bit.
    read : sequence of AttentionLayer
        Layers whose attention the method reads. They are marked for ``change_of``: their `Site.read` is True.
    gradient : bool
        False changes the passes of the pipeline. True changes only the passes in which guidance computes gradients:
        passes inside `elakit.attention.paused`, in which all rows see the prompt.

    Raises
    ------
    RecordingError
        Raised when a layer has an attention processor that is not from diffusers, or runs without the attention call at
        which the change would be added.
    SettingError
        Raised when `Change.kept` is used in a layer that is not of plain cross- or self-attention.

    Examples
    --------
    >>> import elakit
    >>> from elakit.models import adapter_for
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [cat] and a [lion]", pipe)
    >>> def no_lion(site, scores):
    ...     bias = torch.zeros(1, site.size[0] * site.size[1], site.keys)
    ...     bias[..., list(prompt.entities[1].token_indices)] = -50
    ...     return Change(bias)
    >>> adapter = adapter_for(pipe)
    >>> with rescored(adapter, adapter.layers(), no_lion), elakit.record(pipe, prompt) as recording:
    ...     image = pipe(prompt.text, num_inference_steps=1).images[0]
    >>> float(recording.maps("lion").max()) < 1e-6 < float(recording.maps("cat").max())
    True
    """
    positions = _positions(adapter)
    running = _Running(adapter, change_of, gradient)
    placed = [_Changed(running, layer, positions.get(layer.name, 0.0), layer in read) for layer in layers]
    with ExitStack() as stack:
        stack.callback(running.watch.close)
        hooks = stack.enter_context(Hooks())
        hooks.before(adapter.denoiser, running.begin)
        for each in placed:
            check_processor(each.layer)
            stack.callback(each.forget)
            each.place(hooks)
        if not all(each.by_mask for each in placed):
            stack.enter_context(biasing(running.bias_of))
        yield


def changeable_layers(adapter: Adapter) -> tuple[AttentionLayer, ...]:
    """Layers whose scores `rescored` can change: those in which the image attends to the text or to itself.

    The layers are in forward order. In joint attention, one layer does both. Layers of linear self-attention (Sana) are
    not included, because they have no scores.

    Examples
    --------
    >>> import elakit
    >>> from elakit.models import adapter_for
    >>> {layer.reads for layer in changeable_layers(adapter_for(elakit.load("picture-world")))} == {"text", "image"}
    True
    """
    return tuple(each for layer in adapter.layers() for each in (layer, *_beside(adapter, layer)))


def check_plain(layers: Sequence[AttentionLayer], who: str) -> None:
    """Refuse layers other than plain cross- and self-attention layers, for a method that can only change these.

    Parameters
    ----------
    layers : sequence of AttentionLayer
    who : str
        Name of the method, for the message.

    Raises
    ------
    SettingError
        Raised when image and text share one softmax in a layer, or the layer is read at its attention call (Sana,
        HunyuanDiT).
    """
    for layer in layers:
        if not _is_plain(layer):
            raise SettingError(
                f"{who} cannot change the scores of layer {layer.name}, because it is not a plain cross- or "
                "self-attention layer. Use a model with plain cross-attention (Stable Diffusion 1.x, 2.x, XL, Kolors, "
                "PixArt), or another method, such as elakit.ELA()."
            )


def _is_plain(layer: AttentionLayer) -> bool:
    return layer.kind == "cross" and layer.layout is None


def _beside(adapter: Adapter, layer: AttentionLayer) -> tuple[AttentionLayer, ...]:
    """Self-attention layer in the block of a cross-attention layer; empty if there is none.

    The result is also empty if the self-attention is linear and therefore has no scores, or if ``layer`` is not a
    cross-attention layer.
    """
    if layer.kind != "cross":
        return ()
    try:
        return adapter.self_layers([layer])
    except ModelError:
        return ()


def _positions(adapter: Adapter) -> dict[str, float]:
    """Share of the denoiser's layers that run before each layer, by the name of the layer."""
    every = adapter.layers()
    return {
        each.name: nth / len(every) for nth, layer in enumerate(every) for each in (layer, *_beside(adapter, layer))
    }


class _Running:
    """State of the pass in progress: batch size, time, rows that see the prompt, layer whose attention call is next."""

    def __init__(self, adapter: Adapter, change_of: ChangeOf, gradient: bool) -> None:
        self.adapter = adapter
        self.change_of = change_of
        self.gradient = gradient
        self.watch = Watch(adapter)
        self.training_steps = int(getattr(adapter.pipe.scheduler.config, "num_train_timesteps", 1000))
        self.batch = 0
        self.time = 0.0
        self.rows: slice | None = None
        self.awaited: _Changed | None = None

    def begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows = self.awaited = None
        if self.gradient:
            if not is_left_alone(self.adapter.denoiser):
                return
            call = self.adapter.read_call(args, kwargs)
            self.rows = slice(0, call.batch)
        else:
            seen = self.watch.read(args, kwargs)
            if seen is None:
                return
            call, self.rows = seen.call, seen.rows
        self.batch, self.time = call.batch, call.timestep / self.training_steps

    def bias_of(self, call: AttentionCall) -> Tensor | None:
        """Bias of an attention call."""
        layer, self.awaited = self.awaited, None  # only the first call of a layer is to the text
        return None if layer is None else layer.at_call(call)


class _Changed:
    """One layer whose scores are changed."""

    def __init__(self, running: _Running, layer: AttentionLayer, position: float, read: bool) -> None:
        self.running = running
        self.layer = layer
        self.position = position
        self.read = read
        self.by_mask = _is_plain(layer) and layer.takes_mask
        self.size = (0, 0)
        self.layout: Layout | None = None
        self.missing: Tensor | None = None  # what the kept weights add to the layer's output

    def place(self, hooks: Hooks) -> None:
        hooks.before(self.layer.block, self._enter_block)
        hooks.before(self.layer.module, self._enter, first=True)
        hooks.after(self.layer.module, self._leave, always=True)

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layout = None if self.layer.layout is None else self.layer.layout(args, kwargs)
        self.size = self.layer.grid(args, kwargs) if self.layout is None else self.layout.size

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.forget()
        if self.running.rows is None:
            return None
        if self.by_mask:
            return self._masked(args, kwargs)
        self.running.awaited = self
        return None

    def forget(self) -> None:
        """Discard the bias and the correction of the layer's last call.

        This is not done as soon as the layer has run, because the hooks that read its attention
        (`elakit.attention.taps`) need the bias, and may run after the hooks of this object.
        """
        self.missing = None
        LATE_SCORES.pop(self.layer.module, None)

    def _leave(self, _: nn.Module, args: Any, kwargs: Any, output: Tensor | None) -> Tensor | None:
        awaited, self.running.awaited = self.running.awaited, None
        missing, self.missing = self.missing, None
        if output is None:  # the layer raised an error
            return None
        if awaited is self:
            raise RecordingError(
                f"Layer {self.layer.name} ran without calling F.scaled_dot_product_attention, but its scores are "
                "changed at this call. Before the run, set the default attention processor of the denoiser (the "
                "pipeline's `unet` or `transformer`), and call its `set_attention_backend('native')`."
            )
        return None if missing is None else output + missing

    def _changes(
        self, keys: int, text: slice | None, own: slice | None, scores_of: Callable[..., Tensor]
    ) -> dict[int, Change]:
        """Changes by row; ``scores_of(row, masked=...)`` computes the scores of a row."""
        running = self.running
        assert running.rows is not None
        first, past, _ = running.rows.indices(running.batch)
        changes: dict[int, Change] = {}
        for row in range(first, past):
            site = Site(
                layer=self.layer, size=self.size, image=row - first, time=running.time, keys=keys, text=text, own=own,
                position=self.position, read=self.read, gradient=running.gradient,
            )  # fmt: skip
            change = running.change_of(site, partial(scores_of, row))
            if change is not None:
                changes[row] = change
        return changes

    def _bias(self, changes: dict[int, Change], like: Tensor, queries: int, keys: int, image: int) -> Tensor:
        """Bias that is added to the attention scores of a batch: a tensor with the axes row, head, query and key.

        There is only one head if all changes are the same for all heads. `image` is the position of the image's first
        query.
        """
        running = self.running
        assert running.rows is not None
        first, past, _ = running.rows.indices(running.batch)
        heads = max(len(change.bias) for change in changes.values())
        bias = torch.zeros((running.batch, heads, queries, keys), dtype=like.dtype, device=like.device)
        for row, change in changes.items():
            rows = slice(row - first, running.batch, past - first) if change.unconditional else slice(row, row + 1)
            there = slice(image, image + math.prod(self.size))
            bias[rows, :, there, change.keys or slice(None)] = change.bias.clamp(min=NEVER).to(bias)
        return bias

    # -- plain cross- and self-attention, through the mask ---------------------------------------------------------

    def _masked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Arguments of the layer, (args, kwargs), with the bias in the attention mask; None if nothing changes."""
        image = argument(args, kwargs, 0, "hidden_states")
        words = argument(args, kwargs, 1, "encoder_hidden_states")
        words = words[0] if isinstance(words, tuple) else words  # an IP-Adapter comes in a tuple
        to_image = words is None or self.layer.reads == "image"
        keys = image if to_image else words
        batch, count = self.running.batch, keys.shape[1]
        mask = scores_mask(argument(args, kwargs, 2, "attention_mask"), self.layer, batch, count)
        given = None if mask is None else additive(mask, image.dtype)

        def scores_of(row: int, *, masked: bool = False) -> Tensor:
            scores = self._scores(image[row], keys[row])
            return scores + given[row if len(given) > 1 else 0] if masked and given is not None else scores

        every = slice(0, count)
        changes = self._changes(count, None if to_image else every, every if to_image else None, scores_of)
        if not changes:
            return None
        bias = self._bias(changes, image, image.shape[1], count, 0)
        for row, change in changes.items():
            if change.kept:
                self._keep(row, image, keys, change, bias, scores_of(row, masked=True))
        whole = bias if given is None else bias + given
        attention_mask = whole.flatten(0, 1)  # (row or row x head, query, key)
        if len(args) > 2:
            return (*args[:2], attention_mask, *args[3:]), kwargs
        return args, {**kwargs, "attention_mask": attention_mask}

    def _scores(self, image: Tensor, keys: Tensor) -> Tensor:
        """Scores of one row, (head, h*w, keys).

        Queries and keys are projected once more, because the mask is an argument of the layer and must be known before
        the layer projects them.
        """
        module: Any = self.layer.module
        if self.layer.reads != "image" and getattr(module, "norm_cross", None):
            keys = module.norm_encoder_hidden_states(keys[None])[0]
        query, key = (x.unflatten(-1, (self.layer.heads, -1)) for x in (module.to_q(image), module.to_k(keys)))
        query, key = (
            x if norm is None else norm(x)
            for x, norm in zip((query, key), (getattr(module, n, None) for n in ("norm_q", "norm_k")), strict=True)
        )
        precision = torch.promote_types(query.dtype, torch.float32)
        scores: Tensor = module.scale * torch.einsum("nhd,khd->hnk", query.to(precision), key.to(precision))
        return scores

    def _keep(self, row: int, image: Tensor, keys: Tensor, change: Change, bias: Tensor, scores: Tensor) -> None:
        """Compute the correction of the layer's output in one row, and store it in ``self.missing``.

        The correction gives the kept keys (`Change.kept`) the weights that they have without the bias. ``scores`` are
        those of the row without the bias, (head, h*w, keys).
        """
        module: Any = self.layer.module
        kept = list(change.kept)
        differences = (scores.softmax(-1) - (scores + bias[row]).softmax(-1))[..., kept]
        if self.layer.reads != "image" and getattr(module, "norm_cross", None):
            keys = module.norm_encoder_hidden_states(keys)
        values = module.to_v(keys[row, kept]).unflatten(-1, (self.layer.heads, -1)).to(differences)
        added = torch.einsum("hnk,khd->nhd", differences, values).flatten(1).to(image.dtype)
        projected = module.to_out[0](added) - module.to_out[0](torch.zeros_like(added[:1]))
        if self.missing is None:
            self.missing = torch.zeros_like(image)
        self.missing[row] = projected / module.rescale_output_factor

    # -- all other layers, at the attention call -------------------------------------------------------------------

    def at_call(self, call: AttentionCall) -> Tensor | None:
        """Bias of the layer's attention call; None if nothing changes."""
        queries, keys = call.query.shape[-2], call.key.shape[-2]
        text, own, first = self._parts(keys)
        there = slice(first, first + math.prod(self.size))
        changes = self._changes(keys, text, own, partial(_scores_of, call, there))
        if not changes:
            return None
        if any(change.kept for change in changes.values()):
            raise SettingError(
                f"Layer {self.layer.name}: weights cannot be kept in a layer that is not of plain cross- or "
                "self-attention. Leave out `Change.kept`, or use a model with plain cross-attention."
            )
        bias = self._bias(changes, call.query, queries, keys, first)
        if self.layout is None:
            added = LATE_SCORES.get(self.layer.module)  # by another block
            LATE_SCORES[self.layer.module] = bias if added is None else bias + added
        return bias

    def _parts(self, keys: int) -> tuple[slice | None, slice | None, int]:
        """Keys that are text, keys that are locations of the image, and the position of the image's first query."""
        locations = math.prod(self.size)
        if self.layout is not None:
            start, count = self.layout.text
            text, image = slice(start, start + count), self.layout.image
        else:
            count = keys - locations
            text = slice(0, count) if self.layer.text_first else slice(locations, keys)
            image = count if self.layer.text_first else 0
        if self.layer.kind != "cross":
            return text, slice(image, image + locations), image
        return (None, slice(0, locations), 0) if self.layer.reads == "image" else (text, None, 0)


def _scores_of(call: AttentionCall, queries: slice, row: int, *, masked: bool = False) -> Tensor:
    """Scores of one row of an attention call, (head, query, key)."""
    precision = torch.promote_types(call.query.dtype, torch.float32)
    query, key = call.query[row, :, queries].to(precision), call.key[row].to(precision)
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # grouped queries
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale)
    if not masked or call.mask is None:
        return scores
    mask = additive(call.mask, precision)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    mask = mask[row if mask.shape[0] > 1 else 0]
    return scores + (mask[:, queries] if mask.shape[1] > 1 else mask)
