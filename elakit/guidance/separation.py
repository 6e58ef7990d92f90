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
    """Separation of ELA: a contrastive loss on the maps, and latent steps in all steps before anchoring.

    In the first steps, the attention maps are nearly noise, so that regions localized in them mean little. But what
    these steps decide cannot be changed later: an entity whose map then resembles that of another entity is often
    missing from the image. The loss is that of CONFORM, which needs no regions. The paper on ELA does not mention
    separation; it is our addition.

    Parameters
    ----------
    step_size : float
        Factor of the raw gradient in each latent step; 20 in CONFORM's official code. The gradient, and with it the
        step, is small if the maps of different entities already differ and those of one entity are alike. 0 switches
        separation off.
    temperature : float
        Temperature tau of the loss, greater than 0; 0.5 in CONFORM's official code.

    Raises
    ------
    SettingError
        An option is out of range, or has no effect together with another one.

    References
    ----------
    Meral et al., "CONFORM: Contrast is All You Need For High-Fidelity Text-to-Image Diffusion Models", CVPR 2024,
    arXiv:2312.06059.

    Examples
    --------
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
        """Updates of the first `steps` steps of a run, all of the same size."""
        return [Update(self.step_size, raw=True)] * steps

    def loss(self, maps: Tensor, prompt: Prompt, step: int, memory: Memory) -> Loss:
        """Contrastive loss of one image at one step.

        Parameters
        ----------
        maps : Tensor, (token, y, x)
            Attention probabilities.
        prompt : Prompt
        step : int
            Denoising step, counted from 0.
        memory : Memory
            Memory with the maps of the previous step, in which the call stores those of this step.

        Returns
        -------
        Loss
            Its term is "contrast". It has no regions.
        """
        total = contrast(maps, prompt, step, memory, self.temperature)
        return Loss(total, {"contrast": float(total.detach())})
