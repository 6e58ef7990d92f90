"""Reading what attention layers compute, by hooks alone: no processor is replaced, nothing is computed twice.

A tap keeps the queries and keys as the layer's own projections put them out, so that LoRA, attention slicing, fused
projections, fused attention kernels and IP-Adapters go on working, and turns them into probabilities only where, and
for those rows of the batch that, someone asks for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from elakit.errors import RecordingError
from elakit.models import AttentionLayer
from elakit.models.adapter import argument

Attend = Callable[[slice], Tensor]
OnAttention = Callable[[AttentionLayer, Attend, tuple[int, int]], None]

# Projections that a layer may use, and of which parts of their output queries and keys are; fused ones stack them.
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


@contextmanager
def tap(layers: Sequence[AttentionLayer], on_attention: OnAttention) -> Iterator[None]:
    """Call ``on_attention(layer, attend, (h, w))`` each time one of the layers has run.

    Parameters
    ----------
    layers : sequence of AttentionLayer
    on_attention : callable
        ``attend(rows)`` gives the probabilities of a slice of the batch, (rows, heads, h*w, text positions), as
        `probabilities` computes them, gradients included; it is to be called before ``on_attention`` returns, or not at
        all. ``(h, w)`` is the size of the layer's maps. An error it raises ends the pass.

    Raises
    ------
    RecordingError
        When a layer ran without projections that could be read, inside the pass.

    Notes
    -----
    In a layer of kind "cross" the keys are the text and each row sums to 1. In joint attention (kinds "joint" and
    "single": Stable Diffusion 3, FLUX) image and text are keys side by side: the softmax runs over both, only the
    columns of the text are given, and rows sum to the share of attention that the text gets.

    Hooks sit on the projections as they are on entry: load LoRA weights and fuse projections before. All hooks are
    removed on exit, whatever happens.

    Examples
    --------
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
    with ExitStack() as hooks:
        for layer in layers:
            _Tap(layer, on_attention).hook(hooks)
        yield


_PASSES_OF_OWN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


@contextmanager
def leave_alone(denoiser: nn.Module) -> Iterator[None]:
    """Passes inside are guidance's own: neither recorded nor edited."""
    before = _PASSES_OF_OWN.get(denoiser, 0)
    _PASSES_OF_OWN[denoiser] = before + 1
    try:
        yield
    finally:
        _PASSES_OF_OWN[denoiser] = before


def is_left_alone(denoiser: nn.Module) -> bool:
    """Whether a pass is guidance's own."""
    return _PASSES_OF_OWN.get(denoiser, 0) > 0


