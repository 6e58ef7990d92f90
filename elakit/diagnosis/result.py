"""What `elakit.diagnose` found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from elakit.causes import Findings, wilson
from elakit.diagnosis.remedies import Tried, bleed
from elakit.generation import Run
from elakit.judge import Verdict
from elakit.prompt import Prompt
from elakit.rewording import bracketed

Outcome = Literal["fixed", "broken", "right", "wrong"]

# Of what `Diagnosis.to_dict` gives; raised when a name is dropped or changes its meaning.
SCHEMA = 1


@dataclass(frozen=True)
class Pair:
    """One seed, drawn plainly and guided from the same noise.

    Attributes
    ----------
    plain, guided : Run
    plain_verdict, guided_verdict : Verdict or None
        What the judge sees in the images; None where it does not know the prompt's nouns.
    """

    plain: Run
    guided: Run
    plain_verdict: Verdict | None = None
    guided_verdict: Verdict | None = None

    @property
    def seed(self) -> int:
        """The seed of both images."""
        return self.plain.seed

    @property
    def outcome(self) -> Outcome | None:
        """fixed (wrong, then right), broken (right, then wrong), right (both), wrong (both); None if not judged."""
        if self.plain_verdict is None or self.guided_verdict is None:
            return None
        table: dict[tuple[bool, bool], Outcome] = {
            (False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong",
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
    findings : Findings or None
        What goes wrong in the plain images, and why; None where that could not be looked for.
    remedies : tuple of Tried
        Everything that was tried, best first; the method is among them.
    predicted : dict of int to float
        Of each plain seed the probability that its image fails, as the predictor gave it after 30 % of the steps.
    problems : tuple of str
        What could not be done, and why.
    """

    prompt: Prompt
    method: str
    options: dict[str, Any]
    pairs: tuple[Pair, ...]
    seconds: float
    findings: Findings | None = None
    remedies: tuple[Tried, ...] = ()
    predicted: dict[int, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def judged(self) -> bool:
        """Whether the images were judged."""
        return all(pair.outcome is not None for pair in self.pairs)

    @property
    def plain(self) -> tuple[Run, ...]:
        """The plain runs, one a seed."""
        return tuple(pair.plain for pair in self.pairs)

    @property
    def right(self) -> int:
        """How many of the plain images are right."""
        return self.count("right") + self.count("broken")

    @property
    def rate(self) -> float:
        """Share of the plain images that are right; NaN where they were not judged."""
        return self.right / len(self.pairs) if self.judged else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `rate`; all that is possible where nothing was judged."""
        return wilson(self.right, len(self.pairs)) if self.judged else (0.0, 1.0)

    @property
    def best(self) -> Tried | None:
        """The best of the remedies tried; None where none did better than plain drawing."""
        return next((tried for tried in self.remedies if tried.helps), None)

    def count(self, outcome: Outcome) -> int:
        """Number of seeds with an outcome."""
        return sum(pair.outcome == outcome for pair in self.pairs)

    def example(self) -> Pair:
        """The pair to show first: a fixed one, else the one whose maps bleed most when drawn plainly."""
        fixed = [pair for pair in self.pairs if pair.outcome == "fixed"]
        return max(fixed or self.pairs, key=lambda pair: bleed([pair.plain]))

    def to_frame(self) -> pd.DataFrame:
        """One row a seed: outcome, and the mean measures of the plain and the guided run.

        Returns
        -------
        DataFrame
            Indexed by seed; columns outcome, plain_success, guided_success, and bleed, intrusion, overlap
            (Ruzicka) of either run.
        """
        return self._frame.copy()

    @cached_property
    def _frame(self) -> pd.DataFrame:
        return pd.DataFrame([_row(pair) for pair in self.pairs]).set_index("seed")

    def remedies_frame(self) -> pd.DataFrame:
        """One row a remedy, best first: how often it is right, what it fixes and harms, what it costs.

        Returns
        -------
        DataFrame
            Indexed by name; columns title, status, images, right, rate, low and high (95 %), fixed, broken, bleed
            (as in `Tried`), cost (time relative to a plain image). Empty where none was tried; counts are missing
            where images were not judged.
        """
        rows = []
        for tried in self.remedies:
            told = tried.to_dict()
            low, high = told["interval"] or (None, None)
            counts = {name: None if told[name] is None else len(told[name]) for name in ("fixed", "broken")}
            names = ("name", "title", "status", "images", "right", "rate")
            rows.append(
                {name: told[name] for name in names}
                | {"low": low, "high": high, **counts, "bleed": told["bleed"], "cost": told["cost"]}
            )
        return pd.DataFrame(rows).set_index("name") if rows else pd.DataFrame()

    def to_dict(self) -> dict[str, Any]:
        """Everything but the images and maps, as JSON takes it; ``docs/howto/diagnose.md`` explains the names.

        Returns
        -------
        dict
            Numbers that are not known are None.

        Examples
        --------
        >>> import elakit
        >>> found = elakit.diagnose(elakit.load("picture-world"), "a [cat] and a [lion]", seeds=1, steps=2)
        >>> told = found.to_dict()
        >>> told["schema"], told["prompt"]["bracketed"], told["remedies"][0]["name"]
        (1, 'a [cat] and a [lion]', 'ela')
        """
        from elakit import __version__
        from elakit.diagnosis import commands
        from elakit.diagnosis.sentences import told

        settings = self.pairs[0].plain.settings
        best = self.best
        low, high = self.interval
        return {
            "schema": SCHEMA,
            "elakit": __version__,
            "prompt": {
                "text": self.prompt.text,
                "bracketed": bracketed(self.prompt),
                "entities": [
                    {"label": e.label, "text": e.text, "noun": e.noun, "attributes": list(e.attributes)}
                    for e in self.prompt.entities
                ],
            },
            "settings": dict(settings) | {"seeds": [pair.seed for pair in self.pairs]},
            "judged": self.judged,
            "verdict": told(self),
            "plain": {
                "images": len(self.pairs),
                "right": self.right if self.judged else None,
                "rate": self.rate if self.judged else None,
                "interval": [low, high] if self.judged else None,
                "bleed": bleed(self.plain),
            },
            "method": {"name": self.method, "options": self.options},
            "seeds": _records(self._frame.reset_index(), self.predicted),
            "findings": None if self.findings is None else self.findings.to_dict(),
            "remedies": [
                {"rank": rank, **tried.to_dict(), **commands.again(tried)}
                for rank, tried in enumerate(self.remedies, start=1)
            ],
            "best": None if best is None else best.remedy.name,
            "problems": list(self.problems),
            "code": commands.code(self),
            "command": commands.command(self),
            "seconds": self.seconds,
        }

    def save(self, folder: str | Path) -> Path:
        """Keep it in a folder: every run as `Run.save` writes it, and ``diagnosis.json`` last.

        Parameters
        ----------
        folder : str or Path
            New, or one that a diagnosis was kept in: the runs that are there already stay.

        Returns
        -------
        Path
            Open it again with ``elakit.open_diagnosis``.

        Raises
        ------
        OutputError
            The folder is of something else, or cannot be written to.
        """
        from elakit.diagnosis.store import save

        return save(self, folder)


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


def _records(frame: pd.DataFrame, predicted: dict[int, float]) -> list[dict[str, Any]]:
    """Rows with what was predicted, as JSON takes them."""
    rows = []
    for row in frame.to_dict("records"):
        plain = {str(name): None if _unknown(value) else value for name, value in row.items()}
        rows.append(plain | {"predicted_failure": predicted.get(int(row["seed"]))})
    return rows


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
