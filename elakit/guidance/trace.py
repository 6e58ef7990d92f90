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
        Options of the method, as values for JSON.
    entities : tuple of str
        Labels of the prompt's entities.
    rows : list of dict
        One row per step at which the method computed its loss, with these keys: "step" (counted from 0); "timestep";
        "step_size" (0 if the latent was not moved); "loss", and one key per term of the loss; "gradient_norm" and
        "moved" (root mean square of the change of the latent), both for latents of unit variance; "refinements" (number
        of latent steps of the step's refinement); "seconds" (for the whole batch); "guided" (True if the method moved
        the latent or edited attention scores; False, for example, at the step at which it found that the image needs no
        more guidance); and "skipped" (True if the gradient was not finite, so that the last latent step was left out).
    searched : list of dict
        One row per trial of initial noise; empty unless the method searches for it.
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
        """Regions of the entities at the steps of `rows`, bool (step, entity, y, x); None if the method has none."""
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
        """Number of steps whose gradient was not finite."""
        return sum(bool(row["skipped"]) for row in self.rows)

    def add(self, row: dict[str, Any], regions: np.ndarray | None) -> None:
        """Append the row of a step, and its regions, bool (entity, y, x), if there are any."""
        self.rows.append(row)
        if regions is not None:
            self._regions[row["step"]] = regions

    def to_dict(self) -> dict[str, Any]:
        """Values for JSON, without the regions.

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
        """Trace from the result of `to_dict` and, because that has no regions, from separately stored regions.

        Parameters
        ----------
        plain : mapping
            Result of `to_dict`.
        regions : mapping of int to numpy.ndarray, bool (entity, y, x), optional
            Regions of the entities by step, counted from 0; by default the trace has none.

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
