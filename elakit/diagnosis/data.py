"""Data of a diagnosis: pairs of runs, findings and remedies, with counts, rates and tables computed from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from elakit.causes import Cause, Failure, Findings
from elakit.diagnosis.remedies import RemedyResult, bleed
from elakit.judge import Verdict, is_black
from elakit.prompt import Prompt
from elakit.run import Run
from elakit.statistics import wilson

Outcome = Literal["fixed", "broken", "right", "wrong"]


@dataclass(frozen=True)
class Pair:
    """The plain and the guided run of one seed, from the same noise.

    Attributes
    ----------
    plain, guided : Run
        The run without guidance and the run with it.
    plain_verdict, guided_verdict : Verdict or None
        Verdicts of the judge; None if an image cannot be judged.
    """

    plain: Run
    guided: Run
    plain_verdict: Verdict | None = None
    guided_verdict: Verdict | None = None

    @property
    def seed(self) -> int:
        """Seed of both images."""
        return self.plain.seed

    @property
    def outcome(self) -> Outcome | None:
        """Effect of guidance on the image; None if one of the two images is not judged.

        "fixed": only the guided image is right; "broken": only the plain image is right; "right", "wrong": both are.
        """
        if self.plain_verdict is None or self.guided_verdict is None:
            return None
        table: dict[tuple[bool, bool], Outcome] = {
            (False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong",
        }  # fmt: skip
        return table[self.plain_verdict.success, self.guided_verdict.success]

    @property
    def was_guided(self) -> bool:
        """True if guidance acted in at least one step."""
        return self.guided.guidance is not None and bool(self.guided.guidance.guided)


@dataclass(frozen=True)
class DiagnosisData:
    """Data of a diagnosis; `elakit.diagnosis.Diagnosis` adds the conversion to JSON and to a folder.

    Attributes
    ----------
    prompt : Prompt
    method : str
        Name of the guidance method.
    options : dict
        Options of the method by name, as values for JSON.
    pairs : tuple of Pair
        One pair per seed.
    seconds : float
        Wall-clock time of the diagnosis in seconds.
    findings : Findings or None
        Failures in the plain images and their causes; None if the search for them failed.
    remedies : tuple of RemedyResult
        Results of the method and of the remedies, best first. If all plain images are judged right, only the result of
        the method.
    predicted : dict of int to float
        Probability that the plain image of a seed fails, by seed, as predicted after 30% of its steps; empty without
        a predictor for the model, or if the prediction failed.
    problems : tuple of str
        Sentences about parts of the diagnosis that failed, with the reason.
    """

    prompt: Prompt
    method: str
    options: dict[str, Any]
    pairs: tuple[Pair, ...]
    seconds: float
    findings: Findings | None = None
    remedies: tuple[RemedyResult, ...] = ()
    predicted: dict[int, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """True if both images of every pair (plain and guided) were judged."""
        return all(pair.outcome is not None for pair in self.pairs)

    @property
    def blocked(self) -> int:
        """Number of images of the pairs that the pipeline's safety checker replaced."""
        runs = [run for pair in self.pairs for run in (pair.plain, pair.guided)]
        return sum(run.nsfw for run in runs)

    @property
    def black(self) -> int:
        """Number of images of the pairs that are entirely black, which some safety checkers return without a flag."""
        runs = [run for pair in self.pairs for run in (pair.plain, pair.guided)]
        return sum(is_black(run.image) for run in runs)

    @property
    def plain(self) -> tuple[Run, ...]:
        """Plain runs, one per seed."""
        return tuple(pair.plain for pair in self.pairs)

    @property
    def right(self) -> int:
        """Number of plain images that are right."""
        return self.count("right") + self.count("broken")

    @property
    def rate(self) -> float:
        """Share of the plain images that are right; NaN if they were not judged."""
        return self.right / len(self.pairs) if self.judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of `rate`; (0, 1) if the images were not judged."""
        return wilson(self.right, len(self.pairs)) if self.judged else (0.0, 1.0)

    @property
    def best(self) -> RemedyResult | None:
        """Best remedy; None if none did better than plain generation."""
        return next((result for result in self.remedies if result.helps), None)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Failures that the judge found in the plain images, most frequent first; empty if they were not judged."""
        return self.findings.failures if self.findings is not None and self.findings.judged else ()

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Causes, most likely first; for judged images only those that explain one of the `failures`."""
        if self.findings is None:
            return ()
        if not self.findings.judged:
            return self.findings.causes
        return tuple(cause for cause in self.findings.causes if any(explains(cause, one) for one in self.failures))

    def count(self, outcome: Outcome) -> int:
        """Number of seeds with an outcome; see `Pair.outcome`."""
        return sum(pair.outcome == outcome for pair in self.pairs)

    def example(self) -> Pair:
        """Pair that the report shows in detail.

        Fixed pairs are preferred, then pairs whose plain image has the most frequent failure, then those whose plain
        run bleeds more.
        """
        frequent = self.failures[0].seeds if self.failures else ()

        def order(pair: Pair) -> tuple[bool, bool, float]:
            return pair.outcome == "fixed", pair.seed in frequent, bleed([pair.plain])

        return max(self.pairs, key=order)

    def to_frame(self) -> pd.DataFrame:
        """Table of the seeds: the outcome, and mean measures of the plain and the guided run.

        Returns
        -------
        pandas.DataFrame
            One row per seed, indexed by seed. Column ``outcome`` (`Pair.outcome`), and with the prefixes ``plain_`` and
            ``guided_`` the columns ``success`` (True if the image is right), ``bleed``, ``intrusion`` and ``overlap``
            (Ruzicka similarity of the entities' maps). The last three are means over the steps and over the entities
            or pairs of entities; `elakit.diagnosis.report.MEANINGS` defines them. ``outcome`` and ``success`` are
            missing for images that were not judged, and ``overlap`` for a single entity.
        """
        return self._frame.copy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame([_row(pair) for pair in self.pairs]).set_index("seed")

    def remedies_frame(self) -> pd.DataFrame:
        """Table of the remedies, best first: numbers of right, fixed and broken images, and the cost.

        Returns
        -------
        pandas.DataFrame
            One row per remedy, indexed by its name. Columns title, status, images (number), right, rate, low and high
            (95% interval of the rate), fixed, broken (numbers of images), bleed, cost (generation time per image,
            divided by that of a plain image). If the images were not judged, right, rate, low, high, fixed and broken
            are missing.
        """
        rows = []
        for result in self.remedies:
            plain = result.to_dict()
            low, high = plain["interval"] or (None, None)
            counts = {name: None if plain[name] is None else len(plain[name]) for name in ("fixed", "broken")}
            names = ("name", "title", "status", "images", "right", "rate")
            rows.append(
                {name: plain[name] for name in names}
                | {"low": low, "high": high, **counts, "bleed": plain["bleed"], "cost": plain["cost"]}
            )
        return pd.DataFrame(rows).set_index("name") if rows else pd.DataFrame()


def explains(cause: Cause, failure: Failure) -> bool:
    """True if a cause explains a failure: its kind can lead to that failure, and it affects the same entities."""
    return failure.kind in cause.explains and cause.accounts_for(failure)


def _row(pair: Pair) -> dict[str, Any]:
    row: dict[str, Any] = {"seed": pair.seed, "outcome": pair.outcome}
    for name, run, verdict in (
        ("plain", pair.plain, pair.plain_verdict),
        ("guided", pair.guided, pair.guided_verdict),
    ):
        overall = run.bleeding.overall().groupby("measure")["value"].mean()
        row[f"{name}_success"] = None if verdict is None else verdict.success
        for measure, column in (("bleed", "bleed"), ("intrusion", "intrusion"), ("ruzicka", "overlap")):
            row[f"{name}_{column}"] = overall.get(measure, float("nan"))
    return row
