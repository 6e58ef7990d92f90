"""What guidance did to an image, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr


@dataclass
class Trace:
    """What guidance did, step by step.

    Attributes
    ----------
    method : str
    options : dict
        The method's, as plain values.
    entities : tuple of str
    rows : list of dict
        One a guided step: step, timestep, step_size, loss, its terms, gradient_norm and moved (root mean square of the
        latent's change), both in latents of unit variance, refinements (steps taken before the last one), seconds (of
        the whole batch), skipped (the gradient was not finite, so the latent was left alone).
    searched : list of dict
        One a trial of the starting noise, for methods that choose it.
    """

    method: str
    options: dict[str, Any]
    entities: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    searched: list[dict[str, Any]] = field(default_factory=list)
    _regions: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a frame, indexed by step."""
        frame = pd.DataFrame(self.rows)
        return frame.set_index("step") if len(frame) else frame

    @property
    def regions(self) -> xr.DataArray | None:
        """Regions that were anchored to: boolean (step, entity, y, x); None if the method has none."""
        if not self._regions:
            return None
        return xr.DataArray(
            np.stack(list(self._regions.values())),
            dims=("step", "entity", "y", "x"),
            coords={"step": list(self._regions), "entity": list(self.entities)},
            name="regions",
        )

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite."""
        return sum(bool(row["skipped"]) for row in self.rows)

    def add(self, row: dict[str, Any], regions: np.ndarray | None) -> None:
        """Append a step."""
        self.rows.append(row)
        if regions is not None:
            self._regions[row["step"]] = regions
