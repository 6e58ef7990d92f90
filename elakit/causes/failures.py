"""Failures of one run: found in the image by a judge or, without a judge, suspected from the attention."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from elakit.causes.findings import CauseKind, FailureKind
from elakit.causes.indicators import Indicator
from elakit.judge import Verdict
from elakit.prompt import Entity, Prompt
from elakit.tokens import word_of

# Causes whose indicators in the attention accompany a failure, and the failures that a cause can explain.
SHOWS: dict[FailureKind, tuple[CauseKind, ...]] = {
    "missing": ("token ignored", "start-of-text competition", "captured", "never localized", "regions swap"),
    "fused": ("captured", "regions swap", "never localized", "token ignored"),
    "wrong attribute": ("attribute misplaced", "regions swap", "captured"),
    "lost attribute": ("attribute misplaced", "regions swap", "captured"),
    "duplicated": ("region split",),
}
EXPLAINS: dict[CauseKind, tuple[FailureKind, ...]] = {
    "ambiguous word": ("missing", "fused", "lost attribute", "wrong attribute"),
    "text states alike": ("missing", "fused", "wrong attribute", "lost attribute", "duplicated"),
    "text leakage": ("wrong attribute", "lost attribute", "missing", "fused"),
    "token ignored": ("missing", "fused", "lost attribute", "wrong attribute"),
    "start-of-text competition": ("missing", "lost attribute", "fused", "wrong attribute"),
    "regions swap": ("missing", "fused", "wrong attribute", "lost attribute"),
    "captured": ("missing", "fused", "duplicated", "wrong attribute", "lost attribute"),
    "attribute misplaced": ("wrong attribute", "lost attribute", "missing", "fused"),
    "never localized": ("missing", "fused"),
    "region split": ("duplicated", "missing", "fused"),
}
# Strength from which an indicator is suspected to cause a failure in an image that was not judged.
SUSPECT = 0.5


class Observation(NamedTuple):
    """A failure in one image.

    Attributes
    ----------
    kind : str
        Kind of failure: "missing", "fused", "wrong attribute", "lost attribute" or "duplicated".
    entity : str
        Label of the affected entity.
    other : str
        Label of a second entity. If two entities are fused, `entity` and `other` are these two. If `entity` has an
        attribute of another entity, `other` is that entity. In all other cases "".
    token : str
        Label of a token: the attribute that `entity` has wrongly or has lost, or the word that takes the attention in
        the region of `entity`; "" if there is none.
    """

    kind: FailureKind
    entity: str
    other: str = ""
    token: str = ""


def seen(verdict: Verdict, prompt: Prompt) -> set[Observation]:
    """Failures that a judge found in an image.

    Parameters
    ----------
    verdict : Verdict
        Verdict of the judge on the image.
    prompt : Prompt
        Prompt of the image.

    Notes
    -----
    An entity is duplicated if the image shows more objects of its kind, such as cats, than the prompt asks for.
    Duplication alone does not make an image wrong.
    """
    found: set[Observation] = set()
    nouns = verdict.nouns
    fused = {noun for mixture in verdict.mixtures for noun in mixture}
    for entity in prompt.entities:
        label, noun = entity.label, nouns[entity.label]
        if not verdict.present[label]:
            if noun not in fused:
                found.add(Observation("missing", label))
        elif not verdict.right_color[label]:
            found.add(_color(verdict, prompt, entity))
        if noun in verdict.extra:
            found.add(Observation("duplicated", label))
    labels = {noun: label for label, noun in reversed(nouns.items())}
    for mixture in verdict.mixtures:
        first, *others = sorted(
            mixture, key=lambda noun: (noun not in labels, list(labels).index(noun) if noun in labels else 0)
        )
        found |= {Observation("fused", labels.get(first, first), labels.get(other, other)) for other in others}
    return found


def suspected(indicators: Iterable[Indicator]) -> set[Observation]:
    """Failures suspected from the attention, for an image that was not judged.

    An indicator is a number that supports a cause of failure. A failure is suspected if one of its indicators has a
    strength of `SUSPECT` or more.
    """
    found: set[Observation] = set()
    for indicator in indicators:
        if indicator.strength >= SUSPECT:
            if indicator.kind in ("token ignored", "never localized", "start-of-text competition"):
                found.add(Observation("missing", indicator.entity))
            elif indicator.kind == "captured":
                kind: FailureKind = "fused" if indicator.measure == "alike" else "missing"
                other = indicator.other if kind == "fused" else ""
                found.add(Observation(kind, indicator.entity, other, indicator.token))
            elif indicator.kind == "attribute misplaced":
                found.add(Observation("wrong attribute", indicator.other, indicator.entity, indicator.token))
            elif indicator.kind == "region split":
                found.add(Observation("duplicated", indicator.entity))
    return found


def _color(verdict: Verdict, prompt: Prompt, entity: Entity) -> Observation:
    """Failure of an entity that has a wrong color in the image, according to the judge.

    The kind of failure is "wrong attribute" if the prompt gives the wrong color to another entity. Otherwise, the kind
    is "lost attribute".
    """
    seen = verdict.colors[entity.label]
    for other in prompt.entities:
        if other is not entity and verdict.asked[other.label] == seen:
            return Observation("wrong attribute", entity.label, other.label, _attribute(prompt, other, seen or ""))
    asked = verdict.asked[entity.label] or ""
    return Observation("lost attribute", entity.label, "", _attribute(prompt, entity, asked))


def _attribute(prompt: Prompt, entity: Entity, said: str) -> str:
    """Label of an attribute of the entity, given the attribute's word `said`; the label of "red" may be "red#2".

    If the entity has no attribute with this word, `said` is returned.
    """
    words = dict.fromkeys(token.word for token in prompt.tokens if token.index in entity.attribute_indices)
    labels = [prompt.word_labels[word] for word in words]
    return next((label for label in labels if word_of(label) == said), said)
