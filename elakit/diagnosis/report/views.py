"""What the page shows of images, remedies, failures and causes: ready for the template, nothing left to compute."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elakit.diagnosis import commands
from elakit.diagnosis.remedies import Tried, bleed
from elakit.diagnosis.sentences import layer, plural
from elakit.guidance import method_title
from elakit.plot.images import data_uri
from elakit.rewording import entity_spans

if TYPE_CHECKING:
    from elakit.diagnosis import Diagnosis, Pair
    from elakit.generation import Run
    from elakit.judge import Verdict
    from elakit.prompt import Prompt

# Longest sides in pixels of the images in the grid, of the example's, and of those beside a remedy.
THUMBNAIL, LARGE, SMALL = 256, 640, 128
# Images shown of a remedy; a diagnosis over more seeds still counts all.
MOST_IMAGES = 12


@dataclass(frozen=True)
class Image:
    """An image with what is said of it."""

    uri: str
    alt: str
    name: str
    seen: tuple[tuple[str, bool], ...]  # what the judge says of each entity, and whether that is right
    success: bool | None
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """Both images of a seed."""

    seed: int
    outcome: str | None
    plain: Image
    guided: Image
    predicted: str


@dataclass(frozen=True)
class Bar:
    """A share with its interval, for a bar from 0 to 100."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A remedy, or plain drawing, with its images."""

    title: str
    what: str
    rank: int | None  # None for plain drawing
    best: bool
    status: str
    why: str
    score: str
    bar: Bar | None
    facts: tuple[str, ...]
    images: tuple[Image, ...]
    more: int  # images that are not shown
    code: str
    command: str


@dataclass(frozen=True)
class Reason:
    """A failure or a cause with its evidence."""

    text: str
    kind: str
    bar: Bar | None
    facts: tuple[str, ...]
    evidence: tuple[tuple[str, str], ...] = ()


def marked(prompt: Prompt) -> list[tuple[str, str | None]]:
    """The prompt in pieces, each with the label of the entity that it names, or None."""
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for start, stop, label in entity_spans(prompt):
        pieces += [(prompt.text[at:start], None), (prompt.text[start:stop], label)]
        at = stop
    return [(text, label) for text, label in [*pieces, (prompt.text[at:], None)] if text]


def card(diagnosis: Diagnosis, pair: Pair, most: int = THUMBNAIL) -> Card:
    """Both images of a seed."""
    chance = diagnosis.predicted.get(pair.seed)
    return Card(
        pair.seed,
        pair.outcome,
        image(pair.plain, pair.plain_verdict, "plain", most),
        image(pair.guided, pair.guided_verdict, method_title(diagnosis.method), most),
        "" if chance is None else f"failure predicted: {chance:.0%}",
    )


def image(run: Run, verdict: Verdict | None, name: str, most: int) -> Image:
    """An image with what the judge says of it."""
    seen = verdict.findings() if verdict is not None else ()
    judged = "".join(f" {said}." for said, _ in seen)
    alt = f"Image of “{run.prompt.text}”, seed {run.seed}, {name}.{judged}"
    success = None if verdict is None else bool(verdict.success)
    width, height = run.image.size
    return Image(data_uri(run.image, most), alt, name, seen, success, width, height)


def rows(diagnosis: Diagnosis) -> list[Row]:
    """Plain drawing, and under it the remedies, best first; empty where nothing but the method was tried."""
    if len(diagnosis.remedies) < 2:
        return []
    best = diagnosis.best
    ranks = {id(one): i for i, one in enumerate((r for r in diagnosis.remedies if r.status == "tried"), start=1)}
    return [
        _plain(diagnosis),
        *(_row(one, ranks.get(id(one)), one is best) for one in diagnosis.remedies),
    ]


def failures(diagnosis: Diagnosis) -> list[Reason]:
    """What goes wrong, most frequent first."""
    if diagnosis.findings is None:
        return []
    found = []
    steps = diagnosis.pairs[0].plain.settings["steps"]
    for one in diagnosis.findings.failures:
        facts = [f"{plural('seed', len(one.seeds))} {', '.join(map(str, one.seeds))}"]
        if one.step is not None:
            facts.append(f"from step {one.step} of 0 to {steps - 1}")
        if one.layers:
            facts.append(f"first in {' and '.join(map(layer, one.layers[:2]))}")
        if one.heads:
            facts.append("heads " + ", ".join(f"{number} of {layer(name)}" for name, number in one.heads[:2]))
        facts.append("seen in the images" if one.judged else "read off the attention alone")
        found.append(Reason(one.sentence, one.kind, Bar(one.rate, *one.interval), tuple(facts)))
    return found


def causes(diagnosis: Diagnosis) -> list[Reason]:
    """Why, likeliest first."""
    if diagnosis.findings is None:
        return []
    found = []
    for one in diagnosis.findings.causes:
        facts = [f"{one.confidence:.0%} sure", f"{one.strength:.0%} strong"]
        facts.append("before the image" if one.step is None else f"from step {one.step}")
        if one.layers:
            facts.append(f"most in {layer(one.layers[0])}")
        if one.explains:
            facts.append(f"explains: {', '.join(one.explains)}")
        evidence = tuple((name.replace("_", " "), f"{value:.3g}") for name, value in one.evidence.items())
        found.append(Reason(one.sentence, one.kind, None, tuple(facts), evidence))
    return found


def _plain(diagnosis: Diagnosis) -> Row:
    runs, judged = diagnosis.plain, diagnosis.judged
    return Row(
        "As it is",
        "Drawn plainly.",
        None,
        False,
        "tried",
        "",
        _score(diagnosis.right if judged else None, len(runs), bleed(runs)),
        Bar(diagnosis.rate, *diagnosis.interval) if judged else None,
        (),
        tuple(image(run, run.verdict, f"seed {run.seed}", SMALL) for run in runs[:MOST_IMAGES]),
        max(len(runs) - MOST_IMAGES, 0),
        "",
        "",
    )


def _row(one: Tried, rank: int | None, best: bool) -> Row:
    again: dict[str, Any] = commands.again(one)
    facts = []
    if one.status == "tried":
        if one.judged:
            facts += [f"fixed {len(one.fixed)}", f"broken {len(one.broken)}"]
        facts.append(f"{one.cost:.1f} × the time")
    if one.chosen_by:
        facts.append(f"chosen by {one.chosen_by}")
    return Row(
        one.remedy.title,
        one.remedy.what,
        rank,
        best,
        one.status,
        one.why,
        _score(one.right if one.judged else None, len(one.runs), one.bleed) if one.runs else "",
        Bar(one.rate, *one.interval) if one.judged else None,
        tuple(facts),
        tuple(image(run, run.verdict, f"seed {run.seed}", SMALL) for run in one.runs[:MOST_IMAGES]),
        max(len(one.runs) - MOST_IMAGES, 0),
        again["code"],
        again["command"],
    )


def _score(right: int | None, of: int, bled: float) -> str:
    if right is not None:
        return f"{right} of {of} right"
    return "–" if math.isnan(bled) else f"bleed {bled:.2f}"
