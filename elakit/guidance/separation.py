"""Separation part of ELA: latent steps that move the entities' maps apart before regions can be localized in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from elakit.checks import real_number, refuse
from elakit.guidance.contrast import contrast
from elakit.guidance.memory import Memory
from elakit.guidance.method import Loss, Update
from elakit.prompt import Prompt

TEMPERATURE = 0.5


@dataclass(frozen=True, kw_only=True)
class Separation:
    """Separation, the first part of ELA: latent steps along the gradient of a contrastive loss, before anchoring.

    In the first steps, the attention maps are nearly noise, so that regions localized in them mean little. But
    the decisions of these steps cannot be changed later: if the maps of two entities resemble each other in the first
    steps, one of the entities is often missing from the image.

    The loss is that of CONFORM, and needs no regions. It is small if the maps of an entity and its attributes are
    similar, and the maps of different entities are not. The paper on ELA does not mention separation; it is our
    addition.

    Parameters
    ----------
    step_size : float
        Factor by which the gradient is multiplied in each latent step; 20 in CONFORM's official code. The gradient is
        not normalized. Latent steps are therefore short if the maps of different entities already differ. 0 switches
        separation off.
    temperature : float
        Temperature tau by which the loss divides the similarities of maps, greater than 0; 0.5 in CONFORM's official
        code.

    Raises
    ------
    SettingError
        An option is out of range, or has no effect because of another option.

    References
    ----------
    Meral et al., "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", CVPR 2024,
    arXiv:2312.06059.

    Examples
    --------
    A plan for two steps has two updates with the same step size:

    >>> [update.size for update in Separation(step_size=10).plan(2)]
    [10, 10]
    >>> Separation(temperature=0)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: Separation(temperature=0): must be a finite number above 0.
    """

    step_size: float = 40.0
    temperature: float = TEMPERATURE

    def __post_init__(self) -> None:
        own: dict[str, Any] = {"owner": "Separation"}
        real_number(self.step_size, "step_size", 0, **own)
        if real_number(self.temperature, "temperature", 0, **own) == 0:
            refuse(self.temperature, "temperature", "a finite number above 0", **own)
        if self.step_size == 0 and self.temperature != TEMPERATURE:
            refuse(self.temperature, "temperature", "left out, because it has no effect with step_size=0", **own)

    def plan(self, steps: int) -> list[Update]:
        """One update for each of the first `steps` denoising steps, all with the same step size."""
        return [Update(self.step_size, raw=True)] * steps

    def loss(self, maps: Tensor, prompt: Prompt, step: int, memory: Memory) -> Loss:
        """Contrastive loss of one image at one step.

        The loss is small if the maps of an entity and its attributes are similar, and the maps of different entities
        are not. Maps of the previous step are included.

        Parameters
        ----------
        maps : Tensor, (token, y, x)
            Attention probabilities of all text positions.
        prompt : Prompt
        step : int
            Denoising step, counted from 0.
        memory : Memory
            Memory with the maps of the previous step. The function adds the maps of this step to the memory.

        Returns
        -------
        Loss
            Loss with the single term "contrast", and without regions.
        """
        total = contrast(maps, prompt, step, memory, self.temperature)
        return Loss(total, {"contrast": float(total.detach())})
