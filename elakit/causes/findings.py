"""Results of `elakit.causes.find`: failures with their frequency, and causes with their confidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from elakit.numbering import number_of, step_name
from elakit.prompt import Prompt
from elakit.statistics import wilson
from elakit.tokens import token_title, word_of
from elakit.world.vocabulary import COLORS

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
# Kinds that arise in the text encoder; "token ignored" can arise there or in the attention.
TEXT_KINDS: tuple[CauseKind, ...] = ("ambiguous word", "text states alike", "text leakage")
# Share of the attention in the region of an entity from which another noun counts as taking it.
CAPTURED = 0.6


@dataclass(frozen=True)
class Failure:
    """One failure of a prompt, with the runs that show it.

    Attributes
    ----------
    kind : str
        One of `FAILURE_KINDS`. "missing": the entity is not in the image. "fused": the entity and another entity are
        one object. "wrong attribute": the entity has an attribute of another entity. "lost attribute": the entity has
        neither its own attribute nor an attribute of another entity. "duplicated": the entity appears more often than
        the prompt asks.
    entity : str
        Label of the affected entity.
    other : str
        Label of a second entity. For "fused", the entity that is fused with `entity`. For "wrong attribute", the entity
        whose attribute `entity` has. In all other cases "".
    token : str
        Label of a token. For "wrong attribute", the attribute that the entity has wrongly. For "lost attribute", the
        attribute that the entity has lost. For other kinds, the token that receives the attention in the entity's
        region, or "" if there is none.
    seeds : tuple of int
        Seeds of the runs with this failure.
    of : int
        Number of all runs, with and without this failure.
    step : int or None
        Denoiser call from which the failure is visible in the attention, counted from 0: the median over the runs with
        the failure. None if the failure is not visible in the attention.
    layers : tuple of str
        Up to three layers in which the failure is visible earliest, the earliest first.
    heads : tuple of (str, int)
        Up to three heads (layer, head index) in which the failure is visible earliest; empty if heads were averaged.
    judged : bool
        True if a judge found the failure in the images, False if the failure is suspected from the attention.

    Examples
    --------
    >>> print(Failure("wrong attribute", "car", "apple", "green", seeds=(0, 2), of=4))
    In 2 of 4 images, the car is green, the color that the prompt gives the apple. (95% interval 15% to 85%)
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
        """95% confidence interval of `rate`, (lower bound, upper bound), by Wilson's method."""
        return wilson(self.count, self.of)

    @property
    def sentence(self) -> str:
        """One sentence that states the failure and its frequency."""
        other, token = self.other, self.token
        what = {
            "missing": f"the {self.entity} is missing"
            + (f", and the attention in its region goes to {_quoted(token)}" if token else ""),
            "fused": f"the {self.entity} and the {other} are fused into one",
            "wrong attribute": f"the {self.entity} is {word_of(token)}, the {_kind(token)} that the prompt gives the "
            f"{other}",
            "lost attribute": f"the {self.entity} is not {word_of(token)}",
            "duplicated": f"the {self.entity} appears more often than the prompt asks for",
        }[self.kind]
        images = "image" if self.of == 1 else "images"
        return f"In {self.count} of {self.of} {images}, {what}."

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON, with count, rate, interval and sentence."""
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
        return f"{self.sentence} ({'; '.join([f'95% interval {low:.0%} to {high:.0%}', *where])})"


@dataclass(frozen=True)
class Cause:
    """One likely cause of failures.

    Attributes
    ----------
    kind : str
        One of `CAUSE_KINDS`; ``docs/causes.md`` describes each.
    entity : str
        Label of the affected entity. If an attribute is misplaced, the entity that the attribute describes.
    other : str
        Label of a second entity, whose noun or attribute interferes. If an attribute is misplaced, the entity that
        receives the attribute. "" if no second entity is involved.
    token : str
        Label of a token: the attribute that leaked or is misplaced, the token that takes the attention, or the noun of
        `entity`.
    strength : float
        Strength of the number that supports the cause, from 0 (usual in right images) to 1 (the strongest case). For a
        cause in the attention, the mean strength over the runs in `seeds`.
    confidence : float
        Confidence that the cause is right, 0 to 1; ``docs/causes.md`` reports how often causes of a given confidence
        were right.
    step : int or None
        Denoiser call from which the cause is visible in the attention, counted from 0: the median over the runs that
        show the cause. None for a cause in the text encoder. None also for a cause that does not stay visible until the
        last step (see `Indicator.since`).
    layers : tuple of str
        Up to three layers in which the cause is visible earliest, the earliest first.
    seeds : tuple of int
        Seeds of the failing runs that show the cause. For a cause in the text encoder, the seeds of all runs.
    explains : tuple of str
        Kinds of the failures that the cause explains.
    evidence : dict of str to float
        Numbers that support the cause, by name; ``docs/causes.md`` explains the names.
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
        """True if the cause concerns the entity that fails, whether or not such a cause can lead to such a failure.

        Some causes affect two entities alike: similar text states, regions that swap, and attention at the same
        locations. Such a cause accounts for a failure if one of the two entities is the `entity` or the `other` of the
        failure.

        A misplaced attribute accounts for the failure "wrong attribute" of the entity that receives the attribute.

        In all other cases, the `entity` of the cause must be the `entity` of the failure. If the failure is that two
        entities are fused, the `entity` of the cause may be either of these two.
        """
        if self.kind in MUTUAL_KINDS or (self.kind == "captured" and self.evidence.get("held", 0.0) <= CAPTURED):
            return bool({self.entity, self.other} & {failure.entity, failure.other} - {""})
        if failure.kind == "fused":
            return self.entity in (failure.entity, failure.other)
        if self.kind == "attribute misplaced" and failure.kind == "wrong attribute":
            return self.other == failure.entity
        return self.entity == failure.entity

    @property
    def in_text_encoder(self) -> bool:
        """True if the cause was found in the text encoder, False if it was found in the attention."""
        return self.kind in TEXT_KINDS or "length" in self.evidence

    def to_dict(self) -> dict[str, Any]:
        """All fields as a dictionary for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.kind}: {self.sentence} (strength {self.strength:.2f}, confidence {self.confidence:.0%})"


@dataclass(frozen=True)
class Findings:
    """Result of `find`: the failures of a prompt and their causes. ``print`` shows the result as text.

    Attributes
    ----------
    prompt : Prompt
        Prompt of the runs.
    seeds : tuple of int
        Seeds of the runs.
    judged : bool
        True if a judge found the failures in the images, False if the failures are suspected from the attention.
    failures : tuple of Failure
        Failures, the most frequent first; equally frequent failures are in the order of `FAILURE_KINDS`.
    causes : tuple of Cause
        Causes, the most likely first; empty if no cause was found.
    """

    prompt: Prompt
    seeds: tuple[int, ...]
    judged: bool
    failures: tuple[Failure, ...] = ()
    causes: tuple[Cause, ...] = ()

    @property
    def failing(self) -> tuple[int, ...]:
        """Seeds of the runs with a failure, not counting the kind "duplicated", which does not make an image wrong."""
        return self._showing(failure for failure in self.failures if failure.kind != "duplicated")

    def _showing(self, failures: Iterable[Failure]) -> tuple[int, ...]:
        shown = {seed for failure in failures for seed in failure.seeds}
        return tuple(seed for seed in self.seeds if seed in shown)

    @property
    def unexplained(self) -> tuple[Failure, ...]:
        """Failures for which `causes` contains no explanation."""
        return tuple(
            failure
            for failure in self.failures
            if not any(cause.accounts_for(failure) and failure.kind in cause.explains for cause in self.causes)
        )

    @property
    def verdict(self) -> str:
        """One or two sentences: the number of images that fail, and the most likely cause, if one was found.

        If no image fails, but some show an entity more often than the prompt asks, the number of these is stated.
        """
        count, failing = len(self.seeds), len(self.failing)
        cause = next((cause for cause in self.causes if cause.explains), None)
        why = cause.sentence if cause is not None else "No cause was found."
        if not failing and (copies := len(self._showing(self.failures))):
            return (
                f"No image fails, but {copies} of {number_of(count, 'image')} show{'s' * (copies == 1)} an entity "
                f"more often than the prompt asks for. {why}"
            )
        if not failing:
            source = "in the images" if self.judged else "in the attention (the images were not judged)"
            return f"No failure was found {source} of {number_of(count, 'seed')}."
        what = f"{failing} of {number_of(count, 'image')}"
        probably = "" if self.judged else "probably "
        return f"{what} {probably}fail{'s' * (failing == 1)}. {why}"

    def to_dict(self) -> dict[str, Any]:
        """All failures and causes, with the sentences that describe them, as a dictionary for JSON."""
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


def _quoted(token: str) -> str:
    """Token as it is written in sentences: a word in quotation marks, a special token by its name alone.

    `token` is the label of the token in a recording. For example, "<start>" becomes start-of-text.
    """
    title = token_title(token)
    return f'"{token}"' if title == token else title


def _kind(token: str) -> str:
    """Return "color" if `token` is the label of a color, such as "red#2"; return "attribute" for any other label."""
    return "color" if word_of(token) in COLORS else "attribute"


def with_current_kinds(findings: Mapping[str, Any]) -> dict[str, Any]:
    """Update the result of `Findings.to_dict`: failures get the kinds that this version of elakit uses.

    Earlier versions used the kind "spill" for the failure that is now called "duplicated".

    Parameters
    ----------
    findings : mapping
        Result of `Findings.to_dict` from this or an earlier version of elakit. This mapping is not changed.

    Returns
    -------
    dict
        Copy of `findings`. "duplicated" replaces "spill" as the kind of failures, and in the lists of failures that
        causes explain.

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
