"""CONFORM: maps of an entity and its attributes attract each other, maps of different entities repel each other.

Meral et al., "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", CVPR 2024
(arXiv:2312.06059), and its official code (github.com/gemlab-vt/CONFORM).

The loss is NT-Xent, a contrastive loss on maps (`elakit.guidance.contrast`). It uses one map per token of each entity's
noun and attributes, from the current denoiser call and from the last call of the previous step. The maps are raw
attention probabilities, smoothed as in Attend-and-Excite. They are not sharpened by a softmax over tokens, since the
notebook of the official code switches this softmax off.

Two maps form a pair if they belong to the same entity, attributes included. At the first step there are no previous
maps, so that an entity of a single token without attributes has no pair. If no entity has a pair, the latent does not
move.

As in Attend-and-Excite, the first 25 of 50 steps are guided, and the step size falls from 20 at step 0 to 20 sqrt(1/2)
at the last step of the run. At each of the steps 0, 10 and 20 of 50, twenty additional updates are made, whatever the
loss is. Loss and gradient equal those of the official code to rounding (``tests/parity/test_losses.py``).

Intended difference: a prompt of fewer than two entities is not guided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elakit.guidance.contrast import contrast
from elakit.guidance.memory import Memory
from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_whole, is_number, number, refuse
from elakit.guidance.preprocess import GUIDED, REFINED, STEP_SIZE, schedule
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt


@dataclass(frozen=True)
class CONFORM(ReadsOneSize):
    """CONFORM (Meral et al., CVPR 2024): a contrastive loss on the maps of entities and their attributes.

    The loss is small if the maps of an entity and its attributes are similar, and maps of different entities are not.
    The module `elakit.guidance.conform` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. The step size decreases over the run, to sqrt(1/2)
        times this value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step. In the official code, 25 of 50
        steps are guided by default, and 30 of 50 in the notebook.
    refinements : int
        Number of additional updates at each of three denoising steps: the first step, and the steps after 20% and 40%
        of the run. 20 in the official code.
    temperature : float
        Temperature tau by which the contrastive loss (NT-Xent) divides the similarities of maps; 0.5 in the official
        code.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> CONFORM().name
    'conform'
    >>> CONFORM(temperature=0)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: CONFORM(temperature=0): must be a finite number above 0.
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refinements: int = 20
    temperature: float = 0.5

    name: ClassVar[str] = "conform"
    title: ClassVar[str] = "CONFORM"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        if not is_number(number(self, "temperature")) or self.temperature == 0:
            refuse(self, "temperature", "a finite number above 0")
        check_whole(self, "refinements")

    def begin(self, prompt: Prompt, steps: int) -> Memory:
        """Memory of the previous step's maps, empty at first."""
        return Memory()

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        At three steps (the first, and those after 20% and 40% of the run), the update includes a refinement. `noise`
        holds the ratio of noise to signal before each denoising step; only its length is used.
        """
        if len(prompt.entities) < 2:
            return []
        # The loss is 0 only where there is no pair to compare: then the extra passes are skipped.
        refine = [(share, 0.0, self.refinements) for share in REFINED]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Memory) -> Loss:
        """Contrastive loss (NT-Xent) on the entities' maps of this step and of the previous step.

        The trace stores the loss as the term "contrast". `state` provides the maps of the previous step, and stores the
        maps of this step.
        """
        total = contrast(attention.mean, prompt, step, state, self.temperature)
        return Loss(total, {"contrast": float(total.detach())})
