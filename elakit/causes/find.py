"""From finished runs to findings: failures are counted, signs are weighed, and the likeliest causes named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from elakit.causes.failures import SHOWS, What, seen, suspected
from elakit.causes.findings import Cause, Failure, Findings
from elakit.causes.reading import Place, Reading, place
from elakit.causes.signs import Sign
from elakit.causes.text import text_states
from elakit.causes.weigh import before_the_image, explained, in_attention, ranked, told_once, unknown_words
from elakit.causes.wording import sentence
from elakit.errors import SettingError
from elakit.run import Run


def find(pipe: Any, runs: Sequence[Run]) -> Findings:
    """Find what goes wrong in runs of one prompt, and why.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        That drew them: its text encoder is asked again.
    runs : sequence of Run
        Recorded, of one prompt, a seed each. Four tell much more than one.

    Returns
    -------
    Findings

    Raises
    ------
    SettingError
        No run, or runs of different prompts.
    RecordingError
        A run was not recorded.

    Notes
    -----
    Failures are what the judge sees; where it does not know the prompt they are suspicions from the attention. Causes
    are looked for in the runs that fail, in the text encoder's states and in the attention of the decoder. One is named
    where a number is outside of what right images have. Its confidence falls where something that comes before it
    accounts for it, and where right images of the same prompt show it too.

    Examples
    --------
    The bird's noun is hidden from the image:

    >>> import elakit
    >>> from elakit.attention import Edit, edit
    >>> pipe = elakit.load("picture-world")
    >>> prompt = elakit.parse("a [car] and a [bird]", pipe)
    >>> with edit(pipe, prompt, Edit("bird", scale=0)):
    ...     runs = elakit.generate(pipe, prompt, seed=[1], steps=8, progress=False)
    >>> found = find(pipe, runs)
    >>> found.failures[0].kind, found.causes[0].kind, found.causes[0].entity
    ('missing', 'token ignored', 'bird')
    """
    if not runs:
        raise SettingError("There is no run to look at; draw some: elakit.generate(pipe, prompt, seed=[0, 1, 2, 3]).")
    if len({run.prompt.text for run in runs}) > 1:
        raise SettingError("The runs are of different prompts; give those of one prompt, a seed each.")
    prompt = runs[0].prompt
    readings = [Reading(run) for run in runs]
    judged = all(run.verdict is not None for run in runs)
    wrong = [_wrong(reading, judged) for reading in readings]
    failures = _failures(readings, wrong, judged)
    # Something too many does not make an image wrong, unless nothing else does.
    failing = [i for i, each in enumerate(wrong) if any(what.kind != "spill" for what in each)]
    failing = failing or [i for i, each in enumerate(wrong) if each]
    states = text_states(pipe, prompt)
    causes = unknown_words(runs, states)
    if failing:
        causes += before_the_image(runs, states)
        right = [reading for i, reading in enumerate(readings) if i not in failing]
        causes += in_attention([readings[i] for i in failing], right)
    likeliest = (explained(cause, failures) for cause in ranked(told_once(causes, failures)))
    told = [cause for cause in likeliest if cause.explains or not judged or cause.kind == "ambiguous word"]
    placed = [_placed(readings, cause) for cause in told]
    named = tuple(replace(cause, sentence=sentence(cause)) for cause in placed)
    return Findings(prompt, tuple(run.seed for run in runs), judged, failures, named)


def _wrong(reading: Reading, judged: bool) -> set[What]:
    verdict = reading.run.verdict
    if judged and verdict is not None:
        return seen(verdict, reading.run.prompt)
    return suspected(reading.signs.values())


def _failures(readings: Sequence[Reading], wrong: Sequence[set[What]], judged: bool) -> tuple[Failure, ...]:
    """Each failure with the runs it happens in, the most frequent first."""
    found = []
    for what in dict.fromkeys(what for each in wrong for what in sorted(each)):
        there = [reading for reading, each in zip(readings, wrong, strict=True) if what in each]
        signs = [sign for reading in there if (sign := _shown(reading, what)) is not None]
        clearest = max(signs, key=lambda sign: sign.strength, default=None)
        showing = [reading for reading in there if clearest is not None and clearest.key in reading.signs]
        step, layers, heads = Place() if clearest is None else place(showing, clearest.key)
        taken = "" if clearest is None or clearest.token == what.entity else clearest.token
        found.append(
            Failure(
                what.kind,
                what.entity,
                what.other,
                what.token or taken,
                seeds=tuple(reading.run.seed for reading in there),
                of=len(readings),
                step=step,
                layers=layers,
                heads=heads,
                judged=judged,
            )
        )
    return tuple(sorted(found, key=lambda failure: -failure.count))


def _shown(reading: Reading, what: What) -> Sign | None:
    """The strongest sign in a run's attention that shows a failure."""
    kinds = SHOWS[what.kind]
    fitting = [
        sign
        for sign in reading.signs.values()
        if sign.kind in kinds
        and sign.strength > 0
        and (what.entity == sign.entity or (what.entity == sign.other and what.kind != "missing"))
    ]
    return max(fitting, key=lambda sign: sign.strength, default=None)


def _placed(readings: Sequence[Reading], cause: Cause) -> Cause:
    """The cause with the step and the layers in which it starts to show; one before the image has none."""
    key = cause.kind, cause.entity, cause.other, cause.token
    showing = [reading for reading in readings if reading.run.seed in cause.seeds and key in reading.signs]
    if not showing or "length" in cause.evidence:
        return cause
    step, layers, _ = place(showing, key)
    return replace(cause, step=step, layers=layers)
