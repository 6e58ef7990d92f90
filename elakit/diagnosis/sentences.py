"""Sentences that summarize a diagnosis."""

from __future__ import annotations

import re
from collections.abc import Sequence

from elakit.causes import Cause, Failure
from elakit.diagnosis.data import DiagnosisData, Outcome, explains
from elakit.diagnosis.measures import measure_table
from elakit.diagnosis.remedies import RemedyResult, bleed
from elakit.guidance import method_title
from elakit.numbering import plural, step_name

# Number of failures and causes in the summary; the report lists all.
MOST = 3
# Number of seeds from which on the ranking of remedies is not called uncertain.
ENOUGH = 20
_LAYER = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.attentions\.(\d+)")


def summary(diagnosis: DiagnosisData) -> list[str]:
    """Summarize a diagnosis in sentences.

    Parameters
    ----------
    diagnosis : DiagnosisData

    Returns
    -------
    list of str
        Sentences on the number of right images, failures, causes, the best remedy, attention and uncertainty, in this
        order. They are plain text, not escaped for HTML.
    """
    return [sentence for sentences in statements(diagnosis).values() for sentence in sentences]


def statements(diagnosis: DiagnosisData) -> dict[str, list[str]]:
    """Sentences that summarize a diagnosis, by topic.

    Parameters
    ----------
    diagnosis : DiagnosisData

    Returns
    -------
    dict of str to list of str
        Sentences for each topic. The topics are "images" (number of right images), "failures", "causes", "remedy" (the
        best remedy), "attention" (bleeding) and "uncertainty" (confidence intervals, and parts of the diagnosis that
        failed). The list of a topic may be empty.
    """
    return {
        "images": _images(diagnosis),
        "failures": [failure_sentence(found, steps_of(diagnosis)) for found in diagnosis.failures[:MOST]],
        "causes": _causes(diagnosis),
        "remedy": _remedy(diagnosis),
        "attention": _attention(diagnosis),
        "uncertainty": _uncertainty(diagnosis),
    }


def layer_name(name: str) -> str:
    """Readable name of an attention layer of a U-Net; other names are returned unchanged.

    Examples
    --------
    >>> layer_name("up_blocks.2.attentions.1.transformer_blocks.0.attn2"), layer_name("transformer_blocks.3.attn")
    ('up block 2, attention 1', 'transformer_blocks.3.attn')
    """
    found = _LAYER.match(name)
    if found is None:
        return name
    side, block, attention = found.groups()
    return f"{side} block{' ' + block if block else ''}, attention {attention}"


def steps_of(diagnosis: DiagnosisData) -> int:
    """Number of denoising steps of the runs of a diagnosis."""
    return int(diagnosis.pairs[0].plain.settings["steps"])


def first_step(step: int, steps: int) -> str:
    """Phrase for the first step at which a failure or a cause is visible in the attention.

    Parameters
    ----------
    step : int
        Coordinate of the step in arrays and tables, counted from 0. The phrase counts from 1.
    steps : int
        Number of denoising steps of the run.

    Examples
    --------
    >>> first_step(0, 25)
    'first visible in the attention at step 1 of 25'
    """
    return f"first visible in the attention at {step_name(step, steps)}"


def failure_sentence(found: Failure, steps: int) -> str:
    """One sentence that states a failure, its frequency, and the step and layer where it is first visible.

    Parameters
    ----------
    found : Failure
    steps : int
        Number of denoising steps.
    """
    low, high = found.interval
    details = [f"95% interval {low:.0%} to {high:.0%}"]
    if found.step is not None:
        details.append(first_step(found.step, steps))
    if found.layers:
        details.append(f"earliest in {layer_name(found.layers[0])}")
    return f"{found.sentence.rstrip('.')} ({'; '.join(details)})."


