"""Remedies for a prompt that fails, and their results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from elakit.guidance import Method, method_title
from elakit.prompt import Prompt
from elakit.run import Run
from elakit.statistics import wilson

Kind = Literal["guidance", "seed", "wording", "regions"]
Status = Literal["tried", "failed", "not tried"]

_TITLES = {
    "another-seed": "Another seed",
    "swapped": "Entities in the opposite order",
    "next-to": "“next to” instead of “and”",
    "regions": "Regions side by side",
}


@dataclass(frozen=True)
class Remedy:
    """One change that may fix a prompt that fails: guidance, another seed, another wording, or boxes as regions.

    Attributes
    ----------
    name : str
        Name of a guidance method, or "another-seed", "swapped", "next-to" or "regions".
    kind : {"guidance", "seed", "wording", "regions"}
        Kind of change.
    what : str
        Description of the change, as the report shows it.
    prompt : Prompt
        Prompt to generate, reworded if the remedy is another wording.
    method : str or None
        Name of the guidance method; None for a remedy without guidance.
    options : dict
        Options of the guidance method by name, as values for JSON.
    guidance : Method or None
        The guidance method; None for a remedy without guidance, and for a remedy that was read from a folder.
    """

    name: str
    kind: Kind
    what: str
    prompt: Prompt
    method: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    guidance: Method | None = field(default=None, repr=False, compare=False)

    @property
    def title(self) -> str:
        """Name of the remedy in sentences and headings."""
        return _TITLES.get(self.name, method_title(self.name))


@dataclass(frozen=True)
class RemedyResult:
    """Result of a remedy: images that are compared with plain images, or the reason why there are no images.

    Attributes
    ----------
    remedy : Remedy
        The remedy that the result is about.
    plain : tuple of Run
        Plain runs (without guidance) with which the runs of the remedy are compared.
    runs : tuple of Run
        Runs of the remedy: ``runs[i]`` is compared with ``plain[i]``. The two runs have the same seed, except with
        "another-seed". Empty if the remedy failed or was not tried.
    seconds : float
        Generation time per image in seconds. With "another-seed", the time includes the first steps of the
        `candidates`. NaN if nothing was generated.
    cost : float
        Generation time per image, divided by the generation time of a plain image. NaN if nothing was generated.
    status : {"tried", "failed", "not tried"}
        "failed" if an exception was raised; "not tried" if the remedy does not apply to the prompt.
    why : str
        Error of a failed remedy, or the reason why the remedy was not tried; "" otherwise.
    candidates : tuple of dict
        Only for "another-seed": the seeds from which the remedy chose. Each dictionary has the keys "seed", "score" and
        "chosen" (bool). Each plain run has the same number of candidates. The candidates for ``plain[0]`` come first.
        For each plain run, the remedy chooses the candidate with the lowest score.
    chosen_by : str
        Only for "another-seed": the score by which the remedy chose, "predicted probability of failure" or "bleeding".
    """

    remedy: Remedy
    plain: tuple[Run, ...]
    runs: tuple[Run, ...] = ()
    seconds: float = math.nan
    cost: float = math.nan
    status: Status = "tried"
    why: str = ""
    candidates: tuple[dict[str, Any], ...] = ()
    chosen_by: str = ""

    @property
    def judged(self) -> bool:
        """True if all images of the remedy and all plain images were judged."""
        return bool(self.runs) and all(run.verdict is not None for run in (*self.runs, *self.plain))

    @property
    def right(self) -> int:
        """Number of the remedy's images that the judge finds right."""
        return sum(_right(run) for run in self.runs)

    @property
    def rate(self) -> float:
        """Share of the remedy's images that are right; NaN if they were not judged."""
        return self.right / len(self.runs) if self.judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of the share of right images (`rate`); (0, 1) if the images were not judged."""
        return wilson(self.right, len(self.runs)) if self.judged else (0.0, 1.0)

    @property
    def fixed(self) -> tuple[int, ...]:
        """Seeds of the plain images that the remedy fixed: the plain image is wrong, the remedy's image is right.

        The image of ``plain[i]`` is compared with the image of ``runs[i]``. Empty if the images were not judged.
        """
        return self._changed(False)

    @property
    def broken(self) -> tuple[int, ...]:
        """Seeds of the plain images that the remedy broke: the plain image is right, the remedy's image is wrong.

        The image of ``plain[i]`` is compared with the image of ``runs[i]``. Empty if the images were not judged.
        """
        return self._changed(True)

    @property
    def broken_rate(self) -> float:
        """Share of the right plain images that the remedy broke.

        NaN if no plain image is right, or if the images were not judged.
        """
        before = sum(_right(run) for run in self.plain) if self.judged else 0
        return len(self.broken) / before if before else math.nan

    @property
    def bleed(self) -> float:
        """Mean bleeding of the remedy's runs; NaN without runs.

        Bleeding is the share of an entity's attention outside the entity's own region. The mean is over steps, entities
        and runs.
        """
        return bleed(self.runs)

    @property
    def helps(self) -> bool:
        """True if the remedy did better than plain generation.

        For judged images, the remedy did better if it has more right images. For images that were not judged, the
        remedy did better if it has less bleeding.
        """
        if self.status != "tried":
            return False
        if self.judged:
            return len(self.fixed) > len(self.broken)
        return self.bleed < bleed(self.plain)

    def to_dict(self) -> dict[str, Any]:
        """Convert the result to a dictionary of values for JSON. NaN becomes None, and images are left out."""
        remedy, tried, judged = self.remedy, self.status == "tried", self.judged
        return {
            "name": remedy.name,
            "title": remedy.title,
            "kind": remedy.kind,
            "what": remedy.what,
            "prompt": remedy.prompt.text,
            "method": remedy.method,
            "options": remedy.options,
            "status": self.status,
            "why": self.why,
            "helps": self.helps,
            "images": len(self.runs),
            "right": self.right if judged else None,
            "rate": _or_none(self.rate),
            "interval": list(self.interval) if judged else None,
            "fixed": list(self.fixed) if judged else None,
            "broken": list(self.broken) if judged else None,
            "broken_rate": _or_none(self.broken_rate),
            "bleed": _or_none(self.bleed) if tried else None,
            "seconds": _or_none(self.seconds),
            "cost": _or_none(self.cost),
            "seeds": [run.seed for run in self.runs],
            "verdicts": [None if run.verdict is None else str(run.verdict) for run in self.runs],
            "chosen_by": self.chosen_by,
            "candidates": list(self.candidates),
        }

    def _changed(self, before: bool) -> tuple[int, ...]:
        if not self.judged:
            return ()
        pairs = zip(self.plain, self.runs, strict=True)
        return tuple(plain.seed for plain, run in pairs if _right(plain) is before and _right(run) is not before)


def ranked(results: Iterable[RemedyResult]) -> tuple[RemedyResult, ...]:
    """Results of remedies, best first.

    1. Judged results come first, sorted by the share of right images (highest first), then by the number of broken
       images (lowest first), then by the generation time (lowest first).
    2. Results that were not judged follow, sorted by bleeding (lowest first), then by the generation time (lowest
       first).
    3. Remedies that failed come next.
    4. Remedies that were not tried come last.

    Parameters
    ----------
    results : iterable of RemedyResult

    Returns
    -------
    tuple of RemedyResult
    """

    def rank(one: RemedyResult) -> tuple[float, ...]:
        if one.status != "tried":
            return 2, one.status == "not tried"
        if one.judged:
            return 0, -one.rate, len(one.broken), one.cost
        return 1, one.bleed, one.cost

    return tuple(sorted(results, key=rank))


def bleed(runs: Sequence[Run]) -> float:
    """Mean bleeding of runs; NaN without runs.

    Bleeding is the share of an entity's attention outside the entity's own region. The mean is over steps, entities and
    runs.

    Parameters
    ----------
    runs : sequence of Run
        Recorded runs.

    Returns
    -------
    float

    Raises
    ------
    RecordingError
        A run was not recorded.
    """
    frames = [run.bleeding.to_frame() for run in runs]
    values = [frame.loc[frame["measure"] == "bleed", "value"].mean() for frame in frames]
    return float(np.mean(values)) if values else math.nan


def _right(run: Run) -> bool:
    return run.verdict is not None and bool(run.verdict.success)


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
