"""From signs to causes: those that are marked enough in the runs that fail, weighed against each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import mean

from elakit.causes.failures import EXPLAINS
from elakit.causes.findings import Cause, CauseKind, Failure
from elakit.causes.reading import Reading
from elakit.causes.signs import LEAST, Key, of_text, strongest
from elakit.causes.text import States
from elakit.models import EMBEDDED
from elakit.run import Run
from elakit.world.vocabulary import NOUNS

# What comes first brings about what comes later: a noun whose state is another's is also attended to where it is.
ORDER: tuple[CauseKind, ...] = (
    "ambiguous word", "text states alike", "token ignored", "text leakage", "start-of-text competition",
    "regions swap", "captured", "attribute misplaced", "never localized", "region split",
)  # fmt: skip
# Either of two entities may be the one that suffers: told once, of the one that is missing.
MUTUAL: tuple[CauseKind, ...] = ("text states alike", "captured", "regions swap")


def sure(strength: float) -> float:
    """How sure a sign of a strength makes by itself, 0 to 1; ``python -m benchmarks.causes report`` tells how right."""
    return 0.5 + 0.45 * strength


def unknown_words(runs: Sequence[Run], states: States) -> list[Cause]:
    """Nouns that the model does not know, or that its tokenizer cuts into pieces.

    The embedded model's vocabulary is known, whatever its tokenizer makes of other words.
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
    """Causes in the text encoder's states."""
    signs = strongest(of_text(states)).values()
    return [
        _cause(sign.key, sign.strength, runs, {sign.measure: sign.value, **sign.evidence})
        for sign in signs
        if sign.strength >= LEAST
    ]


def in_attention(failing: Sequence[Reading], right: Sequence[Reading]) -> list[Cause]:
    """Causes in the attention of the runs that fail; less sure where few of them show it, or right runs do too.

    Parameters
    ----------
    failing, right : sequence of Reading
    """
    found = []
    for key in dict.fromkeys(key for reading in failing for key in reading.signs):
        shown = [r for r in failing if key in r.signs and r.signs[key].strength >= LEAST]
        if not shown:
            continue
        strength = _strength(shown, key)
        signs = [reading.signs[key] for reading in shown]
        tables = [{**sign.evidence, sign.measure: sign.value} for sign in signs]
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


def told_once(causes: Iterable[Cause], failures: Sequence[Failure]) -> list[Cause]:
    """Of each pair of mutual causes the stronger, or that whose entity is missing more often, or less attended to."""
    missing: dict[str, int] = {}
    for failure in failures:
        if failure.kind in ("missing", "fused"):
            missing[failure.entity] = missing.get(failure.entity, 0) + failure.count

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
    """Causes, the likeliest first; little is left of one that an earlier kind brings about."""
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
    """The cause with the kinds of the failures that it accounts for."""
    about = {cause.entity, cause.other} - {""}
    fitting = (f.kind for f in failures if f.kind in EXPLAINS[cause.kind] and about & {f.entity, f.other})
    return replace(cause, explains=tuple(dict.fromkeys(fitting)))


def _cause(key: Key, strength: float, runs: Sequence[Run], evidence: dict[str, float]) -> Cause:
    kind, entity, other, token = key
    seeds = tuple(run.seed for run in runs)
    return Cause(kind, entity, other, token, strength, sure(strength), seeds=seeds, evidence=evidence)


def _strength(readings: Sequence[Reading], key: Key) -> float:
    return mean(reading.signs[key].strength if key in reading.signs else 0.0 for reading in readings)