class _Tap:
    """What one layer puts out on its way through a pass."""

    _reading: ClassVar[bool] = False  # while any tap uses a layer's norms itself

    def __init__(self, layer: AttentionLayer, on_attention: OnAttention) -> None:
        self.layer = layer
        self.on_attention = on_attention
        self.size = (0, 0)
        self.mask: Tensor | None = None
        self.rotary: Any = None
        self.parts: dict[str, Tensor] = {}
        self.normed: set[str] = set()

    def hook(self, hooks: ExitStack) -> None:
        module = self.layer.module
        handles = [
            self.layer.block.register_forward_pre_hook(self._enter_block, with_kwargs=True),
            module.register_forward_pre_hook(self._enter, with_kwargs=True),
            module.register_forward_hook(self._leave),
        ]
        projections = _PROJECTIONS if self.layer.kind != "joint" else _PROJECTIONS | _TEXT_PROJECTIONS
        for name, pieces in projections.items():
            if isinstance(projection := getattr(module, name, None), nn.Module):
                handles.append(projection.register_forward_hook(self._keep(pieces)))
        for part, name in _NORMS.items():
            if isinstance(norm := getattr(module, name, None), nn.Module):
                handles.append(norm.register_forward_hook(self._note(part)))
        for handle in handles:
            hooks.callback(handle.remove)

    def _enter_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.size = self.layer.grid(args, kwargs)

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.parts.clear()  # of a pass that broke off
        self.normed.clear()
        self.mask = argument(args, kwargs, 2, "attention_mask")
        self.rotary = kwargs.get("image_rotary_emb")

    def _keep(self, pieces: dict[str, tuple[int, int]]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            for part, (nth, of) in pieces.items():
                # The first, where a processor projects more than once (perturbed-attention guidance).
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
                f"Layer {self.layer.name} ran without its projections being seen ({', '.join(sorted(missing))}): its "
                f"{type(getattr(self.layer.module, 'processor', None)).__name__} cannot be read, or projections were "
                "fused or replaced inside the recording. Do that before, or set the default attention processor."
            )
        try:
            self.on_attention(self.layer, self.attend, self.size)
        finally:
            self.parts.clear()
            self.mask = self.rotary = None

    def attend(self, rows: slice) -> Tensor:
        _Tap._reading = True
        try:
            parts = {
                part: self._normed(part, projected[rows].unflatten(-1, (self.layer.heads, -1)))
                for part, projected in self.parts.items()
            }
        finally:
            _Tap._reading = False
        query, key = parts["query"], parts["key"]  # (rows, n, heads, d)
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[rows] if mask.ndim == 4 else mask.unflatten(0, (self._batch, -1))[rows]
        if self.layer.kind == "cross":
            return probabilities(query, key, mask=mask, scale=self._scale)
        cells = self.size[0] * self.size[1]
        if self.layer.kind == "joint":
            text_key = parts["text_key"]
            text = text_key.shape[1]
            order = [text_key, key] if self.layer.text_first else [key, text_key]
            key = torch.cat(order, dim=1)
        else:
            text = query.shape[1] - cells
            query = query[:, text:] if self.layer.text_first else query[:, :cells]
        first = 0 if self.layer.text_first else cells
        at = text if self.layer.text_first else 0  # of the first image position among queries
        if self.rotary is not None:
            query = _rotate(query, [turn[at : at + cells] for turn in self.rotary])
            key = _rotate(key, self.rotary)
        if mask is not None and mask.shape[-2] > 1:
            mask = mask[..., at : at + cells, :]
        return probabilities(query, key, slice(first, first + text), mask=mask, scale=self._scale)

    @property
    def _batch(self) -> int:
        return self.parts["query"].shape[0]

    @property
    def _scale(self) -> float | None:
        return getattr(self.layer.module, "scale", None)

    def _normed(self, part: str, x: Tensor) -> Tensor:
        """Apply the layer's normalization, which acts on each head, if the layer did; (rows, n, heads, d) -> same."""
        norm: Any = getattr(self.layer.module, _NORMS[part], None)
        return norm(x) if part in self.normed else x


def _rotate(x: Tensor, rotary: Sequence[Tensor]) -> Tensor:
    """Rotary embedding of neighboring pairs, as FLUX applies it; x (rows, n, heads, d), rotary cos and sin (n, d)."""
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
    """Attention probabilities, softmax over all keys.

    Parameters
    ----------
    query : torch.Tensor, (B, n, heads, d)
    key : torch.Tensor, (B, keys, heads, d)
    columns : slice, optional
        Of the keys, those to give; default: all.
    mask : torch.Tensor, (B or 1, 1 or heads, 1 or n, keys), optional
        Added to the scores before the softmax; the heads' dimension may be missing; booleans say what is seen.
    scale : float, optional
        Of the scores; default ``1 / sqrt(d)``.

    Returns
    -------
    torch.Tensor, (B, heads, n, keys of ``columns``)
        float32 whatever the model's precision (float64 stays float64); differentiable. Each row sums to 1, over all
        keys.

    Examples
    --------
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
    # Autocast would put the product back into half precision.
    with torch.autocast(query.device.type, enabled=False):
        q, k = (x.to(precision).transpose(1, 2) for x in (query, key))
        if mask is not None:
            mask = mask.unsqueeze(1) if mask.ndim == 3 else mask
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=precision).masked_fill(~mask, -torch.inf)
            mask = mask.to(precision)
        if columns is None:
            return _softmax(q, k, mask, scale)
        # Head by head, as all scores of a large image at once, image by image, would take gigabytes.
        heads = [
            _softmax(q[:, h], k[:, h], None if mask is None else mask[:, h % mask.shape[1]], scale)[..., columns]
            for h in range(q.shape[1])
        ]
        return torch.stack(heads, dim=1)


def _softmax(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    return (scores if mask is None else scores + mask).softmax(dim=-1)
