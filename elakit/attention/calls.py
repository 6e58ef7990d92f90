"""Arguments of attention calls: the query, key and mask that `F.scaled_dot_product_attention` receives.

Most layers are read and biased by hooks on their projections and arguments. Layers that do more between projection and
softmax (their own rotary embeddings, fused projections, masks built inside) are read and biased here instead, at the
call itself, so that nothing has to be computed a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEVER = -1e4  # what diffusers adds to hide a position; half precision can represent it, and its exponential is 0


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one attention call.

    Attributes
    ----------
    query : torch.Tensor, (rows, heads, queries, d)
    key : torch.Tensor, (rows, heads, keys, d)
        With grouped queries the keys have fewer heads than the queries.
    mask : torch.Tensor or None
        Added to the scores, or booleans that are True where a key is seen; broadcasts to (rows, heads, queries, keys).
    scale : float or None
        Factor of the scores; None stands for ``1 / sqrt(d)``.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scale: float | None


OnCall = Callable[[AttentionCall], None]
BiasOf = Callable[[AttentionCall], Tensor | None]


@contextmanager
def watching(on_call: OnCall) -> Iterator[None]:
    """Call ``on_call`` with the arguments of each attention call inside the block, including biases of `biasing`."""
    with _Mode(on_call=on_call):
        yield


@contextmanager
def biasing(bias_of: BiasOf) -> Iterator[None]:
    """Add ``bias_of(call)`` to the scores of each attention call inside the block; None adds nothing.

    `watching` sees the biased call, whichever of the two blocks is the outer one.
    """
    with _Mode(bias_of=bias_of):
        yield


class _Active(threading.local):
    def __init__(self) -> None:
        self.modes: list[_Mode] = []


_ACTIVE = _Active()


class _Mode(TorchFunctionMode):
    """One watcher or source of biases; the innermost mode handles a call for all of them."""

    def __init__(self, *, on_call: OnCall | None = None, bias_of: BiasOf | None = None) -> None:
        super().__init__()
        self.on_call = on_call
        self.bias_of = bias_of

    def __enter__(self) -> Any:
        _ACTIVE.modes.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        _ACTIVE.modes.remove(self)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention or self is not _ACTIVE.modes[-1]:
            return func(*args, **kwargs)
        named = dict(zip(_NAMES, args, strict=False)) | kwargs
        query, key, mask = named["query"], named["key"], named.get("attn_mask")
        for mode in _ACTIVE.modes:
            if mode.bias_of is None:
                continue
            bias = mode.bias_of(AttentionCall(query, key, mask, named.get("scale")))
            if bias is not None:
                mask = bias.to(query.dtype) if mask is None else bias.to(query.dtype) + additive(mask, query.dtype)
        named["attn_mask"] = mask
        if mask is None and named.get("is_causal"):
            positions = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
            mask = positions.tril()
        for mode in _ACTIVE.modes:
            if mode.on_call is not None:
                mode.on_call(AttentionCall(query, key, mask, named.get("scale")))
        return func(**named)


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a mask of booleans, True where a key is seen, to numbers that are added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, NEVER)
