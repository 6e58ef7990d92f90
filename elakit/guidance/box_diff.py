"""BoxDiff: strong attention inside an entity's box, weak attention outside, and edges where the box has its edges.

Xie et al., "BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion", ICCV 2023
(arXiv:2307.10816), and its official code (github.com/showlab/BoxDiff). With A the map of an entity, prepared as in
Attend-and-Excite, M its region, and top(.) the mean of the largest 20% of the values in a region:

    inner  = 1 - top(A in M)
    outer  = top(A outside M)
    corner = mean over x of |max_y A - max_y M|, counted as 0 where x is farther than one location from both the left
             and the right edge of the box, plus the same with x and y exchanged

L is the sum of the three over entities. Step size and guided steps are Attend-and-Excite's. As in the official code's
default configuration (``refine = True``), updates along the largest inner term alone are repeated at steps 0, 10 and 20
of 50 until top(A in M) of every entity is at least .05, .5 and .8, respectively, at most 20 times at each of these
steps; an update along L follows.

Loss and gradient equal those of the official code to rounding (``tests/parity/test_losses.py``). Intended
differences: in a region of fewer than five locations, top(.) is the largest value (the official code uses none);
regions may also be masks, whose edges are those of their bounding boxes; refinement stops at the pass that meets its
goal, where the official code takes one more update.
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
    """BoxDiff (Xie et al., ICCV 2023), with given regions: strong attention inside, weak attention outside.

    The module `elakit.guidance.box_diff` states the equations and all differences from the source.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        One region per entity, in the order of the prompt: boxes as fractions of the image, or masks; they may overlap.
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code.
    share : float
        Share of a region's locations, those with the largest attention, whose mean the loss uses; 0.2 in the official
        code.
    edge : int
        Number of locations on each side of a box's edge up to which the corner term reaches; 1 in the official code.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step at which it takes place, as a share of all steps; the attention
        inside its region that every entity has to reach; and the largest number of additional updates. () for none.
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens. The official code does so for Stable
        Diffusion 2.x and not for 1.x.
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
    elakit.errors.SettingError: BoxDiff(regions=...): None is not a layout: give one box per entity, ...
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
        """Updates with decreasing step sizes, and refinements at some steps; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        return excitation(len(noise), prompt, self.step_size, guided=self.guided, refine=self.refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Sum of the terms "inner", "outer" and "corner", each summed over entities."""
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
    """Mean of the largest values of each map in its region; (n, y, x) -> (n,); 0 for an empty region.

    The number of these values is `share` times the number of locations in the region, rounded down, but at least one.
    """
    values = maps.masked_fill(~regions, 0).flatten(1).sort(dim=1, descending=True).values
    counts = (share * regions.sum((1, 2))).long().clamp_min(1)[:, None]
    strongest = torch.arange(values.shape[1], device=maps.device) < counts
    return (values * strongest / counts).sum(1)


def _corner(maps: Tensor, masks: np.ndarray, edge: int) -> Tensor:
    """Corner term of each map: the projections of map and mask, compared near the box's edges; (n, y, x) -> (n,)."""
    left, top, right, bottom = torch.tensor([bounding_box(mask) for mask in masks], device=maps.device).T[..., None]
    regions = torch.from_numpy(masks).to(maps)
    result = maps.new_zeros(len(maps))
    for along, first, last in ((1, left, right), (2, top, bottom)):
        apart = (maps.amax(along) - regions.amax(along)).abs()
        index = torch.arange(apart.shape[1], device=maps.device)
        near = ((index - first).abs() <= edge) | ((index - last).abs() <= edge)
        result = result + (apart * near).mean(1)
    return result
