"""BoxDiff: the attention of an entity is strong inside its box, weak outside, and reaches the edges of the box.

Xie et al., "BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion", ICCV 2023
(arXiv:2307.10816), and its official code (github.com/showlab/BoxDiff).

The loss of an entity has three terms. Let A be the entity's map, sharpened and smoothed as in Attend-and-Excite, and M
the entity's region: 1 inside, 0 outside. Let top(.) be the mean of the largest 20% of the values:

    inner  = 1 - top(A in M)
    outer  = top(A outside M)
    corner = mean over x of |max_y A - max_y M|, plus the mean over y of |max_x A - max_x M|

In the first mean of the corner term, only columns at most one location from the left or right edge of the box count;
the other columns contribute 0. In the second mean, the same holds for rows, with the top and bottom edges. The loss of
the image is the sum of the three terms over all entities.

As in Attend-and-Excite, the first 25 of 50 steps are guided, and the step size falls from 20 at step 0 to 20 sqrt(1/2)
at the last step of the run. Each guided step has one update along the gradient of the loss. As in the official code's
default configuration (``refine = True``), there are also refinements at steps 0, 10 and 20 of 50, before this update.
A refinement follows the gradient of the largest inner term alone. It ends when top(A in M) of every entity reaches a
goal, or after 20 updates. The goal is .05 at step 0, .5 at step 10 and .8 at step 20.

Loss and gradient equal those of the official code to rounding (``tests/parity/test_losses.py``). Intended differences:

- In a region of fewer than five locations, top(.) is the largest value. The official code uses no value there.
- Regions may also be masks. The edges of a mask are those of its bounding box.
- A refinement ends with the pass that reaches the goal. The official code makes one more update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elakit.guidance.layout import NeedsLayout, layout_masks
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import (
    check_flag,
    check_guided,
    check_numbers,
    check_refine,
    check_whole,
    is_number,
    number,
    refuse,
)
from elakit.guidance.preprocess import GUIDED, REFINEMENTS, STEP_SIZE, Refinement, entity_maps, excitation
from elakit.guidance.reading import ReadsOneSize
from elakit.measures.masks import bounding_box
from elakit.prompt import Prompt


@dataclass(frozen=True)
class BoxDiff(NeedsLayout, ReadsOneSize):
    """BoxDiff (Xie et al., ICCV 2023): make attention strong inside given regions, and weak outside.

    The module `elakit.guidance.box_diff` states the equations and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks; they may overlap.
    step_size : float
        Step size alpha at the first step; 20 in the official code. The step size decreases over the run, to sqrt(1/2)
        times this value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step; 25 of 50 in the official code.
    share : float
        Share of the locations over which the loss averages attention, inside a region and likewise outside: the
        locations with the largest attention. 0.2 in the official code.
    edge : int
        The loss compares the extent of the attention with the box only near the box's edges: up to this distance, in
        locations; 1 in the official code.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step of the refinement, as a share of all steps; the attention that
        every entity has to reach inside its region; and the largest number of additional updates. () for no refinement.
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens. The official code leaves them out for
        Stable Diffusion 2.x, but not for 1.x.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        No regions are given, a region is empty or leaves the image, or a setting is outside its range.

    Examples
    --------
    >>> BoxDiff([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).regions
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> BoxDiff(None)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: BoxDiff(regions=...): None is not a layout. Give one box per entity, ...
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    share: float = 0.2
    edge: int = 1
    refine: tuple[Refinement, ...] = REFINEMENTS
    normalize_eot: bool = False

    name: ClassVar[str] = "boxdiff"
    title: ClassVar[str] = "BoxDiff"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "step_size")
        check_guided(self)
        if not is_number(number(self, "share"), most=1) or self.share == 0:
            refuse(self, "share", "a number above 0 and at most 1 (a share of a region's locations)")
        check_whole(self, "edge")
        check_refine(self, "attention inside the region to reach")
        check_flag(self, "normalize_eot")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        At the steps that the option `refine` lists, the update includes a refinement. `noise` holds the ratio of noise
        to signal before each denoising step; only its length is used.
        """
        return excitation(len(noise), prompt, self.step_size, guided=self.guided, refine=self.refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Sum over entities of the three loss terms "inner", "outer" and "corner".

        The term "inner" is small if the entity's attention is strong inside its region. "outer" is small if the
        attention is weak outside the region. "corner" is small if the attention extends up to the edges of the region's
        bounding box. `step` and `state` are not used.
        """
        entities = entity_maps(attention.mean, prompt, normalize_eot=self.normalize_eot)
        masks = layout_masks(self.regions, (entities.shape[1], entities.shape[2]), len(entities))
        regions = torch.from_numpy(masks).to(entities.device)
        inner = 1 - _top(entities, regions, self.share)
        terms = {
            "inner": inner.sum(),
            "outer": _top(entities, ~regions, self.share).sum(),
            "corner": _corner(entities, masks, self.edge).sum(),
        }
        total = torch.stack(list(terms.values())).sum()
        neglect = inner.amax()
        return Loss(
            total,
            {name: float(term.detach()) for name, term in terms.items()},
            regions=masks,
            goal=float(neglect.detach()),
            refinement=neglect,
        )


def _top(maps: Tensor, regions: Tensor, share: float) -> Tensor:
    """Mean of the largest values that each map has inside its region; (n, y, x) -> (n,).

    The number of averaged values is `share` times the number of locations in the region, rounded down, but at least 1.
    `regions` is bool (n, y, x). The mean is 0 for an empty region.
    """
    values = maps.masked_fill(~regions, 0).flatten(1).sort(dim=1, descending=True).values
    counts = (share * regions.sum((1, 2))).long().clamp_min(1)[:, None]
    strongest = torch.arange(values.shape[1], device=maps.device) < counts
    return (values * strongest / counts).sum(1)


def _corner(maps: Tensor, masks: np.ndarray, edge: int) -> Tensor:
    """Corner term of the loss: compare the extent of each map with the extent of its mask; (n, y, x) -> (n,).

    For each column, the term takes the absolute difference between the largest value of the map and the largest value
    of the mask. A column counts as 0 if it is more than `edge` locations away from both the left and the right edge of
    the mask's bounding box. The same is done for rows, with the top and bottom edges. The result is the mean over all
    columns plus the mean over all rows.
    """
    left, top, right, bottom = torch.tensor([bounding_box(mask) for mask in masks], device=maps.device).T[..., None]
    regions = torch.from_numpy(masks).to(maps)
    result = maps.new_zeros(len(maps))
    for along, first, last in ((1, left, right), (2, top, bottom)):
        apart = (maps.amax(along) - regions.amax(along)).abs()
        index = torch.arange(apart.shape[1], device=maps.device)
        near = ((index - first).abs() <= edge) | ((index - last).abs() <= edge)
        result = result + (apart * near).mean(1)
    return result
