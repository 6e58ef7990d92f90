"""A-STAR: separate the attention of entities, and retain each entity's attention from one step to the next.

Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", ICCV 2023
(arXiv:2306.14544), equations 2 to 4. A_m is the map of entity m, and B_m is the binarized map of the same entity at the
previous step. The locations of a map are p, the latent is z, and the step size is alpha:

    L_seg = sum over pairs m > n of  sum_p min(A_m, A_n) / sum_p (A_m + A_n)
    L_ret = sum over m of  1 - sum_p min(A_m, B_m) / sum_p (A_m + B_m)
    z' = z - alpha * gradient of (L_seg + L_ret), before every denoising step

No official code is public, so only the equations were checked. Our decisions, where the paper leaves a choice:

* Maps are sharpened and smoothed as in Attend-and-Excite. The values of A_m then range from 0 to 1, and can be compared
  with the values 0 and 1 of B_m.
* B_m is 1 at the locations whose attention is above Otsu's threshold.
* The step size alpha is that of Attend-and-Excite.
* The first step has no L_ret.
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
        Step size alpha at the first step. It decreases over the run to sqrt(1/2) times this value at the last step. The
        paper gives no step size; the default, 20, is that of Attend-and-Excite.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step. The paper guides all steps.
    segregation : float
        Weight of the segregation loss, the overlap of the maps of different entities; 1 in the paper.
    retention : float
        Weight of the retention loss, which is small if each entity's map overlaps its binarized map of the previous
        step; 1 in the paper.
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
        """Weighted sum of the segregation loss and the retention loss.

        The segregation loss is the overlap of the maps of different entities. The retention loss is small if each map
        overlaps the binarized map of the same entity at the previous step. The trace stores the two losses without
        their weights, as the terms "segregation" and "retention".
        """
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
    """Overlap of pairs of maps: the sum over locations of the minimum of both maps, divided by the sum of both maps.

    `one` and `other` are (n, y, x), with one pair per index. The result is (n,), with values from 0 to 1/2.
    """
    return ratio(torch.minimum(one, other).sum((1, 2)), (one + other).sum((1, 2)))
