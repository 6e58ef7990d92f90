"""Changes of attention scores that depend on the scores themselves, layer by layer, in the denoiser's own passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from elakit.attention.calls import AttentionCall, additive, biasing
from elakit.attention.hooks import Hooks
from elakit.attention.taps import LATE_SCORES
from elakit.errors import ModelError
from elakit.guidance.holding import Holder
from elakit.models import Adapter, AttentionLayer
from elakit.models.adapter import Layout
from elakit.prompt import Prompt


@dataclass(frozen=True)
class Scores:
    """Attention scores of one image in one layer, before the softmax.

    Attributes
    ----------
    logits : Tensor, (head, h*w, keys)
        From each location of the image to all keys of the layer.
    size : tuple of int
        (h, w).
    text : tuple of int, optional
        First text key, and their number; None in self-attention.
    image : int, optional
        First of the h*w image keys; None in cross-attention.
    position : float
        Share of the denoiser's layers that have run before, from 0 to 1.
    """

    logits: Tensor
    size: tuple[int, int]
    text: tuple[int, int] | None
    image: int | None
    position: float


@runtime_checkable
class Reweighs(Protocol):
    """A method that also changes attention scores, in the passes in which it holds (see `Holds`)."""

    def reweigh(self, scores: Scores, prompt: Prompt, state: Any) -> Tensor | None:
        """Bias added to the scores of one layer, (head or 1, h*w, keys); None adds nothing."""


class Reweigher(Holder):
    """Lets a method change the scores of all layers in which the image attends to the text or to itself.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        Layers whose attention is read for the trace.
    method : Reweighs
    prompt : Prompt
    states : sequence
        State of the method for each image.
    """

    def __init__(
        self,
        adapter: Adapter,
        layers: Sequence[AttentionLayer],
        method: Reweighs,
        prompt: Prompt,
        states: Sequence[Any],
    ) -> None:
        super().__init__(adapter, layers, len(states))
        self.method, self.prompt, self.states = method, prompt, states
        self._entered: tuple[AttentionLayer, Layout | None, tuple[int, int], float] | None = None
        self._layouts: dict[str, tuple[Layout | None, tuple[int, int]]] = {}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Context in which passes are read, and scores changed."""
        with super().__call__(), Hooks() as hooks, biasing(self._bias_of):
            every = self.adapter.layers()
            for nth, layer in enumerate(every):
                self._place(layer, nth / len(every), hooks)
                for own in self._own(layer):
                    self._place(own, nth / len(every), hooks)
            yield

    def _own(self, layer: AttentionLayer) -> tuple[AttentionLayer, ...]:
        """Self-attention layer beside a layer of cross-attention, if it has probabilities."""
        if layer.kind != "cross":
            return ()
        try:
            return self.adapter.self_layers([layer])
        except ModelError:
            return ()

    def _place(self, layer: AttentionLayer, position: float, hooks: Hooks) -> None:
        def enter_block(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            layout = None if layer.layout is None else layer.layout(args, kwargs)
            self._layouts[layer.name] = layout, layer.grid(args, kwargs) if layout is None else layout.size

        def enter(*_: Any) -> None:
            self._entered = layer, *self._layouts[layer.name], position

        def leave(module: nn.Module, *_: Any) -> None:
            self._entered = None
            LATE_SCORES.pop(module, None)

        hooks.before(layer.block, enter_block)
        hooks.before(layer.module, enter)
        hooks.after(layer.module, leave, always=True)

    def _bias(self, layer: AttentionLayer, size: tuple[int, int], text: int) -> None:
        """No restriction to regions."""

    def _bias_of(self, call: AttentionCall) -> Tensor | None:
        entered, self._entered = self._entered, None  # only the first call of the layer is to the text
        if entered is None or self._rows is None or not any(self.held):
            return None
        layer, layout, size, position = entered
        bias = None
        for row, held, state in zip(range(len(call.query))[self._rows], self.held, self.states, strict=True):
            if held is None:
                continue
            scores, first = _scores(call, row, layer, layout, size, position)
            change = self.method.reweigh(scores, self.prompt, state)
            if change is None:
                continue
            if bias is None:
                bias = change.new_zeros(*call.query.shape[:3], call.key.shape[2])
            bias[row, :, first : first + scores.logits.shape[1]] = change
        if bias is not None and layer.layout is None:
            LATE_SCORES[layer.module] = bias
        return bias


def _scores(
    call: AttentionCall,
    row: int,
    layer: AttentionLayer,
    layout: Layout | None,
    size: tuple[int, int],
    position: float,
) -> tuple[Scores, int]:
    """Scores of one row of an attention call, and the first of the image's queries."""
    locations, keys = math.prod(size), call.key.shape[2]
    text: tuple[int, int] | None
    first, image = 0, None
    if layer.kind == "cross":
        text = None if layer.reads == "image" else (0, keys) if layout is None else layout.text
        image = 0 if layer.reads == "image" else None
    elif layout is None:
        count = keys - locations
        text = (0, count) if layer.text_first else (locations, count)
        first = image = count if layer.text_first else 0
    else:
        text, first, image = layout.text, layout.image, layout.image
    query = call.query[row, :, first : first + locations].float()
    key = call.key[row].float()
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)  # grouped queries
    logits = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if call.scale is None else call.scale)
    if call.mask is not None:
        mask = additive(call.mask, logits.dtype)
        mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        mask = mask[row if mask.shape[0] > 1 else 0]
        logits = logits + (mask[:, first : first + locations] if mask.shape[1] > 1 else mask)
    return Scores(logits=logits, size=size, text=text, image=image, position=position), first
