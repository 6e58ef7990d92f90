"""Memory of an image's attention maps, for methods that compare a step with the previous step."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Memory:
    """Maps of an image at the latest step and at the previous step, for methods that compare the two steps.

    Attributes
    ----------
    step : int or None
        Latest step, counted from 0; None as long as no maps are stored.
    latest : Tensor or None
        Maps of the latest denoiser call in the latest step; None as long as no maps are stored.
    before : Tensor or None
        Maps of the last denoiser call in the previous step; None if there is no previous step.
    """

    step: int | None = None
    latest: Tensor | None = None
    before: Tensor | None = None

    def recall(self, step: int, maps: Tensor) -> Tensor | None:
        """Store `maps` as the latest maps of step `step`, and return the maps of the previous step.

        If the previous step had several denoiser calls, the maps of its last call are returned. At the first step, the
        result is None.

        Examples
        --------
        Maps 1 and 2 belong to step 0, and maps 3 and 4 to step 1. In step 1, the result is 2, the last map of step 0:

        >>> import torch
        >>> memory = Memory()
        >>> [memory.recall(step, torch.tensor(value)) for step, value in ((0, 1), (0, 2), (1, 3), (1, 4))]
        [None, None, tensor(2), tensor(2)]
        """
        if step != self.step:
            self.step, self.before = step, self.latest
        self.latest = maps.detach()
        return self.before
