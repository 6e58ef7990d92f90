"""Diagnose a prompt: draw it plainly and guided over a few seeds, measure both, judge both."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from elakit.errors import SettingError
from elakit.generate import Run, generate
from elakit.guidance import METHODS, Method, without_regions
from elakit.guidance.engine import options_of
from elakit.judge import Verdict
from elakit.prompt import Prompt, parse

Outcome = Literal["mended", "harmed", "right", "wrong"]


@dataclass(frozen=True)
class Pair:
    """One seed, drawn plainly and guided from the same noise.

    Attributes
    ----------
    plain, guided : Run
    plain_verdict, guided_verdict : Verdict or None
        What the judge sees in the pictures; None where it does not know the prompt's nouns.
    """

    plain: Run
    guided: Run
    plain_verdict: Verdict | None = None
    guided_verdict: Verdict | None = None

    @property
    def seed(self) -> int:
        """The seed of both pictures."""
        return self.plain.seed

    @property
    def outcome(self) -> Outcome | None:
        """mended (wrong, then right), harmed (right, then wrong), right (both), wrong (both); None if not judged."""
        if self.plain_verdict is None or self.guided_verdict is None:
            return None
        table: dict[tuple[bool, bool], Outcome] = {
            (False, True): "mended", (True, False): "harmed", (True, True): "right", (False, False): "wrong",
        }  # fmt: skip
        return table[self.plain_verdict.success, self.guided_verdict.success]


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    Attributes
    ----------
    prompt : Prompt
    method : str
        Name of the guidance method.
    options : dict
        Its options.
    pairs : tuple of Pair
        One a seed.
    seconds : float
        Wall-clock time of all runs.
    """

    prompt: Prompt
    method: str
    options: dict[str, Any]
    pairs: tuple[Pair, ...]
    seconds: float

    @property
    def judged(self) -> bool:
        """Whether the pictures were judged."""
        return all(pair.outcome is not None for pair in self.pairs)

    def count(self, outcome: Outcome) -> int:
        """Number of seeds with an outcome."""
        return sum(pair.outcome == outcome for pair in self.pairs)

    def example(self) -> Pair:
        """The pair to show first: a mended one, else the one whose maps bleed most when drawn plainly."""
        mended = [pair for pair in self.pairs if pair.outcome == "mended"]
        return max(mended or self.pairs, key=lambda pair: _mean_bleed(pair.plain))

    def to_frame(self) -> pd.DataFrame:
        """One row a seed: outcome, and the mean measures of the plain and the guided run.

        Returns
        -------
        DataFrame
            Indexed by seed; columns outcome, plain_success, guided_success, and bleed, intrusion, overlap
            (Ruzicka) of either run.
        """
        return pd.DataFrame([_row(pair) for pair in self.pairs]).set_index("seed")


def diagnose(
    pipe: Any,
    prompt: str | Prompt,
    *,
    seeds: int | list[int] = 4,
    method: str | Method = "ela",
    steps: int | None = None,
    guidance_scale: float | None = None,
    on_progress: Callable[[int, int, str], None] | None = None,
) -> Diagnosis:
    """Draw a prompt plainly and guided, from the same noise, and measure and judge both.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : str or Prompt
    seeds : int or list of int
        How many seeds (0, 1, ...), or which.
    method : str or Method
        A name in `elakit.guidance.METHODS`, or an instance with options.
    steps, guidance_scale : optional
        As in `generate`.
    on_progress : callable, optional
        Called with (pictures done, pictures in all, what is drawn now) before each picture.

    Returns
    -------
    Diagnosis

    Raises
    ------
    SettingError
        No seed, or an unknown method.

    Examples
    --------
    >>> import elakit
    >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=[3], steps=2)
    >>> found.pairs[0].seed, found.judged
    (3, True)
    """
    parsed = parse(prompt, pipe)
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise SettingError(f"seeds={seeds!r}: give a number of seeds of 1 or more, or a list of seeds.")
    if len(set(numbers)) < len(numbers):
        raise SettingError(f"seeds={seeds!r}: give each seed once.")
    if isinstance(method, str):
        if method not in METHODS:
            raise SettingError(f"Unknown method {method!r}. Choose from {', '.join(METHODS)}.")
        chosen: Method = without_regions(method)
    else:
        chosen = method
    began = time.perf_counter()
    pairs = []
    for i, seed in enumerate(numbers):
        runs = []
        for j, guidance in enumerate((None, chosen)):
            if on_progress is not None:
                on_progress(2 * i + j, 2 * len(numbers), f"seed {seed}, {chosen.name if guidance else 'plain'}")
            runs.append(
                generate(
                    pipe,
                    parsed,
                    seed=seed,
                    steps=steps,
                    guidance_scale=guidance_scale,
                    guidance=guidance,
                    progress=False,
                )
            )
        pairs.append(Pair(runs[0], runs[1], runs[0].verdict, runs[1].verdict))
    return Diagnosis(parsed, chosen.name, options_of(chosen), tuple(pairs), time.perf_counter() - began)


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


def _mean_bleed(run: Run) -> float:
    return float(run.bleeding.to_frame().query("measure == 'bleed'")["value"].mean())
