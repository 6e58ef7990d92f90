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
        The run without a guidance method, and the run with the method.
    plain_verdict, guided_verdict : Verdict or None
        Verdicts of the judge on the plain and the guided image; None for an image that was not judged.
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
        """Effect of guidance on the image; None if the plain or the guided image was not judged.

        "fixed": only the guided image is right. "broken": only the plain image is right. "right": both images are
        right. "wrong": both images are wrong.
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
    """Data of a diagnosis: pairs of runs, failures and their causes, and results of remedies.

    The subclass `elakit.diagnosis.Diagnosis` can also be converted to JSON and saved to a folder.

    Attributes
    ----------
    prompt : Prompt
    method : str
        Name of the guidance method.
    options : dict
        Options of the method by name, as values for JSON.
    pairs : tuple of Pair
        Plain and guided run of each seed.
    seconds : float
        Wall-clock time of the diagnosis in seconds.
    findings : Findings or None
        Failures in the plain images, and causes of these failures; None if the search for causes failed.
    remedies : tuple of RemedyResult
        Results of the method and of the other remedies, best first. If all plain images are judged right, the tuple
        contains only the result of the method.
    predicted : dict of int to float
        For each seed, the probability that the plain image fails, as predicted after 30% of the steps. Empty if the
        model has no predictor, or if the prediction failed.
    problems : tuple of str
        One sentence, with the reason, for each part of the diagnosis that failed.
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
        """Number of plain images that are right; a seed counts only if both its images were judged."""
        return self.count("right") + self.count("broken")

    @property
    def rate(self) -> float:
        """Share of the plain images that are right; NaN if any plain or guided image was not judged."""
        return self.right / len(self.pairs) if self.judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of `rate`; (0, 1) if any plain or guided image was not judged."""
        return wilson(self.right, len(self.pairs)) if self.judged else (0.0, 1.0)

    @property
    def best(self) -> RemedyResult | None:
        """Result of the best remedy; None if no remedy did better than plain generation.

        A remedy did better if it fixed more images than it broke. If the images were not judged, a remedy did better if
        its images bleed less than the plain images.
        """
        return next((result for result in self.remedies if result.helps), None)

    @property
    def failures(self) -> tuple[Failure, ...]:
        """Failures that the judge found in the plain images, most frequent first.

        Empty if the plain images were not judged.
        """
        return self.findings.failures if self.findings is not None and self.findings.judged else ()

    @property
    def causes(self) -> tuple[Cause, ...]:
        """Causes of the failures, most likely first.

        If the plain images were judged, a cause is included only if it explains one of the `failures`.
        """
        if self.findings is None:
            return ()
        if not self.findings.judged:
            return self.findings.causes
        return tuple(cause for cause in self.findings.causes if any(explains(cause, one) for one in self.failures))

    def count(self, outcome: Outcome) -> int:
        """Number of seeds with an outcome: "fixed", "broken", "right" or "wrong", as in `Pair.outcome`."""
        return sum(pair.outcome == outcome for pair in self.pairs)

    def example(self) -> Pair:
        """Pair that the report shows in detail.

        Pairs with the outcome "fixed" are preferred. Among them, or among all pairs if none is fixed, pairs whose plain
        image has the most frequent failure are preferred, and then the pair whose plain run bleeds most.
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
            One row per seed, indexed by seed. Column ``outcome`` contains `Pair.outcome`. Each of the following columns
            occurs twice: with the prefix ``plain_`` for the plain run, and with ``guided_`` for the guided run.

            - ``success``: True if the image is right.
            - ``bleed`` and ``intrusion``: means over steps and entities.
            - ``overlap``: Ruzicka similarity of the maps of two entities, mean over steps and pairs of entities.

            `elakit.diagnosis.report.MEANINGS` defines the measures. ``success`` is missing if the image was not judged.
            ``outcome`` is missing if one of the two images was not judged. ``overlap`` is NaN for a single entity.
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
            One row per remedy, indexed by the name of the remedy, with these columns:

            - title: name of the remedy in sentences and headings.
            - status: "tried", "failed" or "not tried".
            - images: number of images.
            - right: number of right images.
            - rate: share of the images that are right.
            - low, high: 95% interval of the rate.
            - fixed, broken: numbers of images that the remedy fixed and broke.
            - bleed: share of an entity's attention outside its own region, mean over steps, entities and images.
            - cost: generation time per image, divided by the generation time of a plain image.

            The columns from right to broken contain missing values if the images were not judged.
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
    """True if a cause explains a failure.

    A cause explains a failure if the kind of the cause can lead to the failure, and if the cause affects the entity
    that fails.
    """
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
