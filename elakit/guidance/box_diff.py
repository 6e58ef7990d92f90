"""BoxDiff: attention is strong inside an entity's box, weak outside, and ends at the box's edges.

Xie et al., "BoxDiff: Text-to-Image Synthesis with Training-Free Box-Constrained Diffusion", ICCV 2023
(arXiv:2307.10816), and its official code (github.com/showlab/BoxDiff). With A the map of an entity, prepared as in
Attend-and-Excite, M its region and top(.) the mean of the largest fifth of the cells of a region:

    inner  = 1 - top(A in M)
    outer  = top(A outside M)
    corner = mean over x of |max_y A - max_y M| within one cell of the box's left and right edge, and so for y

L is the sum of the three over entities. Step size and guided steps are Attend-and-Excite's.
The code can also refine, and calls that not necessary: at steps 0, 10 and 20 of 50 it first steps along the largest
inner term alone until that is low. Here, as in the paper's update, all steps are along L. A region below five cells
keeps its largest one (in the code it has none); masks enter as they are, with the edges of their bounding boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from elakit.guidance.layout import Layout, check_layout, layout_masks
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_whole, refuse
from elakit.guidance.preprocess import GUIDED, STEP_SIZE, entity_maps, schedule
from elakit.guidance.reading import ReadsOneSize
from elakit.measures.masks import bounding_box
from elakit.prompt import Prompt


@dataclass(frozen=True)
class BoxDiff(ReadsOneSize):
    """BoxDiff; needs regions.

    Parameters
    ----------
    regions : sequence of (left, top, right, bottom), or ndarray, bool, (entity, y, x)
        Where each entity belongs, in the order of the prompt: boxes in shares of the image, or masks; they may
        overlap.
    step_size : float
        Of the first step, 20 by the authors; it falls as Attend-and-Excite's does.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 by the authors.
    share : float
        Share of a region's cells that count, the strongest; 0.2 by the authors.
    edge : int
        Cells to either side of a box's edge that count in the corner term; 1 by the authors.
    layers, size
        What is read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        No regions, or a setting outside its range.

    Examples
    --------
    >>> BoxDiff([(0, 0, 0.5, 1), (0.5, 0, 1, 1)]).regions
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> BoxDiff(None)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: BoxDiff(regions=...): None is no layout; give one box an entity, ...
    """

    regions: Layout
    step_size: float = STEP_SIZE
    guided: float = GUIDED
    share: float = 0.2
    edge: int = 1

    name: ClassVar[str] = "boxdiff"

    def __post_init__(self) -> None:
        object.__setattr__(self, "regions", check_layout(self.regions, "BoxDiff(regions=...)"))
        check_numbers(self, "step_size", "share")
        check_guided(self)
        if not 0 < self.share <= 1:
            refuse(self, "share", "above 0 and at most 1 (a share of a region's cells)")
        check_whole(self, "edge")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update before each guided step; nothing where only one entity is named."""
        return schedule(len(noise), self.step_size, guided=self.guided) if len(prompt.entities) > 1 else []

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Sum of the terms "inner", "outer" and "corner", each summed over entities."""
        entities = entity_maps(attention.mean, prompt)
        masks = layout_masks(self.regions, (entities.shape[1], entities.shape[2]), len(entities))
        regions = torch.from_numpy(masks).to(entities.device)
        terms = {
            "inner": (1 - _top(entities, regions, self.share)).sum(),
            "outer": _top(entities, ~regions, self.share).sum(),
            "corner": _corner(entities, masks, self.edge).sum(),
        }
        total = torch.stack(list(terms.values())).sum()
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()}, masks)


def _top(maps: Tensor, regions: Tensor, share: float) -> Tensor:
    """Mean of the strongest cells of each region, of one at least; 0 in an empty one; (n, y, x) -> (n,)."""
    values = maps.masked_fill(~regions, 0).flatten(1).sort(dim=1, descending=True).values
    counts = (share * regions.sum((1, 2))).long().clamp_min(1)[:, None]
    strongest = torch.arange(values.shape[1], device=maps.device) < counts
    return (values * strongest / counts).sum(1)


def _corner(maps: Tensor, masks: np.ndarray, edge: int) -> Tensor:
    """How far the projections of map and mask differ near the edges of the mask's box; (n, y, x) -> (n,)."""
    left, top, right, bottom = torch.tensor([bounding_box(mask) for mask in masks], device=maps.device).T[..., None]
    regions = torch.from_numpy(masks).to(maps)
    result = maps.new_zeros(len(maps))
    for along, first, last in ((1, left, right), (2, top, bottom)):
        apart = (maps.amax(along) - regions.amax(along)).abs()
        cells = torch.arange(apart.shape[1], device=maps.device)
        near = ((cells - first).abs() <= edge) | ((cells - last).abs() <= edge)
        result = result + (apart * near).mean(1)
    return result
