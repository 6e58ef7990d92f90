"""A diagnosis in plain words."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from elakit.diagnosis.measures import measure_table
from elakit.diagnosis.remedies import Tried, bleed
from elakit.guidance import method_title

if TYPE_CHECKING:
    from elakit.causes import Failure
    from elakit.diagnosis.result import Diagnosis, Outcome, Pair

# Of failures and causes so many are told in the verdict; the page lists all.
MOST = 3
_LAYER = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)")
# From so many images on the order of the remedies is not called a matter of chance.
ENOUGH = 20


def summary(diagnosis: Diagnosis) -> list[str]:
    """What was found, in sentences for people.

    Parameters
    ----------
    diagnosis : Diagnosis

    Returns
    -------
    list of str
        Plain text, nothing escaped.
    """
    return [sentence for sentences in told(diagnosis).values() for sentence in sentences]


def told(diagnosis: Diagnosis) -> dict[str, list[str]]:
    """The sentences by what they are about.

    Parameters
    ----------
    diagnosis : Diagnosis

    Returns
    -------
    dict of str to list of str
        "images" (how many are right), "wrong" (what goes wrong), "why", "fix" (the best remedy), "sure" (how sure
        all this is), "attention" (how much bleeds).
    """
    return {
        "images": _images(diagnosis),
        "wrong": _wrong(diagnosis),
        "why": _why(diagnosis),
        "fix": fix(diagnosis),
        "sure": _sure(diagnosis),
        "attention": _attention(diagnosis),
    }


def plural(word: str, count: int) -> str:
    """A word, with an s unless there is one of it."""
    return word if count == 1 else f"{word}s"


def layer(name: str) -> str:
    """A layer's name as people say it; one that is not a UNet's is left as it is.

    Examples
    --------
    >>> layer("up_blocks.2.attentions.1.transformer_blocks.0.attn2"), layer("transformer_blocks.3.attn")
    ('up block 2, attention 1', 'transformer_blocks.3.attn')
    """
    found = _LAYER.match(name)
    if found is None:
        return name
    side, block, attention = found.groups()
    return f"{side} block{' ' + block if block else ''}, attention {attention}"


def guided(pair: Pair) -> bool:
    """Whether guidance took any step."""
    return pair.guided.guidance is not None and bool(pair.guided.guidance.rows)


def failure(found: Failure, steps: int) -> str:
    """A failure in one sentence: what, how often, from when, and where it starts.

    Parameters
    ----------
    found : Failure
    steps : int
        Of the runs.
    """
    said = found.sentence.rstrip(".")
    low, high = found.interval
    where = [f"{_percent(low)} to {_percent(high)} % of all images"]
    if found.step is not None:
        where.append(f"it shows from step {found.step} of 0 to {steps - 1}")
    if found.layers:
        where.append(f"first in {layer(found.layers[0])}")
    return f"{said} ({', '.join(where)})."


def fix(diagnosis: Diagnosis) -> list[str]:
    """What would fix it."""
    tried = [one for one in diagnosis.remedies if one.status == "tried"]
    if diagnosis.judged and diagnosis.right == len(diagnosis.pairs):
        return ["Nothing needs fixing in these images, so no other remedy was tried."]
    if len(diagnosis.remedies) < 2:
        return []
    said = []
    best = diagnosis.best
    if not diagnosis.judged:
        said.append(
            "No judge has seen the images, so remedies are ranked by how little attention bleeds. That does not tell "
            "whether an image is right, and guidance lowers it by design: look at the images."
        )
    if best is None:
        said.append(f"None of the {len(tried)} remedies tried did better than drawing it plainly.")
    else:
        said.append(f"Of {len(tried)} remedies tried the best is {_named(best)}: {_result(diagnosis, best)}.")
        if best.judged:
            equal = [one for one in tried if one is not best and one.judged and one.rate == best.rate and one.helps]
            if equal:
                names = _listed([one.remedy.title for one in equal[:MOST]])
                more = f" and {len(equal) - MOST} more" if len(equal) > MOST else ""
                said.append(f"{names}{more} got as many right.")
    failed = [one for one in diagnosis.remedies if one.status == "failed"]
    said += [f"{one.remedy.title} could not be tried: {one.why}" for one in failed]
    return said


def _images(diagnosis: Diagnosis) -> list[str]:
    method, count = method_title(diagnosis.method), len(diagnosis.pairs)
    if not diagnosis.judged:
        return [
            "The images were not judged, because the judge knows only the nouns and colors of picture-world. "
            "Whether they are right is left to your eye; what is measured here are the attention maps."
        ]
    right = diagnosis.right
    guided_right = diagnosis.count("right") + diagnosis.count("fixed")
    return [
        f"Drawn plainly, {right} of {count} {plural('image', count)} {'shows' if right == 1 else 'show'} "
        f"everything the prompt asks for; with {method}, {guided_right} of {count}.",
        f"{method} {_changed(diagnosis, 'fixed')} and {_changed(diagnosis, 'broken')}.",
    ]


def _wrong(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.findings is None:
        return []
    steps = int(diagnosis.pairs[0].plain.settings["steps"])
    return [failure(found, steps) for found in diagnosis.findings.failures[:MOST]]


def _why(diagnosis: Diagnosis) -> list[str]:
    if diagnosis.findings is None or not diagnosis.findings.failures:
        return []
    causes = diagnosis.findings.causes[:MOST]
    return [cause.sentence for cause in causes] or ["No cause was found that could be named."]


def _sure(diagnosis: Diagnosis) -> list[str]:
    count, said = len(diagnosis.pairs), list[str]()
    if diagnosis.judged:
        low, high = diagnosis.interval
        said.append(
            f"From {count} {plural('seed', count)}: of all its plain images {_percent(low)} to {_percent(high)} % "
            "are right (95 % interval)."
        )
        if len(diagnosis.remedies) > 1 and diagnosis.best is not None and count < ENOUGH:
            said.append(
                f"The best of several on {count} {plural('seed', count)} may be so by chance; draw more seeds before "
                "you rely on the order."
            )
    said += diagnosis.problems
    return said


def _attention(diagnosis: Diagnosis) -> list[str]:
    method, count = method_title(diagnosis.method), len(diagnosis.pairs)
    table = measure_table(diagnosis)
    if any(guided(pair) for pair in diagnosis.pairs):
        before, after = (float(table["bleed", run].mean()) for run in ("plain", "guided"))
        fell = int((table["bleed", "guided"] < table["bleed", "plain"]).sum())
        return [
            f"Of an entity's attention, {before:.0%} lay outside its own region when drawn plainly and {after:.0%} "
            f"with {method}, on average; the share fell for {fell} of {count} {plural('seed', count)}."
        ]
    alone = len(diagnosis.prompt.entities) == 1
    why = ", since the prompt names one thing only and nothing can bleed into it" if alone else ""
    return [f"{method} took no step here{why}: both images of a seed are the same."]


def _named(tried: Tried) -> str:
    """A remedy as it goes into a sentence."""
    remedy = tried.remedy
    if remedy.kind == "wording":
        return f"other words, “{remedy.prompt.text}”"
    if remedy.kind == "seed":
        right = [str(run.seed) for run in tried.runs if run.verdict is not None and run.verdict.success]
        seeds = right or [str(run.seed) for run in tried.runs]
        return f"another seed ({', '.join(seeds[:4])}{', …' if len(seeds) > 4 else ''})"
    return remedy.title[:1].lower() + remedy.title[1:] if remedy.kind == "regions" else remedy.title


def _result(diagnosis: Diagnosis, best: Tried) -> str:
    count = len(best.runs)
    time = f"it takes {best.cost:.1f} times as long"
    if not best.judged:
        return f"bleeding {best.bleed:.2f} instead of {bleed(best.plain):.2f}, and {time}"
    low, high = (_percent(end) for end in best.interval)
    said = (
        f"{best.right} of {count} right ({low} to {high} %), against {diagnosis.right} of {count} drawn plainly; {time}"
    )
    return said if not best.broken else f"{said}, and made {len(best.broken)} of {diagnosis.right} right ones wrong"


def _changed(diagnosis: Diagnosis, outcome: Outcome) -> str:
    seeds = [str(pair.seed) for pair in diagnosis.pairs if pair.outcome == outcome]
    if not seeds:
        return f"{outcome} none"
    shown = ", ".join(seeds[:8]) + (", …" if len(seeds) > 8 else "")
    return f"{outcome} {len(seeds)} ({plural('seed', len(seeds))} {shown})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}"