def _images(diagnosis: DiagnosisData) -> list[str]:
    method, count = method_title(diagnosis.method), len(diagnosis.pairs)
    if blocked := diagnosis.blocked:
        return [
            f"The pipeline's safety checker replaced {blocked} of {2 * count} images, so the images were not judged. "
            "The measures of attention are not affected."
        ]
    if not diagnosis.judged and (black := diagnosis.black):
        return [
            f"{black} of {2 * count} images {'is' if black == 1 else 'are'} entirely black, so the images were not "
            "judged. Load the pipeline with safety_checker=None, or with another dtype."
        ]
    if not diagnosis.judged:
        return [
            "The images were not judged, because the built-in judge knows only images, nouns and colors of "
            "picture-world. Look at the images to see whether they are right. The measures below describe only the "
            "attention maps."
        ]
    right = diagnosis.right
    guided_right = diagnosis.count("right") + diagnosis.count("fixed")
    return [
        f"Without guidance, {right} of {count} {plural('image', count)} {'shows' if right == 1 else 'show'} everything "
        f"the prompt asks for. With {method}, {guided_right} of {count} {'does' if guided_right == 1 else 'do'}.",
        f"{method} fixed {_count(diagnosis, 'fixed')} and broke {_count(diagnosis, 'broken')}.",
    ]


def _causes(diagnosis: DiagnosisData) -> list[str]:
    if diagnosis.findings is None:
        return []
    if not diagnosis.judged:
        return [cause.sentence for cause in diagnosis.causes[:MOST]]
    shown = diagnosis.failures[:MOST]
    if not shown:
        return []
    causes = [cause for cause in diagnosis.causes if any(explains(cause, failure) for failure in shown)][:MOST]
    said = [cause.sentence for cause in causes]
    if not causes:
        return ["No cause was found."]
    return said + _without_cause(shown, causes)


def unexplained(diagnosis: DiagnosisData) -> list[str]:
    """One sentence for each failure that no cause explains."""
    return _without_cause(diagnosis.failures, diagnosis.causes)


def _without_cause(failures: Sequence[Failure], causes: Sequence[Cause]) -> list[str]:
    return [
        f"{failure.sentence.removesuffix('.')}; no cause was found."
        for failure in failures
        if not any(explains(cause, failure) for cause in causes)
    ]


def _remedy(diagnosis: DiagnosisData) -> list[str]:
    tried = [one for one in diagnosis.remedies if one.status == "tried"]
    if diagnosis.judged and diagnosis.right == len(diagnosis.pairs):
        return ["All images are right without guidance, so no other remedy was tried."]
    if len(diagnosis.remedies) < 2:
        return []
    said = []
    best = diagnosis.best
    if not diagnosis.judged:
        said.append(
            "The images were not judged, so the remedies are ranked by bleeding. Low bleeding does not imply a right "
            "image, and guidance lowers it by design: look at the images."
        )
    if best is None:
        none = f"None of the {len(tried)} remedies" if len(tried) > 1 else "The only remedy tried did not do"
        said.append(f"{none}{' did' if len(tried) > 1 else ''} better than generation without guidance.")
    else:
        number = (
            f"Of {len(tried)} remedies, the best is" if len(tried) > 1 else "The only remedy that could be tried is"
        )
        said.append(f"{number} {_named(best)}: {_result(diagnosis, best)}.")
        if best.judged:
            equal = [one for one in tried if one is not best and one.judged and one.rate == best.rate and one.helps]
            if equal:
                names = [one.remedy.title for one in equal[:MOST]]
                more = [f"{len(equal) - MOST} more"] if len(equal) > MOST else []
                times = f", at {equal[0].cost:.1f} times the generation time" if len(equal) == 1 else ""
                said.append(f"The same number of images is right with {_listed([*names, *more])}{times}.")
    failed = [one for one in diagnosis.remedies if one.status == "failed"]
    said += [f"{one.remedy.title} failed: {one.why}" for one in failed]
    return said


