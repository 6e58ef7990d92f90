"""Self-Cross guidance: separate the self-attention of one entity from the cross-attention of another.

Qiu et al., "Self-Cross Diffusion Guidance for Text-to-Image Synthesis of Similar Subjects", CVPR 2025
(arXiv:2411.18936), and its official code (github.com/mengtang-lab/selfcross-guidance, pipelines/pipeline_sc_initno.py).
With A_i the map of entity i, prepared as in Attend-and-Excite, and O_i its Otsu mask:

    S_i = sum over p in O_i of A_i(p) * SelfAttention(p), smoothed, then normalized to sum 1
    cross = max over i of (1 - mean of the K largest values of A_i)
    overlap = mean over i != j of sum_p min(S_j, A_i)
    L = cross + overlap + 0.1 * clean background

The overlap is part of L only if `cross` is at most 0.5. Maps with more than 16 rows (Stable Diffusion 2.1 at 768
pixels) are normalized to sum 1 in the overlap. Refinement at steps 10 and 20 of 50 follows L + 0.1 * alignment until L
is at most 0.2. The clean-background and alignment terms are those of InitNO (`elakit.guidance.preprocess`). Step sizes
are those of Attend-and-Excite. The authors' run script uses K = 16, and 25 guided steps of 50 for Stable Diffusion 1.x
and 40 for 2.1 (``guided=0.8``).

L and its gradient equal those of the official code to rounding (``tests/parity/test_losses.py``). Intended
differences: the search for the initial noise is a method of its own (`elakit.guidance.initno`); a noun of several
tokens has the mean of their maps; refinement stops at the pass that meets its goal, where the official code takes one
more update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_acts, check_guided, check_numbers, check_whole
from elakit.guidance.preprocess import (
    GUIDED,
    NATIVE_SIZE,
    REFINED,
    STEP_SIZE,
    RunningMaps,
    clean_background,
    entity_maps,
    quantized_otsu,
    schedule,
    smooth,
)
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt

_SMALL = 1e-4  # added to the mass that maps are divided by, as in the official code


@dataclass(frozen=True)
class SelfCross(ReadsOneSize):
    """Self-Cross guidance (Qiu et al., CVPR 2025): separate self-attention from other entities' cross-attention.

    The module `elakit.guidance.self_cross` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code, 40 for Stable
        Diffusion 2.1.
    refinements : int
        Largest number of additional updates at each of two points, after shares 0.2 and 0.4 of the denoising steps; 20
        at each in the official code.
    until : float
        Value of the whole loss at or below which refinement ends; 0.2 in the official code.
    top : int
        Number K of a map's largest values whose mean is used as its maximum; 16 in the authors' run script.
    weight : float
        Weight of the overlap of one entity's self-attention and another's cross-attention; 1 in the official code.
    gate : float
        Value of the cross term (1 minus the attention of the least attended entity) at or below which the overlap is
        part of the loss; 0.5 in the official code.
    clean : float
        Weight of the clean-background term, attention outside the region around a map's maximum; 0.1 in the official
        code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

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
    elakit.errors.SettingError: SelfCross(weight=-1): must be a finite number, 0 or more.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refinements: int = 20
    until: float = 0.2
    top: int = 16
    weight: float = 1.0
    gate: float = 0.5
    clean: float = 0.1

    name: ClassVar[str] = "self-cross"
    title: ClassVar[str] = "Self-Cross guidance"
    reads_self: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_numbers(self, "step_size", "until", "weight", "gate", "clean")
        check_guided(self)
        check_whole(self, "refinements")
        check_whole(self, "top", least=1)
        if self.weight == 0:
            check_acts(self, "weight=0", "gate")
        if self.refinements == 0:
            check_acts(self, "refinements=0", "until")

    def begin(self, prompt: Prompt, steps: int) -> RunningMaps:
        """Running average of the image's maps, for the alignment term of refinement."""
        return RunningMaps()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates with decreasing step sizes, and refinements at some steps; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        refine = [(share, self.until, self.refinements) for share in REFINED[1:]]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: RunningMaps) -> Loss:
        """Loss L, with the terms "excite" (cross), "self_cross" (overlap, even if L leaves it out) and "clean"."""
        entities = entity_maps(attention.mean, prompt)
        cross = (1 - entities.flatten(1).topk(min(self.top, entities[0].numel()), 1).values.mean(1)).amax()
        overlap, clean = _overlap(entities, attention.own_mean), clean_background(entities)
        total = cross + self.clean * clean
        if float(cross.detach()) <= self.gate:
            total = total + self.weight * overlap
        terms = {"excite": cross, "self_cross": overlap, "clean": clean}
        refinement = total + 0.1 * state.distance(entities)
        return Loss(total, {name: float(term.detach()) for name, term in terms.items()}, refinement=refinement)


def _overlap(entities: Tensor, own: Tensor) -> Tensor:
    """Overlap of one entity's self-attention S_j and another entity's map A_i, averaged over all pairs i != j.

    The overlap of a pair is the sum over locations of min(S_j, A_i). S_j is the sum of the self-attention of the
    locations in the Otsu mask of A_j, weighted with A_j, smoothed, and normalized to a sum of 1. If the maps have more
    than 16 rows, this function normalizes A_i to a sum of 1 before it takes the minimum.

    Parameters
    ----------
    entities : Tensor, (entity, y, x)
        Maps A of all entities, from `entity_maps`.
    own : Tensor, (y, x, y, x)
        Self-attention from each location (first y, x) to all locations (last y, x).

    Returns
    -------
    Tensor, scalar
    """
    masks = torch.from_numpy(quantized_otsu(entities)).to(entities)
    reach = smooth(torch.einsum("nyx,yxuv->nuv", entities * masks, own))
    reach = reach / (reach.sum((1, 2), keepdim=True) + _SMALL)
    if entities.shape[1] > NATIVE_SIZE:
        entities = entities / (entities.sum((1, 2), keepdim=True) + _SMALL)
    shared = torch.minimum(reach, entities[:, None]).sum((2, 3))
    return (shared.sum() - shared.trace()) / max(1, len(entities) * (len(entities) - 1))
