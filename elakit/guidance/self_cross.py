"""Self-Cross guidance: separate the self-attention of one entity from the cross-attention of another.

Qiu et al., "Self-Cross Diffusion Guidance for Text-to-Image Synthesis of Similar Subjects", CVPR 2025
(arXiv:2411.18936), and its official code (github.com/mengtang-lab/selfcross-guidance, pipelines/pipeline_sc_initno.py).
Let A_i be the map of entity i, prepared as in Attend-and-Excite. Let O_i be its Otsu mask, the locations at which A_i
is at or above Otsu's threshold. Let SelfAttention(p) be the map of the self-attention from location p. Then:

    S_i = sum over p in O_i of A_i(p) * SelfAttention(p), smoothed, then normalized to sum 1
    cross = max over i of (1 - mean of the K largest values of A_i)
    overlap = mean over i != j of (sum over p of min(S_j(p), A_i(p)))
    L = cross + overlap + 0.1 * clean background

The overlap is part of L only if `cross` is at most 0.5. If the maps have more than 16 rows (Stable Diffusion 2.1 at 768
pixels), each A_i is normalized to sum 1 before the overlap is computed. Step sizes are those of Attend-and-Excite.

After 20% and after 40% of the steps, the latent is refined: latent steps follow the gradient of L + 0.1 * alignment
until L is at most 0.2. The clean-background term and the alignment term are those of InitNO
(`elakit.guidance.preprocess`).

The authors' run script sets K = 16. It guides 25 of 50 steps with Stable Diffusion 1.x, and 40 of 50 steps with Stable
Diffusion 2.1 (``guided=0.8``).

L and its gradient equal those of the official code to rounding (``tests/parity/test_losses.py``). Intended differences:

- The search for the initial noise is a separate method (`elakit.guidance.initno`).
- The map of a noun with several tokens is the mean of the tokens' maps.
- Refinement stops as soon as L is at most 0.2. The official code then makes one more update.
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

    The loss is small if the self-attention of one entity does not overlap with the cross-attention of another. The
    module `elakit.guidance.self_cross` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. The step size decreases over the run, to sqrt(1/2)
        times this value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step. In the official code, 25 of 50
        steps are guided with Stable Diffusion 1.x, and 40 of 50 with 2.1.
    refinements : int
        Largest number of additional updates at each of two denoising steps: the steps after 20% and 40% of the run. 20
        in the official code.
    until : float
        Refinement ends as soon as the whole loss is at most this value; 0.2 in the official code.
    top : int
        Number K. The attention of an entity is the mean of the K largest values of its map. 16 in the authors' run
        script.
    weight : float
        Weight of the overlap of one entity's self-attention and another entity's cross-attention; 1 in the official
        code.
    gate : float
        The overlap is part of the loss only if the cross term is at most this value; 0.5 in the official code. The
        cross term is 1 minus the attention of the least attended entity.
    clean : float
        Weight of the clean-background term, which penalizes attention outside the connected area around a map's
        maximum; 0.1 in the official code.
    layers, size
        Layers whose maps are read, and the size of these maps; see `elakit.guidance.reading.ReadsOneSize`.

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
        """Initial state of one image: an empty running average of the image's maps, which `loss` updates."""
        return RunningMaps()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        At two steps (after 20% and 40% of the run), the update includes a refinement. `noise` holds the ratio of noise
        to signal before each denoising step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        refine = [(share, self.until, self.refinements) for share in REFINED[1:]]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: RunningMaps) -> Loss:
        """Loss of one image, a weighted sum of three terms.

        - "excite": 1 minus the attention of the least attended entity.
        - "self_cross": overlap of one entity's self-attention and another entity's cross-attention. While "excite"
          exceeds `gate`, this term is left out of the sum, but still reported.
        - "clean": attention outside the connected area around a map's maximum.

        Refinements follow the gradient of this loss plus 0.1 times the distance of the maps from the running average in
        `state`.
        """
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

    The overlap of a pair is the sum over locations of min(S_j, A_i). If the maps have more than 16 rows, A_i is first
    normalized to a sum of 1.

    S_j is computed in three steps. First, the self-attention of all locations in the Otsu mask of A_j is summed, with
    the values of A_j as weights. Second, this sum is smoothed. Third, it is normalized to a sum of 1.

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
