"""Memory of an image's attention maps, for methods that compare a step with the previous one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Memory:
    """Maps of an image's last pass, for methods that compare a step with the previous one.

    Attributes
    ----------
    step : int or None
        Step of the last pass, counted from 0; None before the first pass.
    latest : Tensor or None
        Maps of the last pass.
    before : Tensor or None
        Maps of the last pass of the previous step; None at the first step.
    """

    step: int | None = None
    latest: Tensor | None = None
    before: Tensor | None = None

    def recall(self, step: int, maps: Tensor) -> Tensor | None:
        """Return the maps of the previous step (None at the first), and keep `maps` for the next step.

        If a step has several passes, the maps of its last pass are kept.

        Examples
        --------
        >>> import torch
        >>> memory = Memory()
        >>> [memory.recall(step, torch.tensor(value)) for step, value in ((0, 1), (0, 2), (1, 3), (1, 4))]
        [None, None, tensor(2), tensor(2)]
        """
        if step != self.step:
            self.step, self.before = step, self.latest
        self.latest = maps.detach()
        return self.before
