"""Trace of guidance: what a method did to one image, step by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr


@dataclass(repr=False)
class Trace:
    """Trace of the guidance of one image, step by step.

    Attributes
    ----------
    method : str
        Name of the method, a key of `elakit.guidance.METHODS`.
    options : dict
        Options of the method, as values that JSON can store.
    entities : tuple of str
        Labels of the prompt's entities.
    rows : list of dict
        One row per step at which the method computed its loss. A row has these keys:

        - "step": denoising step, counted from 0.
        - "timestep": timestep of the scheduler.
        - "step_size": step size of the latent steps; 0 if the latent was not moved.
        - "loss": total loss. Each term of the loss has a further key of its own.
        - "gradient_norm": Euclidean norm of the gradient, for a latent scaled to unit variance.
        - "moved": root mean square of the change of the latent, for a latent scaled to unit variance.
        - "refinements": number of latent steps in the refinement of this step.
        - "seconds": computing time of the guidance, for the whole batch.
        - "guided": True if the method moved the latent or edited attention scores. False, for example, if it found that
          the image needs no more guidance.
        - "skipped": True if the last latent step was left out, because the gradient was not finite.
    searched : list of dict
        One row per trial of initial noise; empty if the method does not search for initial noise.
    """

    method: str
    options: dict[str, Any]
    entities: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    searched: list[dict[str, Any]] = field(default_factory=list)
    _regions: dict[int, np.ndarray] = field(default_factory=dict)

    def to_frame(self) -> pd.DataFrame:
        """The attribute `rows` as a DataFrame with the index "step"; empty if there are no rows."""
        frame = pd.DataFrame(self.rows)
        return frame.set_index("step") if len(frame) else frame

    @property
    def regions(self) -> xr.DataArray | None:
        """Regions of the entities at all steps with regions, bool (step, entity, y, x); None if no step has regions."""
        if not self._regions:
            return None
        return xr.DataArray(
            np.stack(list(self._regions.values())),
            dims=("step", "entity", "y", "x"),
            coords={"step": list(self._regions), "entity": list(self.entities)},
            name="regions",
        )

    @property
    def guided(self) -> tuple[int, ...]:
        """Steps at which the method moved the latent or edited attention scores, counted from 0.

        Examples
        --------
        >>> rows = [{"step": 4, "guided": True, "skipped": False}, {"step": 5, "guided": False, "skipped": False}]
        >>> Trace("ela", {}, ("cat", "lion"), rows).guided
        (4,)
        """
        # traces written before the key existed have rows of guided steps only, apart from the last one
        return tuple(int(row["step"]) for row in self.rows if row.get("guided", True))

    @property
    def skipped(self) -> int:
        """Number of denoising steps at which the gradient of the loss was not finite."""
        return sum(bool(row["skipped"]) for row in self.rows)

    def add(self, row: dict[str, Any], regions: np.ndarray | None) -> None:
        """Append the row of a step, and store the regions of this step, bool (entity, y, x); None for no regions."""
        self.rows.append(row)
        if regions is not None:
            self._regions[row["step"]] = regions

    def to_dict(self) -> dict[str, Any]:
        """Return the trace as a dictionary that JSON can store; regions are left out.

        Examples
        --------
        >>> Trace("ela", {"guided": 0.5}, ("cat", "lion")).to_dict()["entities"]
        ['cat', 'lion']
        """
        return {
            "method": self.method,
            "options": self.options,
            "entities": list(self.entities),
            "rows": self.rows,
            "searched": self.searched,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any], regions: Mapping[int, np.ndarray] | None = None) -> Trace:
        """Trace from the dictionary that `to_dict` returned, and from regions that were stored separately.

        Parameters
        ----------
        plain : mapping
            Result of `to_dict`.
        regions : mapping of int to numpy.ndarray, bool (entity, y, x), optional
            Regions of the entities at each step; the keys are steps, counted from 0. By default the trace has no
            regions.

        Raises
        ------
        ValueError
            `plain` is not the result of `to_dict`.

        Examples
        --------
        >>> trace = Trace("ela", {}, ("cat", "lion"), [{"step": 0, "loss": 0.5, "skipped": False}])
        >>> Trace.from_dict(trace.to_dict()) == trace
        True
        """
        try:
            method, options, entities = plain["method"], plain["options"], plain["entities"]
            rows, searched = plain["rows"], plain["searched"]
        except KeyError as error:
            raise ValueError(f"the trace of guidance has no {error}") from error
        except TypeError as error:
            raise ValueError("the trace of guidance is not a JSON object") from error
        steps = isinstance(rows, list) and all(
            isinstance(row, dict) and {"step", "skipped"} <= set(row) for row in rows
        )
        named = isinstance(entities, list) and all(isinstance(entity, str) for entity in entities)
        tried = isinstance(searched, list) and all(isinstance(row, dict) for row in searched)
        rules = {
            "method": ("text", isinstance(method, str)),
            "options": ("an object", isinstance(options, dict)),
            "entities": ("a list of text", named),
            "rows": ("a list of objects with step and skipped", steps),
            "searched": ("a list of objects", tried),
        }
        for name, (rule, fits) in rules.items():
            if not fits:
                raise ValueError(f"{name} of the trace of guidance is not {rule}")
        return cls(
            method=method,
            options=options,
            entities=tuple(entities),
            rows=rows,
            searched=searched,
            _regions=dict(regions or {}),
        )

    def __repr__(self) -> str:
        count = len(self.guided)
        return f"Trace({self.method}, {count} guided {'step' if count == 1 else 'steps'})"
