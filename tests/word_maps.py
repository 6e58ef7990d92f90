"""A prompt of known tokens, and attention of known shares per word, so that losses can be computed by hand."""

from __future__ import annotations

from typing import Any

import torch

from elakit.guidance import Attention
from elakit.prompt import Entity, Prompt, Token

PAIR = "a [red car] and a [blue bird]"


def hand_made(pieces: int = 1, car: tuple[int, ...] = (1,)) -> Prompt:
    """The prompt "red car blue bird" from position 1, with some pieces of "bird" and two positions of end-of-text."""
    names = ["red", "car", "blue", *["bird"] * pieces]
    tokens = tuple(Token(i, name, f"{name}/{i}", min(i, 4) - 1) for i, name in enumerate(names, start=1))
    bird = tuple(range(4, 4 + pieces))
    entities = (
        Entity("red car", "car", ("red",) * len(car), (2,), car, "car"),
        Entity("blue bird", "bird", ("blue",), bird, (3,), "bird"),
    )
    return Prompt("red car blue bird", entities, tokens, len(names) + 1, len(names) + 3)


def attention_of(words: Any, end: Any = 0.0) -> Attention:
    """Given maps of the words (token, y, x) and of the first end-of-text; start-of-text and the last are of no matter.

    The large values of those two would show if a method did not leave them out.
    """
    words = torch.as_tensor(words, dtype=torch.float64)
    edge = torch.full((1, *words.shape[1:]), 0.7, dtype=torch.float64)
    end = torch.zeros_like(edge) + torch.as_tensor(end, dtype=torch.float64)
    return Attention((torch.cat([edge, words, end, edge])[None],))


def of_shares(shares: Any) -> Attention:
    """Attention that a softmax over 100 times itself turns into given shares of (words..., end), (token, y, x)."""
    logits = torch.as_tensor(shares, dtype=torch.float64).log() / 100 + 0.05
    return attention_of(logits[:-1], logits[-1])


def loss_of(method: Any, attention: Attention, prompt: Prompt, step: int = 0, state: Any = None) -> Any:
    return method.loss(attention, prompt, step, method.begin(prompt, 50) if state is None else state)


# The kernel (e^-1, 1, e^-1) / (1 + 2 e^-1) on one axis: its middle, and both sides, which an edge reflects into one.
MIDDLE = 0.576116885
SIDES = 0.423883115
