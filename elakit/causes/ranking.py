"""Causes derived from indicators: which are reported, with which confidence, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean

from elakit.causes.failures import EXPLAINS
from elakit.causes.findings import Cause, CauseKind, Failure
from elakit.causes.indicators import LEAST, Key, of_text, strongest
from elakit.causes.run_indicators import RunIndicators
from elakit.causes.text import States
from elakit.models import EMBEDDED
from elakit.run import Run
from elakit.world.vocabulary import NOUNS

# Causal order: an earlier kind can bring about a later one. A noun with the text state of another noun, for example, is
# also attended to in the region of that noun.
ORDER: tuple[CauseKind, ...] = (
    "ambiguous word", "text states alike", "token ignored", "text leakage", "start-of-text competition",
    "regions swap", "captured", "attribute misplaced", "never localized", "region split",
)  # fmt: skip
# Either of two entities may be affected; the cause is reported once, for the entity that is missing.
MUTUAL: tuple[CauseKind, ...] = ("text states alike", "captured", "regions swap")


def confidence_of(strength: float) -> float:
    """Confidence in a cause, 0.5 to 0.95, computed from the strength (0 to 1) of the indicator that supports the cause.

    `in_attention` and `ranked` may lower this confidence. ``python -m benchmarks.causes report`` prints how often the
    reported cause is correct, by confidence.
    """
    return 0.5 + 0.45 * strength


def unknown_words(runs: Sequence[Run], states: States) -> list[Cause]:
    """Find causes of the kind "ambiguous word": nouns that a tokenizer splits into pieces.

    If all runs come from a built-in model, whose vocabulary is known, nouns outside the vocabulary are found instead.
    """
    embedded = all(run.settings.get("model") in EMBEDDED for run in runs)
    found = []
    for entity, pieces in zip(runs[0].prompt.entities, states.pieces, strict=True):
        unknown = embedded and entity.noun.lower() not in NOUNS
        strength = 1.0 if unknown else 0.5 if pieces > 1 and not embedded else 0.0
        evidence = {"pieces": float(pieces), "unknown": float(unknown)}
        found.append(_cause(("ambiguous word", entity.label, "", entity.label), strength, runs, evidence))
    return [cause for cause in found if cause.strength]


def before_the_image(runs: Sequence[Run], states: States) -> list[Cause]:
    """Causes that arise in the text encoder, before an image is generated.

    A cause is included if its indicator, computed from `states`, has a strength of `LEAST` or more. The seeds of `runs`
    become the seeds of each cause.
    """
    indicators = strongest(of_text(states)).values()
    return [
        _cause(indicator.key, indicator.strength, runs, {indicator.measure: indicator.value, **indicator.evidence})
        for indicator in indicators
        if indicator.strength >= LEAST
    ]


def in_attention(failing: Sequence[RunIndicators], right: Sequence[RunIndicators]) -> list[Cause]:
    """Causes that the attention of failing runs shows.

    A run shows a cause if the run's indicator of this cause has a strength of `LEAST` or more. The confidence in a
    cause is lower if only some of the failing runs show the cause. The confidence is also lower if the indicator of
    this cause is strong in the right runs, too.

    Parameters
    ----------
    failing : sequence of RunIndicators
        Indicators of the runs that fail, one item per run.
    right : sequence of RunIndicators
        Indicators of the runs that do not fail, one item per run.
    """
    found = []
    for key in dict.fromkeys(key for reading in failing for key in reading.indicators):
        shown = [r for r in failing if key in r.indicators and r.indicators[key].strength >= LEAST]
        if not shown:
            continue
        strength = _strength(shown, key)
        indicators = [reading.indicators[key] for reading in shown]
        tables = [{**indicator.evidence, indicator.measure: indicator.value} for indicator in indicators]
        names = dict.fromkeys(name for table in tables for name in table)
        evidence = {name: mean(table[name] for table in tables if name in table) for name in names}
        cause = _cause(key, strength, [reading.run for reading in shown], evidence)
        cause = replace(cause, confidence=cause.confidence * (0.5 + 0.5 * len(shown) / len(failing)))
        if right:
            elsewhere = _strength(right, key)
            evidence["strength in right images"] = elsewhere
            cause = replace(cause, confidence=cause.confidence * (1 - 0.5 * min(elsewhere / strength, 1.0)))
        found.append(cause)
    return found


def without_duplicates(causes: Iterable[Cause], failures: Sequence[Failure]) -> list[Cause]:
    """Causes without duplicates; of several duplicate causes, the strongest is kept.

    Two causes are duplicates if they have the same kind and concern the same two entities in either order. Only causes
    of the kinds in `MUTUAL` can be duplicates.

    Strengths are rounded to one decimal. If the strengths are equal, the cause is kept whose `entity` is missing or
    fused in more images. If these numbers are equal, too, the cause is kept whose `entity` has the lower maximum of
    attention ("presence" in `Cause.evidence`).

    Parameters
    ----------
    causes : iterable of Cause
    failures : sequence of Failure
        Failures of the runs, which state how often each entity is missing or fused.
    """
    missing: dict[str, int] = {}
    for failure in failures:
        if failure.kind in ("missing", "fused"):
            for entity in (failure.entity, failure.other) if failure.kind == "fused" else (failure.entity,):
                missing[entity] = missing.get(entity, 0) + failure.count

    def rank(cause: Cause) -> tuple[float, int, float]:
        return round(cause.strength, 1), missing.get(cause.entity, 0), -cause.evidence.get("presence", 1.0)

    best: dict[tuple[CauseKind, frozenset[str]], Cause] = {}
    others = []
    for cause in causes:
        pair = cause.kind, frozenset((cause.entity, cause.other))
        if cause.kind not in MUTUAL:
            others.append(cause)
        elif pair not in best or rank(cause) > rank(best[pair]):
            best[pair] = cause
    return others + list(best.values())


def ranked(causes: Sequence[Cause]) -> list[Cause]:
    """Causes, the most likely first; the confidence in a cause is reduced if another cause may have led to this cause.

    Cause A may have led to cause B if A and B concern the same entity and the kind of A precedes the kind of B in
    `ORDER`. For each such A, the confidence in B is multiplied by 1 - 0.8 s, where s is the strength of A. Causes with
    the same confidence are in the order of `ORDER`.
    """
    found = []
    for cause in causes:
        left = cause.confidence
        for before in causes:
            touch = {before.entity, before.other} & {cause.entity, cause.other} - {""}
            if touch and ORDER.index(before.kind) < ORDER.index(cause.kind):
                left *= 1 - 0.8 * before.strength
        found.append(replace(cause, confidence=left))
    return sorted(found, key=lambda cause: (-cause.confidence, ORDER.index(cause.kind)))


def explained(cause: Cause, failures: Sequence[Failure]) -> Cause:
    """Copy of a cause, in which `Cause.explains` lists the kinds of failures that the cause explains.

    Only kinds that occur in `failures` are listed.
    """
    fitting = (f.kind for f in failures if f.kind in EXPLAINS[cause.kind] and cause.accounts_for(f))
    return replace(cause, explains=tuple(dict.fromkeys(fitting)))


def _cause(key: Key, strength: float, runs: Sequence[Run], evidence: dict[str, float]) -> Cause:
    kind, entity, other, token = key
    seeds = tuple(run.seed for run in runs)
    return Cause(
        kind=kind,
        entity=entity,
        other=other,
        token=token,
        strength=strength,
        confidence=confidence_of(strength),
        seeds=seeds,
        evidence=evidence,
    )


def _strength(readings: Sequence[RunIndicators], key: Key) -> float:
    return mean(reading.indicators[key].strength if key in reading.indicators else 0.0 for reading in readings)
