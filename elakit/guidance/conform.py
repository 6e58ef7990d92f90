"""CONFORM: maps of an object and its attributes attract each other, maps of different objects repel each other.

Meral et al., "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", CVPR 2024
(arXiv:2312.06059), and its official code (github.com/gemlab-vt/CONFORM). The loss is NT-Xent, a contrastive loss over
the maps of every token of the entities and attributes, from the present pass and from the last pass of the previous
step (`elakit.guidance.contrast`). Maps are raw probabilities (the code's notebook switches the softmax over tokens
off), smoothed as in Attend-and-Excite. Step size and guided steps are Attend-and-Excite's. In a run of 50 steps, twenty
additional updates are made at each of the steps 0, 10 and 20, whatever the loss is. Maps of the same class (an entity
with its attributes) form pairs. At the first step, which has no previous maps, a class of a single map has no pair; if
no class has a pair, the latent is not moved. Loss and gradient equal those of the official code to rounding
(``tests/parity/test_losses.py``).

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
    """CONFORM (Meral et al., CVPR 2024): a contrastive loss over the maps of entities and their attributes.

    The module `elakit.guidance.conform` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 by default in the official code, 30 in
        its notebook.
    refinements : int
        Number of additional updates at each of three points, after shares 0, 0.2 and 0.4 of the denoising steps; 20 at
        each in the official code.
    temperature : float
        Temperature tau of the NT-Xent loss; 0.5 in the official code.
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
        """Updates with decreasing step sizes, and refinements at some steps; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        if len(prompt.entities) < 2:
            return []
        # The loss is 0 only where there is no pair to compare: then the extra passes are skipped.
        refine = [(share, 0.0, self.refinements) for share in REFINED]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: Memory) -> Loss:
        """NT-Xent loss over the maps of this step and the previous one; the trace stores it as the term "contrast"."""
        total = contrast(attention.mean, prompt, step, state, self.temperature)
        return Loss(total, {"contrast": float(total.detach())})
