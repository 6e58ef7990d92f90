"""What was found: failures with how often and from when, and causes with how strong and how sure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from elakit.prompt import Prompt

FailureKind = Literal["missing", "fused", "wrong attribute", "lost attribute", "spill"]
CauseKind = Literal[
    "text states alike",
    "text leakage",
    "ambiguous word",
    "token ignored",
    "never localized",
    "captured",
    "attribute misplaced",
    "start-of-text competition",
    "region split",
    "regions swap",
]
FAILURE_KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
CAUSE_KINDS: tuple[CauseKind, ...] = get_args(CauseKind)

# Normal quantile of a 95 % interval.
_Z = 1.959963984540054


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share.

    Parameters
    ----------
    hits, of : int
        How many of how many.

    Returns
    -------
    (float, float)
        Of nothing at all nothing is known: (0, 1).

    References
    ----------
    Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 22, 1927.

    Examples
    --------
    >>> [round(bound, 3) for bound in wilson(3, 4)]
    [0.301, 0.954]
    """
    if not of:
        return 0.0, 1.0
    share, square = hits / of, _Z**2 / of
    center, half = share + square / 2, _Z * math.sqrt(share * (1 - share) / of + square / (4 * of))
    return max((center - half) / (1 + square), 0.0), min((center + half) / (1 + square), 1.0)


