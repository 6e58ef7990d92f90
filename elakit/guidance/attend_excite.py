"""Attend-and-Excite: raise the largest attention of the least attended entity.

Chefer, Alaluf, Vinker, Wolf and Cohen-Or, "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image
Diffusion Models", ACM Transactions on Graphics 42 (SIGGRAPH 2023), arXiv:2301.13826, and its official code.

    A' = smooth(softmax over tokens of 100 A)      L = max over entities s of (1 - max over locations of A'_s)
    z' = z - alpha_i dL/dz                         alpha_i = 20 sqrt(1 - i / (2 (N - 1)))

at step i of N, over the first 25 of 50 steps. The update is repeated at steps 0, 10 and 20 until the largest attention
of every entity is at least .05, .5 and .8, respectively; at most 20 times at each of these steps. One more update
follows. Losses and gradients equal those of the official code to rounding, with ``normalize_eot`` too
(``tests/parity/test_losses.py``).

Our decisions: the map of a noun of several tokens is the mean of their maps (the official code is given one token per
noun); guided steps and refinements are given as shares of the run's steps; a prompt of fewer than two entities is not
guided.

The pipeline of diffusers (``StableDiffusionAttendAndExcitePipeline``, 0.42) gives the same losses and updates
(``tests/guidance/test_attend_excite.py``), except for what we take to be mistakes of its code:

* its gradient passes get latents that have not been through the scheduler's ``scale_model_input``: wrong for Euler,
  LMS and others whose input is scaled;
* refinement compares the threshold with the loss before its latest step, so it takes one step more than needed;
* refinement drops ``cross_attention_kwargs`` (a LoRA's scale, for one);
* its argument ``attn_res``, the size of the maps that are read, is (16, 16) by default, whatever the size of the
  image, so that no maps are found at most sizes other than 512 x 512 pixels;
* ``attn_res=None`` computes this size as (width, height), but the maps are read as (height, width): the rows are wrong
  if the image is not square;
* its guided steps and refinements are fixed step numbers, whatever the number of steps of the run, and steps that are
  not guided still pay for an unused pass with gradients;
* its attention processors stay in the U-Net after an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from elakit.guidance.method import Attention, Loss, Update
from elakit.guidance.options import check_flag, check_guided, check_numbers, check_refine
from elakit.guidance.preprocess import GUIDED, REFINEMENTS, STEP_SIZE, Refinement, entity_maps, excitation
from elakit.guidance.reading import ReadsOneSize
from elakit.prompt import Prompt


@dataclass(frozen=True)
class AttendAndExcite(ReadsOneSize):
    """Attend-and-Excite (Chefer et al., SIGGRAPH 2023): raise the largest attention of the least attended entity.

    The module `elakit.guidance.attend_excite` states the equations and all differences from the source.

    Parameters
    ----------
    step_size : float
        Step size alpha at the first step; 20 in the official code. It decreases over the run, from this value at the
        first step to sqrt(1/2) times this value at the last.
    guided : float
        Share of the denoising steps that are guided, from the first; 25 of 50 in the official code.
    refine : sequence of (float, float, int)
        Refinements, each with three values: the step at which it takes place, as a share of all steps; the value that
        the maximum of every entity's map has to reach; and the largest number of additional updates. () for none.
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens. The official code does so for Stable
        Diffusion 2.x and not for 1.x.
    layers, size
        Layers and map size that are read; see `elakit.guidance.reading.ReadsOneSize`.

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
    elakit.errors.SettingError: AttendAndExcite(guided=2): must be a number from 0 to 1 (a share of the steps).
    """

    step_size: float = STEP_SIZE
    guided: float = GUIDED
    refine: tuple[Refinement, ...] = REFINEMENTS
    normalize_eot: bool = False

    name: ClassVar[str] = "attend-and-excite"
    title: ClassVar[str] = "Attend-and-Excite"

    def __post_init__(self) -> None:
        check_numbers(self, "step_size")
        check_guided(self)
        check_refine(self, "largest attention to reach")
        check_flag(self, "normalize_eot")

    def plan(self, noise: Sequence[float], prompt: Prompt) -> list[Update]:
        """Updates with decreasing step sizes, and refinements at some steps; no update for a prompt of one entity.

        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        return excitation(len(noise), prompt, self.step_size, guided=self.guided, refine=self.refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Neglect of the most neglected entity; the trace stores the mean over all entities as the term "neglect".

        The neglect of an entity is 1 minus the maximum of its sharpened and smoothed map (`entity_maps`).
        """
        maps = entity_maps(attention.mean, prompt, normalize_eot=self.normalize_eot)
        neglect = 1 - maps.amax((1, 2))
        return Loss(neglect.amax(), {"neglect": float(neglect.detach().mean())})