def _attention(diagnosis: DiagnosisData) -> list[str]:
    method, count = method_title(diagnosis.method), len(diagnosis.pairs)
    if not any(pair.was_guided for pair in diagnosis.pairs):
        single = len(diagnosis.prompt.entities) == 1
        traces = [pair.guided.guidance for pair in diagnosis.pairs if pair.guided.guidance is not None]
        unneeded = any(trace.rows for trace in traces) and not any(trace.skipped for trace in traces)
        why = (
            ", because the prompt names only one entity"
            if single
            else ", because it found that the images need no guidance"
            if unneeded
            else ""
        )
        return [f"{method} did not act in any step{why}: both images of a seed are identical."]
    table = measure_table(diagnosis)
    before, after = (float(table["bleed", run].mean()) for run in ("plain", "guided"))
    fell = int((table["bleed", "guided"] < table["bleed", "plain"]).sum())
    shares = (
        f"{before:.0%} of an entity's attention lies outside its own region, both without guidance and with {method}"
        if abs(before - after) < 0.005  # rounding must not make a difference of it
        else f"{before:.0%} of an entity's attention lies outside its own region without guidance, and {after:.0%} "
        f"with {method}"
    )
    said = [
        f"On average, {shares}. The share is lower with {method} for {fell} of {count} {plural('seed', count)}.",
    ]
    if "attribute_intrusion" in table:
        before, after = (float(table["attribute_intrusion", run].mean()) for run in ("plain", "guided"))
        said.append(
            f"{before:.0%} of an attribute's attention lies in the regions of other entities without guidance, and "
            f"{after:.0%} with {method}."
        )
    acted = sum(pair.was_guided for pair in diagnosis.pairs)
    if acted < count:
        said.append(f"{method} acted for {acted} of {count} seeds; for each other seed, both images are identical.")
    return said


def _uncertainty(diagnosis: DiagnosisData) -> list[str]:
    count, said = len(diagnosis.pairs), list[str]()
    if diagnosis.judged:
        low, high = diagnosis.interval
        said.append(
            f"With {count} {plural('seed', count)}, the share of right images without guidance lies between "
            f"{low:.0%} and {high:.0%} (95% interval)."
        )
        if len(diagnosis.remedies) > 1 and diagnosis.best is not None and count < ENOUGH:
            said.append(
                f"The ranking of the remedies is based on {count} {plural('seed', count)} and may be due to chance. "
                "Generate more seeds before you rely on it."
            )
    said += diagnosis.problems
    return said


def _named(result: RemedyResult) -> str:
    """Name of a remedy for use within a sentence."""
    remedy = result.remedy
    if remedy.kind == "wording":
        return f"the prompt “{remedy.prompt.text}”"
    if remedy.kind == "seed":
        right = [str(run.seed) for run in result.runs if run.verdict is not None and run.verdict.success]
        seeds = right or [str(run.seed) for run in result.runs]
        return f"another seed ({', '.join(seeds[:4])}{', …' if len(seeds) > 4 else ''})"
    return remedy.title[:1].lower() + remedy.title[1:] if remedy.kind == "regions" else remedy.title


def _result(diagnosis: DiagnosisData, best: RemedyResult) -> str:
    count = len(best.runs)
    time = f"{best.cost:.1f} times the generation time"
    if not best.judged:
        return f"bleed {best.bleed:.2f} instead of {bleed(best.plain):.2f}, at {time}"
    low, high = best.interval
    are = "is" if best.right == 1 else "are"
    said = (
        f"{best.right} of {count} {plural('image', count)} {are} right (95% interval {low:.0%} to {high:.0%}) "
        f"instead of {diagnosis.right} of {count}, at {time}"
    )
    return said if not best.broken else f"{said}; it broke {len(best.broken)} of {diagnosis.right} right images"


def _count(diagnosis: DiagnosisData, outcome: Outcome) -> str:
    """Phrase that counts the images with an outcome, and lists their seeds, such as "2 images (seeds 0, 3)"."""
    seeds = [str(pair.seed) for pair in diagnosis.pairs if pair.outcome == outcome]
    if not seeds:
        return "no images"
    shown = ", ".join(seeds[:8]) + (", …" if len(seeds) > 8 else "")
    return f"{len(seeds)} {plural('image', len(seeds))} ({plural('seed', len(seeds))} {shown})"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
