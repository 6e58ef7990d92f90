"""Reading and changing calls of `F.scaled_dot_product_attention`: their arguments and outputs.

Most attention layers are read and changed by hooks on their projections and arguments. Some layers do more between
projection and softmax: they have rotary embeddings of their own, fused projections, or masks that are built inside.
Such layers are read and changed in this module, at the attention call itself. The call receives the final queries,
keys and masks, so nothing has to be computed a second time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

NEVER = -1e4  # what diffusers adds to hide a position; half precision can represent it, and its exponential is 0


@dataclass(frozen=True)
class AttentionCall:
    """Arguments of one call of `F.scaled_dot_product_attention`.

    Attributes
    ----------
    query : torch.Tensor, (rows, heads, queries, d)
        Queries of each row of the batch. Each head has d channels.
    key : torch.Tensor, (rows, heads, keys, d)
        Keys. In grouped-query attention, ``key`` and ``value`` have fewer heads than ``query``.
    value : torch.Tensor, (rows, heads, keys, d)
        Values.
    mask : torch.Tensor or None
        Mask that broadcasts to (rows, heads, queries, keys). A boolean mask is True where a key is seen. Any other mask
        contains numbers that are added to the scores. None masks nothing.
    scale : float or None
        Factor by which the products of queries and keys are multiplied. None stands for ``1 / sqrt(d)``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None


OnCall = Callable[[AttentionCall], None]
OnOutput = Callable[[AttentionCall, Tensor], None]
BiasOf = Callable[[AttentionCall], Tensor | None]
ChangeOf = Callable[[AttentionCall], AttentionCall]


@contextmanager
def watching(on_call: OnCall) -> Iterator[None]:
    """Call ``on_call(call)`` before each attention call inside the ``with`` block.

    ``call`` is an `AttentionCall`. If `biasing` adds a bias, the mask of ``call`` includes this bias.
    """
    with _Mode(on_call=on_call):
        yield


@contextmanager
def biasing(bias_of: BiasOf) -> Iterator[None]:
    """Add the tensor ``bias_of(call)`` to the scores of each attention call inside the ``with`` block.

    ``call`` is an `AttentionCall`. The tensor broadcasts to (rows, heads, queries, keys). If ``bias_of`` returns None,
    the call is unchanged. `watching` receives the biased call, even if the `watching` block is the outer one.
    """
    with _Mode(bias_of=bias_of):
        yield


@contextmanager
def watching_outputs(on_output: OnOutput) -> Iterator[None]:
    """Call ``on_output(call, output)`` after each attention call inside the ``with`` block.

    ``call`` is an `AttentionCall`, and ``output`` is the tensor that the call returned. If `biasing` adds a bias, the
    mask of ``call`` includes this bias, and ``output`` was computed with it.
    """
    with _Mode(on_output=on_output):
        yield


@contextmanager
def changing(change_of: ChangeOf, on_output: OnOutput) -> Iterator[None]:
    """Replace each attention call inside the ``with`` block by ``change_of(call)``, and run the changed call.

    ``on_output(changed, output)`` is then called. ``changed`` is the changed `AttentionCall`, and ``output`` is the
    tensor that this call returned.

    The block is meant for a separate denoiser call. Blocks of `watching`, `biasing` and the like that were entered
    earlier have no effect inside this block.
    """
    outer, _ACTIVE.modes = _ACTIVE.modes, []
    try:
        with _Mode(change_of=change_of, on_output=on_output):
            yield
    finally:
        _ACTIVE.modes = outer


class _Active(threading.local):
    def __init__(self) -> None:
        self.modes: list[_Mode] = []


_ACTIVE = _Active()


class _Mode(TorchFunctionMode):
    """Torch function mode behind each ``with`` block of this module (`watching`, `biasing` and the like).

    A block sets the functions that it needs; the other arguments are None. If blocks are nested, the mode of the
    innermost block handles each attention call. This mode applies the functions of all open blocks. Inside a `changing`
    block, only this block and the blocks inside it count as open.
    """

    def __init__(
        self,
        *,
        on_call: OnCall | None = None,
        on_output: OnOutput | None = None,
        bias_of: BiasOf | None = None,
        change_of: ChangeOf | None = None,
    ) -> None:
        super().__init__()
        self.on_call = on_call
        self.on_output = on_output
        self.bias_of = bias_of
        self.change_of = change_of

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
        call = AttentionCall(
            query=named["query"],
            key=named["key"],
            value=named["value"],
            mask=named.get("attn_mask"),
            scale=named.get("scale"),
        )
        if named.get("is_causal"):
            call = replace(call, mask=_causal(call))
        given = call.mask
        for mode in _ACTIVE.modes:
            if mode.change_of is not None:
                call = mode.change_of(call)
            bias = mode.bias_of(call) if mode.bias_of is not None else None
            if bias is not None:
                bias = bias.to(call.query.dtype)
                call = replace(call, mask=bias if call.mask is None else bias + additive(call.mask, bias.dtype))
        named |= {"query": call.query, "key": call.key, "value": call.value}
        if call.mask is not given:  # which includes what is_causal hides
            named |= {"attn_mask": call.mask, "is_causal": False}
        for mode in _ACTIVE.modes:
            if mode.on_call is not None:
                mode.on_call(call)
        output: Tensor = func(**named)
        for mode in _ACTIVE.modes:
            if mode.on_output is not None:
                mode.on_output(call, output)
        return output


def _causal(call: AttentionCall) -> Tensor:
    """Mask of an attention call, extended so that each query sees only the keys up to its own position."""
    sides = call.query.shape[-2], call.key.shape[-2]
    past = torch.ones(sides, dtype=torch.bool, device=call.query.device).tril()
    if call.mask is None:
        return past
    return call.mask & past if call.mask.dtype == torch.bool else call.mask + additive(past, call.mask.dtype)


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to numbers that are added to the attention scores.

    True, where a key is seen, becomes 0. False becomes -10000. The numbers have the type ``dtype``. A mask that is not
    boolean is returned unchanged.
    """
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, NEVER)
