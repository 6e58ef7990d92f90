"""What goes wrong in one run: as a judge sees the image, or, without one, as the attention lets suspect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from elakit.causes.findings import CauseKind, FailureKind
from elakit.causes.signs import Sign
from elakit.causes.text import word_label
from elakit.judge import Verdict
from elakit.prompt import Entity, Prompt

# Which signs in the attention go with which failure, and which causes account for it.
SHOWS: dict[FailureKind, tuple[CauseKind, ...]] = {
    "missing": ("token ignored", "start-of-text competition", "captured", "never localized", "regions swap"),
    "fused": ("captured", "regions swap", "never localized", "token ignored"),
    "wrong attribute": ("attribute misplaced", "regions swap", "captured"),
    "lost attribute": ("attribute misplaced", "regions swap", "captured"),
    "spill": ("region split",),
}
EXPLAINS: dict[CauseKind, tuple[FailureKind, ...]] = {
    "ambiguous word": ("missing", "fused", "lost attribute", "wrong attribute"),
    "text states alike": ("missing", "fused", "wrong attribute", "lost attribute", "spill"),
    "text leakage": ("wrong attribute", "lost attribute", "missing", "fused"),
    "token ignored": ("missing", "fused", "lost attribute", "wrong attribute"),
    "start-of-text competition": ("missing", "lost attribute", "fused", "wrong attribute"),
    "regions swap": ("missing", "fused", "wrong attribute", "lost attribute"),
    "captured": ("missing", "fused", "spill", "wrong attribute", "lost attribute"),
    "attribute misplaced": ("wrong attribute", "lost attribute", "missing", "fused"),
    "never localized": ("missing", "fused"),
    "region split": ("spill", "missing", "fused"),
}
# A sign this strong is suspected to have spoilt an image that no judge has seen.
SUSPECT = 0.5


class What(NamedTuple):
    """A failure, whatever run it is in."""

    kind: FailureKind
    entity: str
    other: str = ""
    token: str = ""


def seen(verdict: Verdict, prompt: Prompt) -> set[What]:
    """What a judge sees to be wrong.

    Parameters
    ----------
    verdict : Verdict
    prompt : Prompt

    Notes
    -----
    A thing that is there more often than asked for spills; that alone does not make an image wrong.
    """
    found: set[What] = set()
    nouns = verdict.nouns
    fused = {noun for mixture in verdict.mixtures for noun in mixture}
    for entity in prompt.entities:
        label, noun = entity.label, nouns[entity.label]
        if not verdict.present[label]:
            if noun not in fused:
                found.add(What("missing", label))
        elif not verdict.right_color[label]:
            found.add(_color(verdict, prompt, entity))
        if noun in verdict.extra:
            found.add(What("spill", label))
    labels = {noun: label for label, noun in reversed(nouns.items())}
    for mixture in verdict.mixtures:
        first, *others = sorted(
            mixture, key=lambda noun: (noun not in labels, list(labels).index(noun) if noun in labels else 0)
        )
        found |= {What("fused", labels.get(first, first), labels.get(other, other)) for other in others}
    return found


def suspected(signs: Iterable[Sign]) -> set[What]:
    """What strong signs in the attention let suspect."""
    found: set[What] = set()
    for sign in signs:
        if sign.strength >= SUSPECT:
            if sign.kind in ("token ignored", "never localized", "start-of-text competition"):
                found.add(What("missing", sign.entity))
            elif sign.kind == "captured":
                kind: FailureKind = "fused" if sign.measure == "alike" else "missing"
                found.add(What(kind, sign.entity, sign.other if kind == "fused" else "", sign.token))
            elif sign.kind == "attribute misplaced":
                found.add(What("wrong attribute", sign.other, sign.entity, sign.token))
            elif sign.kind == "region split":
                found.add(What("spill", sign.entity))
    return found


def _color(verdict: Verdict, prompt: Prompt, entity: Entity) -> What:
    """An entity whose color is another's, or neither its own nor another's."""
    seen = verdict.colors[entity.label]
    for other in prompt.entities:
        if other is not entity and verdict.asked[other.label] == seen:
            return What("wrong attribute", entity.label, other.label, _attribute(prompt, other, seen or ""))
    return What("lost attribute", entity.label, "", _attribute(prompt, entity, verdict.asked[entity.label] or ""))


def _attribute(prompt: Prompt, entity: Entity, said: str) -> str:
    """Label of an entity's attribute that says so."""
    words = dict.fromkeys(token.word for token in prompt.tokens if token.index in entity.attribute_indices)
    labels = [word_label(prompt, word) for word in words]
    return next((label for label in labels if label.partition("#")[0] == said), said)
