"""Changes of attention scores during a run, in all layers of all model families.

`elakit.attention.edit` adds a bias that is known before the run. In this module, the bias may depend on the scores. A
function is called for each layer and each image in each forward pass of the denoiser. The function returns the bias,
which is added to the layer's scores before the softmax.

In layers of plain cross- and self-attention, the bias is added to the attention mask. In all other layers, the bias is
added at the attention call (`elakit.attention.calls.biasing`). No attention processor is replaced. A recording contains
the changed attention.
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

        ``masked=True`` adds the layer's own attention mask to the scores.
        """


@dataclass(frozen=True)
class Change:
    """Change of a layer's scores for one image.

    Attributes
    ----------
    bias : Tensor, (head or 1, h*w, keys)
        Numbers that are added to the scores before the softmax.
    kept : tuple of int
        Positions of keys whose attention weights stay the same as without the bias. The softmax with the bias changes
        the weights of all keys, so the output of the layer is corrected afterwards. The corrected weights of a location
        no longer sum to 1. A recording shows the weights without this correction. Only layers of plain cross- and
        self-attention can keep weights.
    unconditional : bool
        Whether the bias is also added in those rows of the batch that belong to this image but do not see the prompt.
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
        Share of the denoiser's layers that run before this layer, from 0 to 1.
    read : bool
        Whether the guidance method reads the attention of this layer (argument ``read`` of `rescored`).
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
        Adapter of the pipeline whose denoiser is changed.
    layers : sequence of AttentionLayer
        Layers to change, among those of `changeable_layers`.
    change_of : callable
        Function that is called as ``change_of(site, scores)`` for each image of the batch when one of the layers runs.
        The function returns a `Change`, or None for no change. ``site`` is a `Site`: layer, image and timestep.
        ``scores()`` computes the image's scores in the row of the batch that sees the prompt. If the function returns
        None throughout a pass, the pass is unchanged, bit for bit.
    read : sequence of AttentionLayer
        Layers whose attention the guidance method reads. For these layers, `Site.read` is True.
    gradient : bool
        False changes the passes that the pipeline runs. True changes only the passes in which guidance computes
        gradients. These passes run inside `elakit.attention.paused`, and all their rows see the prompt.

    Raises
    ------
    RecordingError
        Raised when a layer has an attention processor that is not from diffusers, or runs without the attention call at
        which the change would be added.
    SettingError
        Raised when `Change.kept` is used in a layer that has neither plain cross-attention nor plain self-attention.

    Examples
    --------
    A bias of -50 on the token of the lion removes the attention to this token:

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
    """Return the layers whose scores `rescored` can change, in forward order.

    In these layers, the image attends to the text or to itself. In a layer with joint attention, the image attends to
    both. Layers of linear self-attention (Sana) are not included, because they have no scores.

    Examples
    --------
    picture-world has cross-attention layers, which read the text, and self-attention layers, which read the image:

    >>> import elakit
    >>> from elakit.models import adapter_for
    >>> {layer.reads for layer in changeable_layers(adapter_for(elakit.load("picture-world")))} == {"text", "image"}
    True
    """
    return tuple(each for layer in adapter.layers() for each in (layer, *_beside(adapter, layer)))


def check_plain(layers: Sequence[AttentionLayer], who: str) -> None:
    """Raise a `SettingError` if a layer has neither plain cross-attention nor plain self-attention.

    Guidance methods that cannot change the scores of other layers call this function.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        Layers to check.
    who : str
        Name of the guidance method, for the message.

    Raises
    ------
    SettingError
        Raised when a layer has joint attention, in which image and text share one softmax. Also raised for a layer that
        is read at its attention call, as in Sana and HunyuanDiT.
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
    """Return the self-attention layer in the block of a cross-attention layer, as a tuple with one layer.

    The tuple is empty if the block has no self-attention layer, or if its self-attention is linear and therefore has no
    scores. The tuple is also empty if ``layer`` is not a cross-attention layer.
    """
    if layer.kind != "cross":
        return ()
    try:
        return adapter.self_layers([layer])
    except ModelError:
        return ()


def _positions(adapter: Adapter) -> dict[str, float]:
    """Return the position of each layer, by name: the share of the denoiser's layers that run before this layer.

    A self-attention layer has the position of the cross-attention layer in its block.
    """
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
        """Return the bias to add to the scores of an attention call; None if nothing is to be added."""
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

        The hooks in `elakit.attention.taps` read the layer's attention and need the bias. These hooks may run after the
        hooks of this class. The bias is therefore not discarded as soon as the layer has run, but before the next call.
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
                f"Layer {self.layer.name} ran without calling F.scaled_dot_product_attention, the function at which "
                "its scores are changed. Before the run, set the default attention processor of the denoiser, and call "
                "`pipe.transformer.set_attention_backend('native')`, or the same method of `pipe.unet`."
            )
        return None if missing is None else output + missing

    def _changes(
        self, keys: int, text: slice | None, own: slice | None, scores_of: Callable[..., Tensor]
    ) -> dict[int, Change]:
        """Call ``change_of`` for each row of the batch that sees the prompt, and return the changes by row.

        ``keys`` is the number of keys. ``text`` are the keys that are text positions, and ``own`` the keys that are
        locations of the image. ``scores_of(row, masked=...)`` computes the scores of a row.
        """
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
        """Combine the changes of the rows into one bias for the attention scores of the batch, (row, head, query, key).

        The dimension ``head`` has length 1 if all changes are the same for all heads. The bias has the dtype and device
        of ``like``. ``queries`` and ``keys`` are the numbers of queries and keys. ``image`` is the index of the query
        that belongs to the first location of the image.
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
        """Compute the scores of one row of the batch, (head, h*w, keys).

        ``image`` and ``keys`` are the inputs of the layer for this row: hidden states that the layer projects to
        queries and to keys. Both are projected here once more, because the mask must be known before the layer runs.
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
        """Compute the correction of the layer's output in one row of the batch, and store it in ``self.missing``.

        With the correction, the kept keys (`Change.kept`) have the same weights as without the bias. ``image`` and
        ``keys`` are the inputs of the layer, which the layer projects to queries and to keys. ``scores`` are the scores
        of the row without the bias, (head, h*w, keys).
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
        """Return the bias of the layer's attention call; None if nothing changes."""
        queries, keys = call.query.shape[-2], call.key.shape[-2]
        text, own, first = self._parts(keys)
        there = slice(first, first + math.prod(self.size))
        changes = self._changes(keys, text, own, partial(_scores_of, call, there))
        if not changes:
            return None
        if any(change.kept for change in changes.values()):
            raise SettingError(
                f"Layer {self.layer.name} cannot keep attention weights (`Change.kept`), because it is not a plain "
                "cross- or self-attention layer. Leave out `kept`, or use a model with plain cross-attention."
            )
        bias = self._bias(changes, call.query, queries, keys, first)
        if self.layout is None:
            added = LATE_SCORES.get(self.layer.module)  # by another block
            LATE_SCORES[self.layer.module] = bias if added is None else bias + added
        return bias

    def _parts(self, keys: int) -> tuple[slice | None, slice | None, int]:
        """Return the text keys, the image keys, and the index of the image's first query.

        The text keys are None in self-attention. The image keys, which are the locations of the image, are None in
        cross-attention. ``keys`` is the number of all keys.
        """
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
    """Compute the scores of one row of an attention call before the softmax, (head, query, key).

    ``queries`` selects the queries. ``masked=True`` adds the attention mask of the call.
    """
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
