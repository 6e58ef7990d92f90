"""Failures with their frequency and first step, and causes with their strength and confidence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from elakit.numbering import step_name
from elakit.prompt import Prompt
from elakit.statistics import wilson
from elakit.tokens import word_of

FailureKind = Literal["missing", "fused", "wrong attribute", "lost attribute", "duplicated"]
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
# Kinds of failures in files of earlier versions, and their current names.
_RENAMED = {"spill": "duplicated"}
# Kinds that affect both entities in the same way.
MUTUAL_KINDS: tuple[CauseKind, ...] = ("text states alike", "regions swap")
# Share of the attention at the location of an entity from which another noun counts as taking it.
CAPTURED = 0.6


@dataclass(frozen=True)
class Failure:
    """One thing that goes wrong, over all runs.

    Attributes
    ----------
    kind : {"missing", "fused", "wrong attribute", "lost attribute", "duplicated"}
        An entity is missing; two are fused into one; an entity has the attribute of another one; it has neither its own
        attribute nor that of another; an entity appears more often than the prompt asks.
    entity : str
        Label of the affected entity.
    other : str
        The other entity: the one fused with it, or the owner of the attribute; "" if there is none.
    token : str
        Label of the noun that receives the attention at the location of a missing entity, or of the attribute on the
        wrong entity; "" if there is none.
    seeds : tuple of int
        Seeds of the runs with this failure.
    of : int
        Number of runs.
    step : int or None
        Denoiser call from which the failure is visible in the attention, counted from 0 (median over those runs); None
        if it is not visible.
    layers : tuple of str
        Layers where it is visible first, the clearest first.
    heads : tuple of (str, int)
        Heads (layer, number) where it is visible first; empty if heads were averaged.
    judged : bool
        True if a judge found it in the images; otherwise it is suspected from the attention.
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
        """Number of runs with this failure."""
        return len(self.seeds)

    @property
    def rate(self) -> float:
        """Share of runs with this failure."""
        return self.count / self.of if self.of else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95% Wilson interval of `rate`."""
        return wilson(self.count, self.of)

    @property
    def sentence(self) -> str:
        """One sentence that states the failure and its frequency."""
        other, token = self.other, self.token
        what = {
            "missing": f"the {self.entity} is missing"
            + (f", and {token!r} receives the attention at the location of the {self.entity}" if token else ""),
            "fused": f"the {self.entity} and the {other} are fused into one",
            "wrong attribute": f"the {self.entity} is {word_of(token)}, the attribute of the {other}",
            "lost attribute": f"the {self.entity} is not {word_of(token)}",
            "duplicated": f"the {self.entity} appears more often than the prompt asks",
        }[self.kind]
        images = "image" if self.of == 1 else "images"
        return f"In {self.count} of {self.of} {images}, {what}."

    def to_dict(self) -> dict[str, Any]:
        """Dictionary for JSON, with count, rate, interval and sentence."""
        return asdict(self) | {
            "count": self.count,
            "rate": self.rate,
            "interval": list(self.interval),
            "sentence": self.sentence,
        }

    def __str__(self) -> str:
        where = []
        if self.step is not None:
            where.append(f"from {step_name(self.step)}")
        if self.layers:
            where.append(f"visible first in {self.layers[0]}")
        low, high = self.interval
        return f"{self.sentence} ({low:.0%} to {high:.0%}{''.join(f'; {each}' for each in where)})"


@dataclass(frozen=True)
class Cause:
    """One cause of a failure.

    Attributes
    ----------
    kind : str
        Kind, one of `CAUSE_KINDS`.
    entity : str
        Label of the affected entity.
    other : str
        Label of the entity that interferes; "" if there is none.
    token : str
        Label of the interfering token: the attribute that leaked or is misplaced, or the unknown noun; "" if there is
        none.
    strength : float
        Strength of the indicator, from 0 (as in right images) to 1 (the strongest case).
    confidence : float
        Confidence, 0 to 1; ``docs/causes.md`` reports how often causes of a given confidence were right.
    step : int or None
        Denoiser call from which it is visible; None for a cause in the text encoder.
    layers : tuple of str
        Layers where it is visible first, the clearest first.
    seeds : tuple of int
        Seeds of the runs that show it; all runs for a cause in the text encoder.
    explains : tuple of str
        Kinds of the failures that it explains.
    evidence : dict of str to float
        Numbers that support it, by name.
    sentence : str
        One sentence that describes the cause.
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

    def accounts_for(self, failure: Failure) -> bool:
        """True if the entities of the cause are those of the failure, in the same roles.

        A cause that affects both entities alike (similar text states, regions that swap) matches a failure of
        either. A misplaced attribute affects the entity that receives it, and its own entity if that lost it. All other
        causes affect their `entity` only.
        """
        if self.kind in MUTUAL_KINDS or (self.kind == "captured" and self.evidence.get("held", 0.0) <= CAPTURED):
            return bool({self.entity, self.other} & {failure.entity, failure.other} - {""})
        if failure.kind == "fused":
            return self.entity in (failure.entity, failure.other)
        if self.kind == "attribute misplaced" and failure.kind == "wrong attribute":
            return self.other == failure.entity
        return self.entity == failure.entity

    def to_dict(self) -> dict[str, Any]:
        """Dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence} (strength {self.strength:.2f}, confidence {self.confidence:.0%})"


@dataclass(frozen=True)
class Findings:
    """Failures of a prompt and their causes, as returned by `find`.

    Attributes
    ----------
    prompt : Prompt
    seeds : tuple of int
        Seeds of the runs.
    judged : bool
        True if a judge judged the images; otherwise failures are suspected from the attention.
    failures : tuple of Failure
        Failures, the most frequent first.
    causes : tuple of Cause
        Causes, the most likely first; empty if none was found.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    judged: bool
    failures: tuple[Failure, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def failing(self) -> tuple[int, ...]:
        """Seeds of the runs with a failure."""
        return tuple(seed for seed in self.seeds if any(seed in failure.seeds for failure in self.failures))

    @property
    def unexplained(self) -> tuple[Failure, ...]:
        """Failures that no cause explains."""
        return tuple(
            failure
            for failure in self.failures
            if not any(cause.accounts_for(failure) and failure.kind in cause.explains for cause in self.causes)
        )

    @property
    def verdict(self) -> str:
        """One or two sentences: how often the prompt fails, and the most likely cause, or that none was found."""
        count, failing = len(self.seeds), len(self.failing)
        if not failing:
            source = "in the images" if self.judged else "in the attention (the images were not judged)"
            return f"No failure was found {source} of {count} seed{'s' * (count > 1)}."
        one, many = ("fails", "fail") if self.judged else ("probably fails", "probably fail")
        what = f"{failing} of {count} images {many if count > 1 else one}. ".replace("1 images", "1 image")
        cause = next((cause for cause in self.causes if cause.explains), None)
        return what + (cause.sentence if cause is not None else "No cause was found.")

    def to_dict(self) -> dict[str, Any]:
        """Dictionary for JSON."""
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
            lines += ["Failures", *(f"  {failure}" for failure in self.failures)]
        if self.causes:
            lines += ["Causes", *(f"  {i}. {cause}" for i, cause in enumerate(self.causes, 1))]
        if self.failures and self.causes and self.unexplained:
            lines += ["Failures without a known cause", *(f"  {failure.sentence}" for failure in self.unexplained)]
        return "\n".join(lines)


def with_current_kinds(findings: Mapping[str, Any]) -> dict[str, Any]:
    """Findings as `Findings.to_dict` of any version returns them, with the failures named as in this version.

    Examples
    --------
    >>> with_current_kinds({"failures": [{"kind": "spill"}], "causes": [{"explains": ["missing"]}]})
    {'failures': [{'kind': 'duplicated'}], 'causes': [{'explains': ['missing']}]}
    """
    return {
        **findings,
        "failures": [one | {"kind": _RENAMED.get(one["kind"], one["kind"])} for one in findings["failures"]],
        "causes": [
            one | {"explains": [_RENAMED.get(kind, kind) for kind in one["explains"]]} for one in findings["causes"]
        ],
    }
