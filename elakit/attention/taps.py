"""Attention of the denoiser's layers, read by hooks; no processor is replaced, and nothing is projected twice.

A tap keeps the queries and keys that the layer's own projections return, so that LoRA, attention slicing, fused
projections, fused attention kernels and IP-Adapters keep working. It computes probabilities on request only, for the
requested rows of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FunctionType
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elakit.attention.calls import AttentionCall, OnCall, additive, watching
from elakit.attention.hooks import Hooks
from elakit.errors import RecordingError
from elakit.models import AttentionLayer
from elakit.models.adapter import argument

Attend = Callable[..., Tensor]
OnAttention = Callable[[AttentionLayer, Attend, tuple[int, int]], None]

# Projections that a layer may use, and the parts of their output that are queries and keys; fused ones stack them.
_PROJECTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "to_q": {"query": (0, 1)},
    "to_k": {"key": (0, 1)},
    "to_kv": {"key": (0, 2)},
    "to_qkv": {"query": (0, 3), "key": (1, 3)},
}
_TEXT_PROJECTIONS: dict[str, dict[str, tuple[int, int]]] = {
    "add_k_proj": {"text_key": (0, 1)},
    "to_added_qkv": {"text_key": (1, 3)},
}
_NORMS = {"query": "norm_q", "key": "norm_k", "text_key": "norm_added_k"}

# Per attention module: what an edit adds to the scores of a layer whose processor ignores its attention mask.
ADDED_SCORES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
# Per attention module: bias added to its scores, (row, head or 1, query, key), where it calls the attention function.
LATE_SCORES: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


@contextmanager
def tap(layers: Sequence[AttentionLayer], on_attention: OnAttention) -> Iterator[None]:
    """Call ``on_attention(layer, attend, (h, w))`` inside the ``with`` block each time one of the layers has run.

    Parameters
    ----------
    layers : sequence of AttentionLayer
        Layers to read.
    on_attention : callable
        Function that is called with the layer, a function ``attend``, and the size (h, w) of the layer's maps. An error
        that ``on_attention`` raises ends the pass. ``attend`` must be called before ``on_attention`` returns.

        ``attend(rows)`` returns the attention probabilities of a slice of the batch, (rows, heads, h*w, keys). For a
        video, the shape is (rows, heads, frames*h*w, keys). The result is differentiable. The keys are the text
        positions. If ``layer.reads`` is "image", the keys are the locations of the image.

        In cross-attention, ``attend(rows, more)`` appends further keys. ``more`` contains text states, (tokens,
        channels), which the layer projects to keys. For a layer that is read at its attention call, as in Sana and
        HunyuanDiT, ``more`` contains the keys themselves, (1, heads, tokens, channels per head).

    Raises
    ------
    RecordingError
        Raised on entry when a layer has an attention processor that is not from diffusers. Raised inside the block when
        the queries and keys of a layer cannot be read, or when projections were replaced. Also raised inside the block
        when tokens were merged (ToMe), or when the attention mask does not fit the batch and the keys.

    Notes
    -----
    In cross-attention and in separate self-attention layers, the probabilities of a location sum to 1. In joint
    attention (Stable Diffusion 3, FLUX), image and text are keys of the same softmax. ``attend`` then returns only the
    keys that ``layer.reads`` names: text or image. The probabilities of a location sum to the share of attention that
    the returned keys receive.

    Hooks are placed on the projections that the layers have on entry. Load LoRA weights and fuse projections before
    you enter the block. All hooks are removed on exit, also after an error.

    Examples
    --------
    The layer has two heads, 3 x 5 locations and 7 text positions; one row of the batch is read:

    >>> import torch
    >>> from diffusers.models.transformers.transformer_2d import Transformer2DModel
    >>> block = Transformer2DModel(2, 4, in_channels=8, norm_num_groups=4, cross_attention_dim=6)
    >>> module = block.transformer_blocks[0].attn2
    >>> layer = AttentionLayer("attn2", "up", module.heads, module, block, factor=1)
    >>> def show(layer, attend, size):
    ...     print(layer.name, tuple(attend(slice(1, 2)).shape), size)
    >>> with torch.no_grad(), tap([layer], show):
    ...     _ = block(torch.randn(2, 8, 3, 5), encoder_hidden_states=torch.randn(2, 7, 6))
    attn2 (1, 2, 15, 7) (3, 5)
    """
    for layer in layers:
        check_processor(layer)
    with ExitStack() as stack:
        hooks = stack.enter_context(Hooks())
        captured = []
        for layer in layers:
            if layer.layout is None:
                _Tap(layer, on_attention).place(hooks)
            else:
                captured.append(_Capture(layer, on_attention))
                captured[-1].place(hooks)
        if captured:
            stack.enter_context(watching(_to_all(captured)))
        yield


def check_processor(layer: AttentionLayer) -> None:
    """Raise an error if a layer has an attention processor that is not from diffusers.

    A processor from elsewhere may change attention scores in a way that cannot be read.

    Raises
    ------
    RecordingError
        Raised when the processor of the layer is defined outside the package diffusers.
    """
    processor = getattr(layer.module, "processor", None)
    processor = processor if isinstance(processor, FunctionType) else type(processor)
    if processor is not type(None) and not processor.__module__.startswith("diffusers."):
        raise RecordingError(
            f"Layer {layer.name} has the attention processor {processor.__module__}.{processor.__qualname__}, which is "
            "not from diffusers: it may change attention scores in a way that cannot be read. Set a processor from "
            "diffusers, for example with "
            "`pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor2_0())`. To change "
            "scores, use `elakit.attention.edit`."
        )


class _Tap:
    """Reader of the attention of one layer, by hooks on the layer's projections.

    In each forward pass, the reader keeps the queries and keys that the layer projects. When the layer has run, the
    reader calls ``on_attention`` (see `tap`), and then drops the queries and keys.
    """

    _reading: ClassVar[bool] = False  # true while a tap itself applies the norms of a layer

    def __init__(self, layer: AttentionLayer, on_attention: OnAttention) -> None:
        self.layer = layer
        self.on_attention = on_attention
        self.size = (0, 0)
        self.mask: Tensor | None = None
        self.rotary: Any = None
        self.parts: dict[str, Tensor] = {}
        self.normed: set[str] = set()
        self.hooked: dict[str, nn.Module | None] = {}

    def place(self, hooks: Hooks) -> None:
        module = self.layer.module
        hooks.before(self.layer.block, self._enter_block)
        hooks.before(module, self._enter)
        hooks.after(module, self._leave)
        projections = _PROJECTIONS if self.layer.kind != "joint" else _PROJECTIONS | _TEXT_PROJECTIONS
        for name, pieces in projections.items():
            if isinstance(projection := getattr(module, name, None), nn.Module):
                hooks.after(projection, self._keep(pieces))
            self.hooked[name] = projection
        for part, name in _NORMS.items():
            if isinstance(norm := getattr(module, name, None), nn.Module):
                hooks.after(norm, self._note(part))

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = self.layer.grid(args, kwargs)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.parts.clear()  # parts of a pass that ended early
        self.normed.clear()
        check_processor(self.layer)
        for name, projection in self.hooked.items():
            if getattr(module, name, None) is not projection:
                raise RecordingError(
                    f"{name} of layer {self.layer.name} was replaced inside the recording. Load LoRA weights, fuse "
                    "projections or replace parts of the pipeline before the `with` block, not inside it."
                )
        self.mask = argument(args, kwargs, 2, "attention_mask") if self.layer.takes_mask else ADDED_SCORES.get(module)
        self.rotary = kwargs.get("image_rotary_emb")

    def _keep(self, pieces: dict[str, tuple[int, int]]) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            for part, (nth, of) in pieces.items():
                # The first one, if a processor projects more than once (perturbed-attention guidance).
                self.parts.setdefault(part, output if of == 1 else output.chunk(of, dim=-1)[nth])

        return hook

    def _note(self, part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if not _Tap._reading:
                self.normed.add(part)

        return hook

    def _leave(self, *_: Any) -> None:
        needed = {"query", "key"} | ({"text_key"} if self.layer.kind == "joint" else set())
        if missing := needed - self.parts.keys():
            raise RecordingError(
                f"Layer {self.layer.name} ran without calling its projections ({', '.join(sorted(missing))}). Either "
                f"{type(getattr(self.layer.module, 'processor', None)).__name__} does not call them, or they were "
                "fused or replaced inside the recording. Fuse or replace projections before the recording, or set the "
                "default attention processor."
            )
        try:
            self.on_attention(self.layer, self.attend, self.size)
        finally:
            self.parts.clear()
            self.mask = self.rotary = None

    def attend(self, rows: slice, more: Tensor | None = None) -> Tensor:
        batch = len(self.parts["query"])
        _Tap._reading = True
        try:
            parts = {
                part: self._normed(part, projected[rows].unflatten(-1, (self.layer.heads, -1)))
                for part, projected in self.parts.items()
            }
        finally:
            _Tap._reading = False
        query, key = parts["query"], parts["key"]  # (rows, n, heads, d)
        locations = self.size[0] * self.size[1]
        first = at = text = 0
        if self.layer.kind == "joint":
            text_key = parts["text_key"]
            text = text_key.shape[1]
            key = torch.cat([text_key, key] if self.layer.text_first else [key, text_key], dim=1)
        elif self.layer.kind == "single":
            text = query.shape[1] - locations
            query = query[:, text:] if self.layer.text_first else query[:, :locations]
        if query.shape[1] != locations:
            raise RecordingError(
                f"Layer {self.layer.name} attends from {query.shape[1]} positions, but its maps have {self.size[0]} x "
                f"{self.size[1]} locations: positions were merged (ToMe) or added. Undo this change before the "
                "`with` block. For ToMe, call `tomesd.remove_patch(pipe)`, or apply it with `merge_crossattn=False`."
            )
        mask = scores_mask(self.mask, self.layer, batch, key.shape[1])
        if (late := LATE_SCORES.get(self.layer.module)) is not None:
            mask = late if mask is None else late + additive(mask, late.dtype)
        if mask is not None and len(mask) > 1:
            mask = mask[rows]
        if self.layer.kind == "cross":
            if more is not None:
                extra = self._project(more.to(key.dtype))
                key = torch.cat([key, extra.expand(len(key), -1, -1, -1)], dim=1)
                mask = None if mask is None else F.pad(mask, (0, len(more)), value=mask.dtype == torch.bool)
            return probabilities(query, key, mask=mask, scale=self._scale)
        at = text if self.layer.text_first else 0  # first image position among queries and keys
        first = 0 if self.layer.text_first else locations  # first text position among keys
        if self.rotary is not None:
            query = rotate(query, [turn[at : at + locations] for turn in self.rotary])
            key = rotate(key, self.rotary)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., at : at + locations, :]
        columns = slice(at, at + locations) if self.layer.reads == "image" else slice(first, first + text)
        return probabilities(query, key, columns, mask=mask, scale=self._scale)

    def _project(self, states: Tensor) -> Tensor:
        """Project text states, (tokens, channels), to keys of the layer, (1, tokens, heads, channels per head)."""
        module: Any = self.layer.module
        states = states.unsqueeze(0)
        states = module.norm_encoder_hidden_states(states) if module.norm_cross else states
        _Tap._reading = True
        try:
            return self._normed("key", module.to_k(states).unflatten(-1, (self.layer.heads, -1)))
        finally:
            _Tap._reading = False

    @property
    def _scale(self) -> float | None:
        return getattr(self.layer.module, "scale", None)

    def _normed(self, part: str, x: Tensor) -> Tensor:
        """Apply the layer's query or key norm to ``x``, if the layer has applied this norm in the current pass.

        ``part`` is "query", "key" or "text_key". ``x`` contains projected queries or keys, (rows, positions, heads,
        channels per head). If the layer has not applied the norm, ``x`` is returned unchanged.
        """
        norm: Any = getattr(self.layer.module, _NORMS[part], None)
        return norm(x) if part in self.normed else x


def scores_mask(mask: Tensor | None, layer: AttentionLayer, batch: int, keys: int) -> Tensor | None:
    """Reshape an attention mask to four dimensions: rows, heads, queries, keys.

    The mask is read as the layer's attention processor reads it.

    Parameters
    ----------
    mask : torch.Tensor, optional
        Mask that the attention module receives: (rows, keys) or (rows, heads, queries, keys). Cross-attention also
        takes (rows, queries, keys) and (rows x heads, queries, keys). Joint attention also takes (queries, keys) and
        (heads, queries, keys). Rows, heads and queries may have the size 1.
    layer : AttentionLayer
        Layer whose attention module receives the mask.
    batch : int
        Number of rows of the batch.
    keys : int
        Number of keys.

    Returns
    -------
    torch.Tensor or None
        The reshaped mask. Dimensions that `mask` does not have get the size 1. None if `mask` is None.

    Raises
    ------
    RecordingError
        Raised when the mask has none of these shapes.

    Examples
    --------
    Four masks for a layer of joint attention, a batch of 3 rows, and 7 keys. The third mask has 5 queries:

    >>> layer = AttentionLayer("attn", "double", 2, nn.Identity(), nn.Identity(), 1, kind="joint")
    >>> [tuple(scores_mask(torch.zeros(s), layer, 3, 7).shape) for s in ((3, 7), (1, 7), (5, 7), (3, 1, 1, 7))]
    [(3, 1, 1, 7), (1, 1, 1, 7), (1, 1, 5, 7), (3, 1, 1, 7)]
    """
    if mask is None:
        return None
    shape = tuple(mask.shape)
    fits = 0 < mask.ndim <= 4 and shape[-1] in (1, keys)
    if fits and layer.kind == "cross" and mask.ndim < 4:
        mask = mask.reshape(-1, 1, shape[-1]) if mask.ndim < 3 else mask
        heads = layer.heads if len(mask) == batch * layer.heads else 1
        mask = mask.unflatten(0, (-1, heads))
    elif fits and shape == (batch, keys):
        mask = mask[:, None, None]
    elif fits:
        mask = mask.reshape((1,) * (4 - mask.ndim) + shape)
    if not fits or len(mask) not in (1, batch):
        raise RecordingError(
            f"Layer {layer.name} was given an attention mask of shape {shape}, which does not fit a batch of "
            f"{batch} and {keys} keys. Give the denoiser a mask of shape ({batch}, {keys}) or ({batch}, 1, 1, {keys})."
        )
    return mask


def _to_all(captured: Sequence[_Capture]) -> OnCall:
    def see(call: AttentionCall) -> None:
        for one in captured:
            one.see(call)

    return see


class _Capture:
    """Reader of the attention of one layer, at the layer's attention call.

    The reader keeps the arguments of the call until the layer has run. The reader then calls ``on_attention`` (see
    `tap`), and drops the arguments.
    """

    def __init__(self, layer: AttentionLayer, on_attention: OnAttention) -> None:
        assert layer.layout is not None
        self.layer = layer
        self.layout_of = layer.layout
        self.on_attention = on_attention
        self.running = False
        self.call: AttentionCall | None = None

    def place(self, hooks: Hooks) -> None:
        hooks.before(self.layer.block, self._enter_block)
        hooks.before(self.layer.module, self._enter)
        hooks.after(self.layer.module, self._leave)

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layout = self.layout_of(args, kwargs)
        self.running, self.call = False, None

    def _enter(self, *_: Any) -> None:
        check_processor(self.layer)
        self.running, self.call = True, None

    def see(self, call: AttentionCall) -> None:
        """Keep the layer's first attention call of a pass; ignore all other calls.

        In a second call of the same pass, the layer attends to an image prompt (IP-Adapter).
        """
        if self.running and self.call is None:
            self.call = call

    def _leave(self, *_: Any) -> None:
        self.running = False
        if self.call is None:
            raise RecordingError(
                f"Layer {self.layer.name} ran without calling F.scaled_dot_product_attention, the function at which "
                "its attention is read. Before the recording, set the default attention processor of the transformer, "
                "and call `pipe.transformer.set_attention_backend('native')`."
            )
        try:
            self.on_attention(self.layer, self.attend, self.layout.size)
        finally:
            self.call = None

    def attend(self, rows: slice, more: Tensor | None = None) -> Tensor:
        assert self.call is not None
        query, key, mask = self.call.query[rows], self.call.key[rows], self.call.mask
        locations = self.layout.frames * math.prod(self.layout.size)
        queries = slice(self.layout.image, self.layout.image + locations)
        if mask is not None:
            mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            mask = mask[rows] if mask.shape[0] > 1 else mask
            mask = mask[..., queries, :] if mask.shape[-2] > 1 else mask
        if key.shape[1] != query.shape[1]:  # grouped queries
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        first, count = self.layout.text
        columns: slice | None = slice(first, first + count)
        if self.layer.reads == "image":
            columns = queries  # in joint attention, queries and keys are the same sequence
        elif (first, count) == (0, key.shape[-2]):
            columns = None
            if more is not None:
                key = torch.cat([key, more.expand(len(key), -1, -1, -1)], dim=-2)
                mask = None if mask is None else F.pad(mask, (0, more.shape[-2]), value=mask.dtype == torch.bool)
        query, key = query[..., queries, :].transpose(1, 2), key.transpose(1, 2)
        return probabilities(query, key, columns, mask=mask, scale=self.call.scale)


def rotate(x: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Rotate neighboring pairs of channels by a rotary position embedding, as FLUX does.

    Parameters
    ----------
    x : torch.Tensor, (rows, n, heads, d)
        Queries or keys at n positions, with d channels per head.
    rotary : sequence of two torch.Tensor, (n, d)
        Cosine and sine of the angle by which each channel is rotated at each position.

    Returns
    -------
    torch.Tensor, (rows, n, heads, d)
        The rotated queries or keys.
    """
    cos, sin = (turn[None, :, None, :] for turn in rotary)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def probabilities(
    query: Tensor,
    key: Tensor,
    columns: slice | None = None,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute attention probabilities: the softmax of the scores over all keys.

    Parameters
    ----------
    query : torch.Tensor, (B, n, heads, d)
        Queries of a batch of B rows: n queries per row, with d channels per head.
    key : torch.Tensor, (B, keys, heads, d)
        Keys of the same batch.
    columns : slice, optional
        Keys whose probabilities are returned; default: all.
    mask : torch.Tensor, (B or 1, 1 or heads, 1 or n, keys), optional
        Numbers that are added to the scores before the softmax, or booleans that are True where a key is seen. The
        dimension of the heads may be missing.
    scale : float, optional
        Factor by which the dot product of a query and a key is multiplied to give the score; default ``1 / sqrt(d)``.

    Returns
    -------
    torch.Tensor, (B, heads, n, number of keys in ``columns``)
        Probabilities, differentiable: float64 for queries in float64, float32 for all others. The probabilities of a
        query sum to 1 over all keys. If ``columns`` selects a part of the keys, the sum may be lower.

    Examples
    --------
    Queries and keys in bfloat16 give probabilities in float32. The last two of seven keys are columns 5 and 6:

    >>> import torch
    >>> query, key = torch.randn(1, 15, 2, 4).bfloat16(), torch.randn(1, 7, 2, 4).bfloat16()
    >>> p = probabilities(query, key)
    >>> p.dtype, tuple(p.shape), bool(torch.allclose(p.sum(-1), torch.ones(1)))
    (torch.float32, (1, 2, 15, 7), True)
    >>> bool(torch.equal(probabilities(query, key, slice(5, 7)), p[..., 5:7]))
    True
    """
    precision = torch.float64 if query.dtype == torch.float64 else torch.float32
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    # Autocast would compute the product in half precision.
    with torch.autocast(query.device.type, enabled=False):
        q, k = (x.to(precision).transpose(1, 2) for x in (query, key))
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=precision).masked_fill(~mask, -torch.inf)
            mask = mask.to(precision)
        if columns is None:
            return _softmax(q, k, mask, scale)
        # One head at a time: the scores of all heads of a large image take gigabytes.
        heads = [
            _softmax(q[:, h], k[:, h], None if mask is None else mask[:, h % mask.shape[1]], scale)[..., columns]
            for h in range(q.shape[1])
        ]
        return torch.stack(heads, dim=1)


def _softmax(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask).softmax(dim=-1)
