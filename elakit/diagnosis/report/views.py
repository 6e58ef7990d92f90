"""Images, remedies, failures and causes of a diagnosis, in the form that the template of the report shows."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from elakit.diagnosis import commands
from elakit.diagnosis.data import DiagnosisData, Pair
from elakit.diagnosis.remedies import RemedyResult, bleed
from elakit.diagnosis.sentences import first_step, layer_name, steps_of
from elakit.guidance import method_title
from elakit.judge import Verdict
from elakit.numbering import number_of, plural
from elakit.plot.image_figures import data_uri
from elakit.prompt import Prompt
from elakit.rewording import entity_spans
from elakit.run import Run

# Longest sides in pixels of the images by seed, of the example's, and of a remedy's.
THUMBNAIL, LARGE, SMALL = 256, 640, 128
# Largest number of images shown per remedy; all of them count.
MAX_IMAGES = 12
# Names of the numbers that support a cause, as the report shows them; docs/causes.md defines the numbers.
EVIDENCE = {
    "likeness": "cosine similarity of the text embeddings",
    "leak": "shift of the text embedding toward the attribute",
    "change": "relative change of the text embedding",
    "length": "relative norm of the text embedding",
    "pieces": "number of tokens",
    "unknown": "unknown to the model",
    "standing": "attention compared with function words",
    "presence": "maximum compared with the most attended entity",
    "localized": "localization (1 − normalized entropy)",
    "start_held": "share of start-of-text in the attention at the entity",
    "split": "degree of splitting",
    "held": "share of the other noun in the attention at the entity",
    "overlap": "overlap of the two maps",
    "alike": "overlap of the two maps",
    "swap": "degree of exchange",
    "astray": "attribute's attention at the other entity, as a share of that at both entities (0.5: equal)",
    "attribute_held": "in the other entity's region: attribute's share, compared with the noun (0.5: equal)",
    "on_other": "share of the attribute's attention that lies on the other entity in the finished image",
}


# Kinds of failures, as the report names them where it lists what a cause explains.
EXPLAINED: dict[str, str] = {
    "missing": "missing entity",
    "fused": "fused entities",
    "wrong attribute": "attribute of another entity",
    "lost attribute": "lost attribute",
    "duplicated": "extra copies",
}


@dataclass(frozen=True)
class Image:
    """An image with the judge's findings.

    Attributes
    ----------
    uri : str
        The image as a data URI, possibly reduced in size.
    alt : str
        Description for screen readers.
    name : str
        Caption.
    findings : tuple of (str, bool)
        Statements of the judge about the image, each with True if the statement agrees with the prompt.
    success : bool or None
        True if the image is right; None if the image was not judged.
    width, height : int
        Size of the original image in pixels.
    """

    uri: str
    alt: str
    name: str
    findings: tuple[tuple[str, bool], ...]
    success: bool | None
    width: int
    height: int


@dataclass(frozen=True)
class Card:
    """The plain and the guided image of a seed, for the template of the report.

    Attributes
    ----------
    seed : int
    outcome : {"fixed", "broken", "right", "wrong"} or None
        Effect of the guidance method: the guided image is fixed or broken, or both images are right, or both are wrong.
        None if the images are not judged.
    label : str
        The outcome in words if the images are judged, and a note if the method did not act; otherwise "".
    plain, guided : Image
    predicted : str
        Predicted probability of failure as a phrase; "" if there is no prediction.
    """

    seed: int
    outcome: str | None
    label: str
    plain: Image
    guided: Image
    predicted: str


@dataclass(frozen=True)
class Bar:
    """A share and the ends of its 95% interval, all from 0 to 1."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """A row of the report's table of remedies: a remedy or plain generation, and its images.

    Attributes
    ----------
    title : str
        Name of the remedy, or "Plain".
    what : str
        Short description of how the images are generated.
    rank : int or None
        Place among the remedies that were tried, counted from 1; None for plain generation and for remedies that failed
        or were not tried.
    best : bool
        True if the report marks the remedy as the best.
    status : {"tried", "failed", "not tried"}
    why : str
        Error of a failed remedy, or the reason why the remedy was not tried; "" otherwise.
    score : str
        For judged images, the number of right images, such as "3 of 4 right". For images that are not judged, the mean
        bleeding, such as "bleed 0.41", or "–" if the bleeding is NaN. "" if there are no images.
    bar : Bar or None
        Share of right images with its interval; None if images are not judged.
    facts : tuple of str
        Short phrases, such as "2 fixed", or "time × 1.8" for 1.8 times the generation time of a plain image.
    images : tuple of Image
        The first images, at most `MAX_IMAGES`.
    more : int
        Number of further images, which are not shown.
    code, command : str
        Python code and command line that generate the images again; "" if there is none.
    """

    title: str
    what: str
    rank: int | None = None
    best: bool = False
    status: str = "tried"
    why: str = ""
    score: str = ""
    bar: Bar | None = None
    facts: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()
    more: int = 0
    code: str = ""
    command: str = ""


@dataclass(frozen=True)
class Reason:
    """A failure or a cause with its evidence.

    Attributes
    ----------
    text : str
        Sentence that states the failure or the cause.
    kind : str
        Kind of the failure or the cause.
    bar : Bar or None
        Share of the images that have the failure, with its interval; None for a cause.
    facts : tuple of str
        Short phrases, such as "seeds 0, 3" or "confidence 80%".
    evidence : tuple of (str, str)
        Name and value of each number that supports a cause; empty for a failure.
    """

    text: str
    kind: str
    bar: Bar | None = None
    facts: tuple[str, ...] = ()
    evidence: tuple[tuple[str, str], ...] = ()


def marked(prompt: Prompt) -> list[tuple[str, str | None]]:
    """Split the prompt into pieces of text, as pairs (text, label).

    The label identifies the entity that the text names. The label is None if the text names no entity.
    """
    pieces: list[tuple[str, str | None]] = []
    at = 0
    for start, stop, label in entity_spans(prompt):
        pieces += [(prompt.text[at:start], None), (prompt.text[start:stop], label)]
        at = stop
    return [(text, label) for text, label in [*pieces, (prompt.text[at:], None)] if text]


def card(diagnosis: DiagnosisData, pair: Pair, size: int = THUMBNAIL) -> Card:
    """Card with the plain and the guided image of a seed; `size` is the longest side of each image in pixels."""
    probability = diagnosis.predicted.get(pair.seed)
    return Card(
        seed=pair.seed,
        outcome=pair.outcome,
        label=_label(diagnosis, pair),
        plain=image(pair.plain, pair.plain_verdict, "plain", size),
        guided=image(pair.guided, pair.guided_verdict, method_title(diagnosis.method), size),
        predicted="" if probability is None else f"predicted probability of failure: {probability:.0%}",
    )


def _label(diagnosis: DiagnosisData, pair: Pair) -> str:
    both = {"right": "both right", "wrong": "both wrong"}
    said = [both.get(pair.outcome, pair.outcome)] if pair.outcome is not None else []
    if not pair.was_guided:
        said.append(f"{method_title(diagnosis.method)} did not act")
    return ": ".join(said)


def image(run: Run, verdict: Verdict | None, name: str, size: int, what: str = "") -> Image:
    """The image of a run, with the judge's findings.

    Parameters
    ----------
    run : Run
    verdict : Verdict or None
        Verdict of the judge on the image; None if the image was not judged.
    name : str
        Caption.
    size : int
        Longest side of the image in pixels.
    what : str
        Phrase that describes the image in the text for screen readers; by default `name`.
    """
    what = what or name
    findings = (*verdict.findings(), *_copies(verdict)) if verdict is not None else ()
    judged = "".join(f" {text}." for text, _ in findings)
    width, height = run.image.size
    return Image(
        uri=data_uri(run.image, size),
        alt=f"Image of “{run.prompt.text}”, seed {run.seed}, {what}.{judged}",
        name=name,
        findings=findings,
        success=None if verdict is None else bool(verdict.success),
        width=width,
        height=height,
    )


def _copies(verdict: Verdict) -> list[tuple[str, bool]]:
    """Findings that state extra copies of entities; the bool is True, because copies do not make an image wrong."""
    extra = Counter(verdict.extra)
    labels = {noun: label for label, noun in verdict.nouns.items()}
    return [
        (f"{labels[noun]}: {number_of(count, 'extra copy')}", True) for noun, count in extra.items() if noun in labels
    ]


def rows(diagnosis: DiagnosisData) -> list[Row]:
    """Rows of the report's table of remedies: plain generation, then the remedies, best first.

    Empty if the guidance method of the diagnosis is the only remedy.
    """
    if len(diagnosis.remedies) < 2:
        return []
    best = diagnosis.best
    tried = [id(one) for one in diagnosis.remedies if one.status == "tried"]
    return [
        _plain(diagnosis),
        *(_row(one, tried.index(id(one)) + 1 if id(one) in tried else None, one is best) for one in diagnosis.remedies),
    ]


def failures(diagnosis: DiagnosisData) -> list[Reason]:
    """Failures that the judge found, most frequent first."""
    found, steps = [], steps_of(diagnosis)
    for one in diagnosis.failures:
        facts = [f"{plural('seed', len(one.seeds))} {', '.join(map(str, one.seeds))}"]
        if one.step is not None:
            facts.append(first_step(one.step, steps))
        if one.layers:
            facts.append(f"earliest in {layer_name(one.layers[0])}")
        if one.heads:
            facts.append("heads " + ", ".join(f"{number} of {layer_name(name)}" for name, number in one.heads[:2]))
        found.append(Reason(text=one.sentence, kind=one.kind, bar=Bar(one.rate, *one.interval), facts=tuple(facts)))
    return found


def causes(diagnosis: DiagnosisData) -> list[Reason]:
    """Causes of the failures, most likely first; for images that were not judged, causes of the suspected failures."""
    found, steps = [], steps_of(diagnosis)
    for one in diagnosis.causes:
        facts = [f"confidence {one.confidence:.0%}", f"strength {one.strength:.0%}"]
        if one.in_text_encoder:
            facts.append("in the text encoder")
        elif one.step is not None:
            facts.append(first_step(one.step, steps))
        if one.layers:
            facts.append(f"earliest in {layer_name(one.layers[0])}")
        if one.explains and diagnosis.judged:
            facts.append(f"kinds of failure that it explains: {', '.join(EXPLAINED[kind] for kind in one.explains)}")
        # "alike" repeats "overlap" where both are listed
        numbers = {EVIDENCE.get(name, name): f"{value:.3g}" for name, value in one.evidence.items()}
        evidence = tuple(numbers.items())
        found.append(Reason(text=one.sentence, kind=one.kind, facts=tuple(facts), evidence=evidence))
    return found


def _plain(diagnosis: DiagnosisData) -> Row:
    runs, judged = diagnosis.plain, diagnosis.judged
    return Row(
        title="Plain",
        what="Without guidance.",
        score=_score(diagnosis.right if judged else None, len(runs), bleed(runs)),
        bar=Bar(diagnosis.rate, *diagnosis.interval) if judged else None,
        images=tuple(image(run, run.verdict, f"seed {run.seed}", SMALL, "plain") for run in runs[:MAX_IMAGES]),
        more=max(len(runs) - MAX_IMAGES, 0),
    )


def _row(one: RemedyResult, rank: int | None, best: bool) -> Row:
    facts = []
    if one.status == "tried":
        if one.judged:
            facts += [f"{len(one.fixed)} fixed", f"{len(one.broken)} broken"]
        facts.append(f"time × {one.cost:.1f}")
    if one.chosen_by:
        facts.append(f"seeds with the lowest {one.chosen_by}")
    return Row(
        title=one.remedy.title,
        what=one.remedy.what,
        rank=rank,
        best=best,
        status=one.status,
        why=one.why,
        score=_score(one.right if one.judged else None, len(one.runs), one.bleed) if one.runs else "",
        bar=Bar(one.rate, *one.interval) if one.judged else None,
        facts=tuple(facts),
        images=tuple(
            image(run, run.verdict, f"seed {run.seed}", SMALL, one.remedy.title) for run in one.runs[:MAX_IMAGES]
        ),
        more=max(len(one.runs) - MAX_IMAGES, 0),
        **commands.reproduce(one),
    )


def _score(right: int | None, of: int, bled: float) -> str:
    if right is not None:
        return f"{right} of {of} right"
    return "–" if math.isnan(bled) else f"bleed {bled:.2f}"
