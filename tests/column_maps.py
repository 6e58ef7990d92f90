"""Maps of 4 x 4 locations whose halves differ, so that losses of methods can be computed by hand."""

from __future__ import annotations

import math
from typing import Any

import torch

from elakit.guidance import Attention
from elakit.prompt import Entity, Prompt

PAIR = "a [red car] and a [blue bird]"
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]

# Maps of 4 x 4 locations. Smoothing gives the column of a location weight 1 and the adjacent ones exp(-1): LEFT becomes
# columns of 1, 1 - A, A, 0 (the last column sees its neighbor reflected), and RIGHT those in reverse.
A = math.exp(-1) / (1 + 2 * math.exp(-1))
LEFT = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64).expand(4, 4)
RIGHT = LEFT.flip(1)
NONE, EVEN = torch.zeros_like(LEFT), torch.ones_like(LEFT)

# Self-attention: every location attends equally to all 16, or to those of its own half.
ALIKE = torch.full((4, 4, 4, 4), 1 / 16, dtype=torch.float64)
HALVED = torch.stack([torch.stack([(LEFT if x < 2 else RIGHT) / 8 for x in range(4)]) for _ in range(4)])
CAR = Entity("a red car", "car", ("red",), (2,), (1,), "car")
BIRD = Entity("a blue bird", "bird", ("blue",), (4,), (3,), "bird")
PROMPT = Prompt("a red car and a blue bird", (CAR, BIRD), (), end_index=5, length=6)


def attention(*heads: tuple[torch.Tensor, ...], own: torch.Tensor | None = None) -> Attention:
    """One layer; of each head the maps of red, car, blue, bird, between an empty start and end."""
    layer = torch.stack([torch.stack([torch.zeros_like(h[0]), *h, torch.zeros_like(h[0])]) for h in heads])
    return Attention((layer,), () if own is None else (own[None],))


# To the softmax of 100 times the probabilities a difference of 1 is all: prepared maps are LEFT and RIGHT, smoothed.
APART = attention((NONE, LEFT, NONE, RIGHT))


def total(method: Any, seen: Attention, step: int = 0, state: Any = None) -> float:
    return float(method.loss(seen, PROMPT, step, method.begin(PROMPT, 50) if state is None else state).total)