@dataclass(frozen=True)
class Failure:
    """One thing that goes wrong, over all runs.

    Attributes
    ----------
    kind : {"missing", "fused", "wrong attribute", "lost attribute", "spill"}
        An entity is not there; two are one; an entity has what was asked for another; it has neither that nor its own;
        the entity is also where it was not asked for.
    entity : str
        Label of the entity it happens to.
    other : str
        The other entity: fused with it, or whose attribute it has; "" where there is none.
    token : str
        Label of the token that takes its place: of the noun that fills a missing entity's region, of the attribute that
        is on the wrong thing; "" where none does.
    seeds : tuple of int
        Of the runs in which it happens.
    of : int
        Number of runs that were looked at.
    step : int or None
        Denoiser call from which on it shows in the attention, counted from 0: the median over those runs; None where it
        never shows there.
    layers : tuple of str
        Layers in which it shows first, the clearest first.
    heads : tuple of (str, int)
        Heads (layer, number) in which it shows first; empty where heads were not kept apart.
    judged : bool
        Whether a judge saw it in the images; otherwise it is read off the attention alone.
    """

    kind: FailureKind
    entity: str
    other: str = ""
    token: str = ""
    seeds: tuple[int, ...] = ()
    of: int = 0
    step: int | None = None
    layers: tuple[str, ...] = ()
    heads: tuple[tuple[str, int], ...] = ()
    judged: bool = True

    @property
    def count(self) -> int:
        """In how many runs it happens."""
        return len(self.seeds)

    @property
    def rate(self) -> float:
        """Share of the runs in which it happens."""
        return self.count / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of `rate`."""
        return wilson(self.count, self.of)

    @property
    def sentence(self) -> str:
        """It in plain words, without what is said of steps and layers."""
        other, token = self.other, self.token
        what = {
            "missing": f"the {self.entity} is missing" + (f", and {token!r} holds its place" if token else ""),
            "fused": f"the {self.entity} and the {other} are fused into one",
            "wrong attribute": f"the {self.entity} is {_word(token)}, which was asked for the {other}",
            "lost attribute": f"the {self.entity} is not {_word(token)}",
            "spill": f"the {self.entity} spills over into the rest of the image",
        }[self.kind]
        return f"In {self.count} of {self.of} {what}."

    def to_dict(self) -> dict[str, Any]:
        """As plain values, with count, rate, interval and sentence."""
        return asdict(self) | {
            "count": self.count,
            "rate": self.rate,
            "interval": list(self.interval),
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        where = []
        if self.step is not None:
            where.append(f"from step {self.step}")
        if self.layers:
            where.append(f"first in {self.layers[0]}")
        low, high = self.interval
        return f"{self.sentence} ({low:.0%} to {high:.0%}{''.join(f'; {each}' for each in where)})"


@dataclass(frozen=True)
class Cause:
    """One reason why the prompt fails.

    Attributes
    ----------
    kind : str
        One of `CAUSE_KINDS`.
    entity : str
        Label of the entity that suffers.
    other : str
        Label of the entity at fault; "" where there is none.
    token : str
        Label of the token at fault: the word whose meaning leaked, the attribute that is misplaced, the noun that is
        not known; "" where there is none.
    strength : float
        How marked it is, 0 (as in images that come out right) to 1 (as if nothing else were there).
    confidence : float
        How sure we are that this is it, 0 to 1; ``docs/causes.md`` has how often causes of a confidence were right.
    step : int or None
        Denoiser call from which on it shows; None for a cause that lies before the image.
    layers : tuple of str
        Layers in which it shows most, the clearest first.
    seeds : tuple of int
        Of the runs in which it shows; all of them for a cause that lies before the image.
    explains : tuple of str
        Kinds of the failures found that it accounts for.
    evidence : dict of str to float
        The numbers it rests on, by name.
    sentence : str
        It in one plain sentence.
    """

    kind: CauseKind
    entity: str
    other: str = ""
    token: str = ""
    strength: float = 0.0
    confidence: float = 0.0
    step: int | None = None
    layers: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    explains: tuple[str, ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)
    sentence: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence} (strength {self.strength:.2f}, confidence {self.confidence:.0%})"


@dataclass(frozen=True)
class Findings:
    """What goes wrong with a prompt, and why; `find` makes it.

    Attributes
    ----------
    prompt : Prompt
    seeds : tuple of int
        Of the runs.
    judged : bool
        Whether a judge saw the images; otherwise failures are read off the attention and are suspicions.
    failures : tuple of Failure
        Most frequent first; empty where nothing goes wrong.
    causes : tuple of Cause
        Likeliest first; empty where none can be named.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    judged: bool
    failures: tuple[Failure, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def failing(self) -> tuple[int, ...]:
        """Seeds of the runs in which anything goes wrong."""
        return tuple(seed for seed in self.seeds if any(seed in failure.seeds for failure in self.failures))

    @property
    def unexplained(self) -> tuple[Failure, ...]:
        """Failures for which no cause can be named."""
        return tuple(
            failure
            for failure in self.failures
            if not any(
                failure.kind in cause.explains and {failure.entity, failure.other} & {cause.entity, cause.other}
                for cause in self.causes
            )
        )

    @property
    def verdict(self) -> str:
        """One plain sentence: how often it fails, and the likeliest cause, or that none was found."""
        count, failing = len(self.seeds), len(self.failing)
        if not failing:
            source = "in the images" if self.judged else "in the attention (no judge has seen the images)"
            return f"Nothing is wrong {source} of {count} seed{'s' * (count > 1)}."
        said = f"{failing} of {count} images {'go' if self.judged else 'seem to go'} wrong. "
        return said + (self.causes[0].sentence if self.causes else "No cause was found that could be named.")

    def to_dict(self) -> dict[str, Any]:
        """As plain lists and dictionaries, as JSON takes them."""
        return {
            "prompt": self.prompt.text,
            "seeds": list(self.seeds),
            "judged": self.judged,
            "failing": list(self.failing),
            "verdict": self.verdict,
            "failures": [failure.to_dict() for failure in self.failures],
            "causes": [cause.to_dict() for cause in self.causes],
            "unexplained": [failure.sentence for failure in self.unexplained],
        }

    def __str__(self) -> str:
        lines = [f"{self.prompt.text!r}: {self.verdict}"]
        if self.failures:
            lines += ["What goes wrong", *(f"  {failure}" for failure in self.failures)]
        if self.causes:
            lines += ["Why", *(f"  {i}. {cause}" for i, cause in enumerate(self.causes, 1))]
        if self.failures and self.causes and self.unexplained:
            lines += ["No cause found for", *(f"  {failure.sentence}" for failure in self.unexplained)]
        return "\n".join(lines)


def _word(label: str) -> str:
    """A label as the word it stands for: "red#2" -> "red"."""
    return label.partition("#")[0]
