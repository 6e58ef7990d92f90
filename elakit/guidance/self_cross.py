"""Self-Cross guidance: what an entity's cells attend to should not be where another entity is.

Qiu et al., "Self-Cross Diffusion Guidance for Text-to-Image Synthesis of Similar Subjects", CVPR 2025
(arXiv:2411.18936), and its official code (github.com/mengtang-lab/selfcross-guidance). With A_i the map of entity i,
prepared as in Attend-and-Excite, and O_i the cells above its Otsu threshold:

    S_i = sum over p in O_i of A_i(p) * SelfAttention(p), smoothed, then normalized to sum 1
    L = max over i of (1 - max_p A_i) + mean over i != j of sum_p min(S_j, A_i)

The second term waits until the first is not above 0.5. In the paper it is added to another method's loss: here to
Attend-and-Excite's; a subclass with another `SelfCross.base` adds it to something else.
Step size and guided steps are Attend-and-Excite's. The code refines at steps 10 and 20 of 50 until the first term is
at most 0.2 and the second at most 0.3; the engine ends a refinement by the whole loss, so here until L is at most
their sum. Of the code alone, and left out: its search for the starting noise (`elakit.guidance.initno`), terms of
weight 0.1 for a clean background and for maps that stay, and the mean of the 16 largest values for max_p.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_whole
from elakit.guidance.preprocess import GUIDED, REFINED, STEP_SIZE, entity_maps, schedule, smooth
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt
from elakit.regions import otsu_masks


@dataclass(frozen=True)
class SelfCross(ReadsOneSize):
    """Self-Cross guidance on top of Attend-and-Excite's loss.

    Parameters
    ----------
    step_size : float
        Of the first step, 20 by the authors; it falls as Attend-and-Excite's does.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 by the authors.
    refinements : int
        At most so many further steps at 0.2 and 0.4 of the denoising steps; 20 by the authors.
    until : float
        Refinement ends once the loss is not above this.
    weight : float
        Of the overlap of self- and cross-attention; 1 by the authors.
    gate : float
        The overlap counts once the base loss is not above this; 0.5 by the authors.
    layers, size
        What is read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> SelfCross().name
    'self-cross'
    >>> SelfCross(weight=-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: SelfCross(weight=-1): must be a number of zero or more.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refinements: int = 20
    until: float = 0.5
    weight: float = 1.0
    gate: float = 0.5

    name: ClassVar[str] = "self-cross"
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "until", "weight", "gate")
        check_guided(self)
        check_whole(self, "refinements")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates and refinement; nothing where only one entity is named."""
        if len(prompt.entities) < 2:
            return []
        refine = dict.fromkeys(REFINED[1:], self.until)
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine, tries=self.refinements)

    def base(self, entities: Tensor) -> Tensor:
        """The loss that the overlap is added to, from the prepared maps (entity, y, x): Attend-and-Excite's."""
        return (1 - entities.amax((1, 2))).max()

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Any) -> Loss:
        """Base loss and overlap; its terms are "excite" and, also while it does not count yet, "self_cross"."""
        entities = entity_maps(attention.mean, prompt)
        base = self.base(entities)
        overlap = _overlap(entities, attention.own_mean)
        total = base if float(base.detach()) > self.gate else base + self.weight * overlap
        return Loss(total, {"excite": float(base.detach()), "self_cross": float(overlap.detach())})


def _overlap(entities: Tensor, own: Tensor) -> Tensor:
    """Mean over i != j of the sum of min(S_j, A_i)."""
    masks = torch.from_numpy(otsu_masks(entities)).to(entities)
    reach = smooth(torch.einsum("nyx,yxuv->nuv", entities * masks, own))
    mass = reach.sum((1, 2), keepdim=True)
    reach = reach / torch.where(mass > 0, mass, 1)
    shared = torch.minimum(reach, entities[:, None]).sum((2, 3))
    return (shared.sum() - shared.trace()) / max(1, len(entities) * (len(entities) - 1))
