"""A-STAR: separate the attention of entities, and retain each entity's attention from one step to the next.

Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", ICCV 2023
(arXiv:2306.14544), equations 2 to 4. With A_m the map of entity m, and B_m the binarized map of the same entity at the
previous step:

    L_seg = sum over pairs m > n of  sum_p min(A_m, A_n) / sum_p (A_m + A_n)
    L_ret = sum over m of  1 - sum_p min(A_m, B_m) / sum_p (A_m + B_m)
    z' = z - alpha * gradient of (L_seg + L_ret), before every denoising step

No official code is public, so only the equations were checked. What the paper leaves open was decided here: maps are
prepared as in Attend-and-Excite, so that A_m, from 0 to 1, is comparable with B_m, which is 0 or 1; B_m is 1 at the
locations above Otsu's threshold; alpha is that of Attend-and-Excite; the first step has no L_ret.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elakit.guidance.memory import Memory
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers
from elakit.guidance.preprocess import STEP_SIZE, entity_maps, schedule
from elakit.guidance.quotients import ratio
from elakit.guidance.reading import ReadsOneSize
from elakit.measures.masks import otsu_masks
from elakit.prompt import Prompt


@dataclass(frozen=True)
class AStar(ReadsOneSize):
    """A-STAR (Agarwal et al., ICCV 2023): separate the entities' maps, and keep each map similar from step to step.

    The module `elakit.guidance.astar` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step. It decreases over the run, from this value at the first step to sqrt(1/2)
        times this value at the last. The paper gives no value; 20 is that of Attend-and-Excite.
    guided : float
        Share of the denoising steps that are guided, from the first; all in the paper.
    segregation : float
        Weight of the segregation loss, the overlap of the maps of different entities; 1 in the paper.
    retention : float
        Weight of the retention loss, which compares each map with that of the previous step; 1 in the paper.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> AStar().name
    'a-star'
    >>> AStar(guided=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: AStar(guided=2): must be a number from 0 to 1 (a share of the steps).
    """

    step_size: float = STEP_SIZE
    guided: float = 1.0
    segregation: float = 1.0
    retention: float = 1.0

    name: ClassVar[str] = "a-star"
    title: ClassVar[str] = "A-STAR"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "segregation", "retention")
        check_guided(self)

    def begin(self, prompt: Prompt, steps: int) -> Memory:
        """Memory of the previous step's maps, empty at first."""
        return Memory()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update before each guided step; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        return schedule(len(noise), self.step_size, guided=self.guided) if len(prompt.entities) > 1 else []

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Memory) -> Loss:
        """Weighted sum of L_seg and L_ret; the trace stores the terms "segregation" and "retention" without weights."""
        entities = entity_maps(attention.mean, prompt)
        before = state.recall(step, entities)
        one, other = torch.triu_indices(len(entities), len(entities), 1)
        segregation = _overlap(entities[one], entities[other]).sum()
        retention = entities.new_zeros(())
        if before is not None:
            retention = (1 - _overlap(entities, torch.from_numpy(otsu_masks(before)).to(entities))).sum()
        return Loss(
            self.segregation * segregation + self.retention * retention,
            {"segregation": float(segregation.detach()), "retention": float(retention.detach())},
        )


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    """Sum of the minima of two maps, divided by the sum of both maps; at most 1/2; (n, y, x) twice -> (n,)."""
    return ratio(torch.minimum(one, other).sum((1, 2)), (one + other).sum((1, 2)))
