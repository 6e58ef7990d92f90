"""Attend-and-Excite: the entity that attention neglects most is to get a cell of its own.

Chefer, Alaluf, Vinker, Wolf and Cohen-Or, "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image
Diffusion Models", ACM Transactions on Graphics 42 (SIGGRAPH 2023), arXiv:2301.13826, and its official code.

    A' = smooth(softmax over tokens of 100 A)      L = max over entities s of (1 - max over cells of A'_s)
    z' = z - alpha_i dL/dz                         alpha_i = 20 sqrt(1 - i / (2 (N - 1)))

over the first 25 of 50 steps. At steps 0, 10 and 20 such updates are repeated until the largest attention of every
entity is at least .05, .5 and .8, at most 20 times; one more update follows.

Left open, and decided here: a noun of several tokens has the mean of their maps; the schedule is kept in shares of the
run's steps; a prompt of fewer than two entities is left alone.

The pipeline of diffusers (``StableDiffusionAttendAndExcitePipeline``, 0.42) gives the same losses and updates
(``tests/test_rivals_words.py``), but for what we take to be mistakes of its code:

* its gradient passes get latents that have not been through the scheduler's ``scale_model_input``: wrong for Euler,
  LMS and others whose input is scaled;
* refinement compares the loss of before its latest step with the threshold, so it takes one step more than needed;
* refinement drops ``cross_attention_kwargs`` (a LoRA's scale, for one);
* ``attn_res`` is (16, 16) whatever the size of the image, and computed as (width, height) when None but read as
  (height, width): other sizes find no maps, and images that are not square may be read with wrong rows;
* its steps and thresholds are counted in steps whatever their number, and the later ones still pay for a pass with
  gradients that nothing is done with;
* its attention processors stay in the UNet after an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_guided, check_numbers, check_refine
from elakit.guidance.preprocess import GUIDED, REFINED, STEP_SIZE, Refinement, entity_maps, schedule
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt


@dataclass(frozen=True)
class AttendAndExcite(ReadsOneSize):
    """Attend-and-Excite.

    Parameters
    ----------
    step_size : float
        alpha of the first step, 20; at the last of all steps it would be sqrt(1/2) of it.
    guided : float
        Share of the denoising steps that are guided, from the first; .5.
    refine : sequence of (float, float, int)
        Refinements: the share of the steps at which each takes place, the largest attention that every entity is to
        reach, and the most steps taken to get there; empty for none.
    layers, size
        What is read; see `elakit.guidance.reading.ReadsOneSize`.

    Raises
    ------
    SettingError
        A setting is outside its range.

    Examples
    --------
    >>> AttendAndExcite().name
    'attend-and-excite'
    >>> AttendAndExcite(guided=2)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: AttendAndExcite(guided=2): must be between 0 and 1 (a share of the denoising steps).
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refine: tuple[Refinement, ...] = tuple(zip(REFINED, (0.05, 0.5, 0.8), (20, 20, 20), strict=True))

    name: ClassVar[str] = "attend-and-excite"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        check_refine(self, "largest attention to reach")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Falling steps with refinement; nothing where only one entity is named."""
        if len(prompt.entities) < 2:
            return []
        until: dict[float, float | None] = {share: 1 - least for share, least, _ in self.refine}
        tries = [most for _, _, most in self.refine]
        return schedule(len(noise), self.step_size, guided=self.guided, refine=until, tries=tries)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """1 - the largest attention of the most neglected entity; its term "neglect" is the mean over entities."""
        neglect = 1 - entity_maps(attention.mean, prompt).amax((1, 2))
        return Loss(neglect.amax(), {"neglect": float(neglect.detach().mean())})
