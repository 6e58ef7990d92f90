"""Attend-and-Excite: raise the largest attention of the least attended entity.

Chefer, Alaluf, Vinker, Wolf and Cohen-Or, "Attend-and-Excite: Attention-Based Semantic Guidance for Text-to-Image
Diffusion Models", ACM Transactions on Graphics 42 (SIGGRAPH 2023), arXiv:2301.13826, and its official code. In the
equations, A are the raw attention maps of all tokens, A'_s is the prepared map of entity s, and z is the latent. The
number of the step is i, counted from 0, and N is the number of steps:

    A' = smooth(softmax over tokens of 100 A)      L = max over entities s of (1 - max over locations of A'_s)
    z' = z - alpha_i dL/dz                         alpha_i = 20 sqrt(1 - i / (2 (N - 1)))

The first 25 of 50 steps are guided. Steps 0, 10 and 20 begin with a refinement: the update is repeated until the
largest attention of every entity is at least 0.05, 0.5 and 0.8, respectively, but at most 20 times. The usual update of
the step follows. Except for rounding, losses and gradients equal those of the official code, with and without
``normalize_eot`` (``tests/parity/test_losses.py``).

Our decisions:

* If a noun has several tokens, its map is the mean of the maps of these tokens. Users of the official code choose one
  token per noun.
* Guided steps and refinements are given as shares of the run's steps.
* A prompt of fewer than two entities is not guided.

The pipeline of diffusers (``StableDiffusionAttendAndExcitePipeline``, 0.42) gives the same losses and updates
(``tests/guidance/test_attend_excite.py``), except where we think that its code is wrong:

* Its gradient passes do not apply the scheduler's ``scale_model_input`` to the latents. The gradients are wrong for
  Euler, LMS and other schedulers that scale the input.
* Its refinement compares the threshold with the loss before the latest update, and therefore makes one update too many.
* Its refinement ignores ``cross_attention_kwargs``, which contain, for example, the scale of a LoRA.
* Its argument ``attn_res`` is the size of the maps that are read. The default is (16, 16) for every image size. Most
  images other than 512 x 512 pixels have no maps of this size.
* ``attn_res=None`` computes the size of the maps as (width, height), but the maps are read as (height, width). The rows
  are wrong if the image is not square.
* Its guided steps and refinements have fixed step numbers, which do not depend on the number of steps of the run.
* At steps without guidance, it still computes a pass with gradients, which it does not use.
* After an error, its attention processors stay in the U-Net.
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
        Step size alpha at the first step; 20 in the official code. It decreases over the run to sqrt(1/2) times this
        value at the last step.
    guided : float
        Share of the denoising steps that are guided, beginning with the first step. The official code guides the first
        25 of 50 steps.
    refine : sequence of (float, float, int)
        Refinements, which repeat the update within one denoising step. Each refinement is a tuple of three numbers. The
        first is the step of the refinement, as a share of all steps. The second is the value that the maximum of every
        entity's map has to reach. The third is the largest number of additional updates. An empty sequence switches
        refinement off.
    normalize_eot : bool
        Whether end-of-text and padding are left out of the softmax over tokens. The official code leaves them out for
        Stable Diffusion 2.x, but not for 1.x.
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
        """One update per guided step, with decreasing step sizes; an empty list for a prompt of one entity.

        The updates of some steps contain a refinement, as the option `refine` states.
        `noise` holds the ratio of noise to signal before each denoising step; only the number of steps is used.
        """
        return excitation(len(noise), prompt, self.step_size, guided=self.guided, refine=self.refine)

    def loss(self, attention: Attention, prompt: Prompt, step: int, state: None) -> Loss:
        """Neglect of the most neglected entity.

        The neglect of an entity is 1 minus the maximum of its sharpened and smoothed map (`entity_maps`). The trace
        stores the mean neglect of all entities as the term "neglect".
        """
        maps = entity_maps(attention.mean, prompt, normalize_eot=self.normalize_eot)
        neglect = 1 - maps.amax((1, 2))
        return Loss(neglect.amax(), {"neglect": float(neglect.detach().mean())})
