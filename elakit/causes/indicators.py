"""Indicators of causes: the numbers that support a cause, and their strength.

A `Scale` maps a number to a strength. The usual value in right images has the strength 0, and the worst value has
the strength 1. Usual and worst values were calibrated on picture-world, with prompts and seeds that no test uses
(``python -m benchmarks.causes --split calibrate``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from elakit.causes.evidence import Maps, spatial_distribution
from elakit.causes.findings import CAUSE_KINDS, CauseKind
from elakit.causes.text import States

# Cause that an indicator supports: kind, entity, other, token.
Key: TypeAlias = tuple[CauseKind, str, str, str]

# Weaker indicators are ignored.
LEAST = 0.15
# Steps before this share of the run are ignored, because their attention is noise.
FIRST = 0.08
# The denoiser ignores an entity with a smaller share of attention than this, compared with function words at its
# locations; the attention to other tokens there is then not informative.
READ = 0.15


@dataclass(frozen=True)
class Scale:
    """Linear scale that maps a number to the strength with which the number supports a cause.

    The strength is 0 at the usual value and 1 at the worst value. To get the strength of a number, call the scale with
    this number.

    Attributes
    ----------
    usual : float
        Usual value in right images; its strength is 0.
    worst : float
        Value in the worst cases; its strength is 1. `worst` may be smaller than `usual`.

    Examples
    --------
    The second number lies beyond `usual`. In the third scale, smaller numbers are worse:

    >>> Scale(0.2, 0.6)(0.3), Scale(0.2, 0.6)(0.1), Scale(0.05, 0.01)(0.02)
    (0.25, 0.0, 0.75)
    """

    usual: float
    worst: float

    def __call__(self, value: float) -> float:
        """Strength of a value: 0 at `usual` and beyond it, 1 at `worst` and beyond it, linear in between."""
        return round(min(max((value - self.usual) / (self.worst - self.usual), 0.0), 1.0), 6)


SCALES = {
    "length": Scale(0.5, 0.0),
    "likeness": Scale(0.4, 0.9),
    "leak": Scale(0.45, 0.75),
    "standing": Scale(0.15, 0.0),
    "start_held": Scale(0.5, 0.9),
    "swap": Scale(0.08, 0.2),
    "held": Scale(0.75, 0.95),
    "alike": Scale(0.8, 0.97),
    "astray": Scale(0.54, 0.63),
    "attribute_held": Scale(0.52, 0.68),
    "on_other": Scale(0.5, 0.7),
    "localized": Scale(0.05, 0.025),
    "split": Scale(0.35, 0.8),
}


@dataclass(frozen=True, eq=False)
class Indicator:
    """One number that supports one possible cause of a failure.

    The number is computed from the attention of one run, or from the text encoder's output.

    Attributes
    ----------
    kind : str
        Kind of the cause, such as "captured"; one of `CAUSE_KINDS`.
    entity : str
        Label of the affected entity; for a misplaced attribute, of the entity that the attribute describes.
    other : str
        Label of the other entity involved; "" if there is none.
    token : str
        Label of the token concerned: a noun, an attribute, or "<start>" for start-of-text.
    measure : str
        Name of the number; a key of `SCALES`.
    value : float
        The number. If it comes from attention, it is the mean of `series` without the first 8% of the steps
        (`FIRST`). For the measure "swap", it is the maximum of `series`.
    series : ndarray, (step,)
        The number at each step; empty if the number comes from the text encoder.
    evidence : dict of str to float
        Further numbers on the same cause, by name; ``docs/causes.md`` explains the names.
    """

    kind: CauseKind
    entity: str
    other: str
    token: str
    measure: str
    value: float
    series: np.ndarray = field(default_factory=lambda: np.empty(0))
    evidence: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """Tuple that identifies the cause: the fields `kind`, `entity`, `other` and `token`."""
        return self.kind, self.entity, self.other, self.token

    @property
    def strength(self) -> float:
        """Strength of the indicator, 0 to 1: the scale of `measure` in `SCALES`, applied to `value`."""
        return SCALES[self.measure](self.value)

    def since(self) -> int | None:
        """Position in `series` from which the indicator is visible; None if the indicator is never visible.

        The position is that of the first step that meets two conditions. The strength at this step is above 0. From
        this step to the last step, the strength is above 0 at 80% or more of the steps. The measure "swap" need not
        meet the second condition.
        """
        visible = np.array([SCALES[self.measure](value) > 0 for value in self.series], bool)
        if self.measure == "swap":
            return int(visible.argmax()) if visible.any() else None
        for step in np.flatnonzero(visible).tolist():
            if visible[step:].mean() >= 0.8:
                return int(step)
        return None


def of_text(states: States) -> Iterator[Indicator]:
    """Indicators of causes, computed from the text states of a prompt's nouns.

    Indicators with a strength of 0 are included.
    """
    names = states.entities
    for i, entity in enumerate(names):
        yield Indicator(
            kind="token ignored", entity=entity, other="", token=entity, measure="length", value=states.length[i]
        )
        for j in range(len(names)):
            if j != i:
                yield Indicator(
                    kind="text states alike",
                    entity=entity,
                    other=names[j],
                    token=names[j],
                    measure="likeness",
                    value=float(states.alike[i, j]),
                )
    for leak in states.leaks:
        yield Indicator(
            kind="text leakage",
            entity=leak.entity,
            other=leak.other,
            token=leak.token,
            measure="leak",
            value=leak.share,
            evidence={"change": leak.change},
        )


def of_maps(
    maps: Maps,
    entities: Sequence[str],
    attributes: Sequence[str],
    covered: np.ndarray | None = None,
    kinds: Collection[CauseKind] = CAUSE_KINDS,
) -> Iterator[Indicator]:
    """Indicators of causes, computed from the attention of a run, a layer or a head.

    Indicators with a strength of 0 are included.

    Parameters
    ----------
    maps : Maps
        Attention maps of the run, the layer or the head.
    entities, attributes : sequence of str
        Labels of the entities and of the attributes, in the order of the maps.
    covered : ndarray, (entity, y, x), optional
        Share of a location's area that an entity covers in the finished image, for each entity and location. None if
        the image was not judged.
    kinds : collection of str
        Kinds of causes that are needed. The kinds "region split", "regions swap" and "attribute misplaced" are slow to
        compute, and each of these three is computed only if `kinds` contains it. All other kinds are always computed.
    """
    late = slice(min(int(np.ceil(FIRST * len(maps.steps))), len(maps.steps) - 1), None)

    def mean(series: np.ndarray) -> float:
        return float(series[late].mean())

    for i, entity in enumerate(entities):
        standing, start = mean(maps.standing[:, i]), mean(maps.start_held[:, i])
        about = {"presence": mean(maps.presence[:, i]), "localized": mean(maps.localized[:, i])}
        yield Indicator(
            kind="token ignored",
            entity=entity,
            other="",
            token=entity,
            measure="standing",
            value=standing,
            series=maps.standing[:, i],
            evidence=about,
        )
        if standing < READ:
            continue
        rivals = [mean(maps.held[:, i, j]) if j != i else 0.0 for j in range(len(entities))]
        if start > max(rivals):
            series = maps.start_held[:, i]
            yield Indicator(
                kind="start-of-text competition",
                entity=entity,
                other="",
                token="<start>",
                measure="start_held",
                value=start,
                series=series,
                evidence=about,
            )
        yield Indicator(
            kind="never localized",
            entity=entity,
            other="",
            token=entity,
            measure="localized",
            value=about["localized"],
            series=maps.localized[:, i],
            evidence=about,
        )
        if "region split" in kinds:
            parted = maps.split[:, i] * np.minimum(maps.localized[:, i] / 0.2, 1.0)
            yield Indicator(
                kind="region split",
                entity=entity,
                other="",
                token=entity,
                measure="split",
                value=mean(parted),
                series=parted,
                evidence=about,
            )
        for j, other in enumerate(entities):
            if j == i:
                continue
            both = {"held": rivals[j], "overlap": mean(maps.alike[:, i, j]), **about}
            if rivals[j] > start:
                yield Indicator(
                    kind="captured",
                    entity=entity,
                    other=other,
                    token=other,
                    measure="held",
                    value=rivals[j],
                    series=maps.held[:, i, j],
                    evidence=both,
                )
            yield Indicator(
                kind="captured",
                entity=entity,
                other=other,
                token=other,
                measure="alike",
                value=both["overlap"],
                series=maps.alike[:, i, j],
                evidence=both,
            )
            if "regions swap" in kinds:
                swap = maps.swap[:, i, j]
                yield Indicator(
                    kind="regions swap",
                    entity=entity,
                    other=other,
                    token=other,
                    measure="swap",
                    value=float(swap.max()),
                    series=swap,
                    evidence=both,
                )
    if len(maps.owners) and "attribute misplaced" in kinds:
        yield from _of_attributes(maps, entities, attributes, covered, late)


def _of_attributes(
    maps: Maps, entities: Sequence[str], attributes: Sequence[str], covered: np.ndarray | None, late: slice
) -> Iterator[Indicator]:
    density = spatial_distribution(maps.attributes)
    for a, (attribute, owner) in enumerate(zip(attributes, maps.owners, strict=True)):
        for j, other in enumerate(entities):
            if j == owner:
                continue
            astray, held = maps.astray[:, a, j], maps.attribute_held[:, a, j]
            series = {"astray": astray}
            if float(astray[late].mean()) > 0.3:  # otherwise it is strong at all locations
                series["attribute_held"] = held
            if covered is not None:
                there, own = ((density[:, a] * covered[e]).sum((-2, -1)) for e in (j, owner))
                if float(there[late].mean()) > float(own[late].mean()):
                    series["on_other"] = there
            about = {name: float(values[late].mean()) for name, values in series.items()}
            for name, values in series.items():
                yield Indicator(
                    kind="attribute misplaced",
                    entity=entities[owner],
                    other=other,
                    token=attribute,
                    measure=name,
                    value=about[name],
                    series=values,
                    evidence=about,
                )


def strongest(indicators: Iterable[Indicator]) -> dict[Key, Indicator]:
    """Dictionary with the strongest indicator of each cause; the keys are `Indicator.key`."""
    found: dict[Key, Indicator] = {}
    for indicator in indicators:
        if indicator.key not in found or indicator.strength > found[indicator.key].strength:
            found[indicator.key] = indicator
    return found
