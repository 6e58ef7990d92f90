"""Find the failures of finished runs and their most likely causes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from elakit.causes.failures import SHOWS, Observation, seen, suspected
from elakit.causes.findings import FAILURE_KINDS, Cause, Failure, Findings
from elakit.causes.indicators import Indicator
from elakit.causes.ranking import before_the_image, explained, in_attention, ranked, unknown_words, without_duplicates
from elakit.causes.run_indicators import Onset, RunIndicators, onset
from elakit.causes.sentences import sentence
from elakit.causes.text import text_states
from elakit.errors import SettingError
from elakit.pipeline import Pipeline
from elakit.run import Run


def find(pipe: Pipeline, runs: Sequence[Run]) -> Findings:
    """Find the failures in runs of one prompt, and their causes.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        The pipeline that generated the runs; its text encoder is used again.
    runs : sequence of Run
        Recorded runs of one prompt with different seeds. Four are much more informative than one.

    Returns
    -------
    Findings
        Failures with their frequency, and causes with their confidence; ``print`` shows both as text. The kinds of
        failures are listed in `elakit.causes.FAILURE_KINDS`, the kinds of causes in `elakit.causes.CAUSE_KINDS`.

    Raises
    ------
    SettingError
        There is no run, the runs have different prompts, or two runs have the same seed.
    RecordingError
        A run was not recorded, or the tokens of an entity or attribute were not recorded.
    ModelError
        The pipeline's family is not supported.

    Notes
    -----
    The judge finds the failures in the images. If one or more runs have no verdict of a judge, the failures of all runs
    are inferred from the attention instead, and `Findings.judged` is False.

    If a run fails, causes are searched for in the text states and in the attention of the runs that fail. In a U-Net,
    the decoder is read; in a transformer, all layers are read. A cause is reported if it explains one of the failures.
    In addition, the number that indicates the cause must be clearly outside the range of right images (calibrated on
    picture-world).

    The cause "ambiguous word" is reported even if no run fails. If all runs come from a built-in model, an ambiguous
    word is a noun outside the model's vocabulary. Otherwise, an ambiguous word is a noun that the tokenizer splits.

    The confidence in a cause is reduced in three cases: another cause may have led to this cause; only some of the
    failing runs show the cause; or right images of the same prompt show the cause, too.

    Examples
    --------
    The attention to the noun "bird" is set to zero. The failure is then that the bird is missing, and the cause is that
    the denoiser ignores the token "bird":

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
        raise SettingError(
            "No run is given; give runs, such as elakit.generate(pipe, prompt, seed=[0, 1, 2, 3]) returns."
        )
    if len({run.prompt.text for run in runs}) > 1:
        raise SettingError("The runs have different prompts; give runs of one prompt with different seeds.")
    seeds = [run.seed for run in runs]
    if twice := [seed for seed in seeds if seeds.count(seed) > 1]:
        raise SettingError(
            f"Several runs have the seed {twice[0]}; give one run per seed, such as the plain runs alone."
        )
    prompt = runs[0].prompt
    readings = [RunIndicators(run) for run in runs]
    judged = all(run.verdict is not None for run in runs)
    wrong = [_wrong(reading, judged) for reading in readings]
    failures = _failures(readings, wrong, judged)
    # A duplicated entity counts as a failure only if no image has a failure of another kind.
    failing = [i for i, each in enumerate(wrong) if any(what.kind != "duplicated" for what in each)]
    failing = failing or [i for i, each in enumerate(wrong) if each]
    states = text_states(pipe, prompt)
    causes = unknown_words(runs, states)
    if failing:
        causes += before_the_image(runs, states)
        right = [reading for i, reading in enumerate(readings) if i not in failing]
        causes += in_attention([readings[i] for i in failing], right)
    explaining = [cause for cause in (explained(cause, failures) for cause in causes) if _is_reported(cause)]
    timed = [_with_onset(readings, cause) for cause in ranked(without_duplicates(explaining, failures))]
    named = tuple(replace(cause, sentence=sentence(cause)) for cause in timed)
    return Findings(
        prompt=prompt, seeds=tuple(run.seed for run in runs), judged=judged, failures=failures, causes=named
    )


def _is_reported(cause: Cause) -> bool:
    """True if a cause explains a failure, or has the kind "ambiguous word"."""
    return bool(cause.explains) or cause.kind == "ambiguous word"


def _wrong(reading: RunIndicators, judged: bool) -> set[Observation]:
    verdict = reading.run.verdict
    if judged and verdict is not None:
        return seen(verdict, reading.run.prompt)
    return suspected(reading.indicators.values())


def _failures(
    readings: Sequence[RunIndicators], wrong: Sequence[set[Observation]], judged: bool
) -> tuple[Failure, ...]:
    """Failures of all runs, the most frequent first; equally frequent failures are in the order of `FAILURE_KINDS`.

    Parameters
    ----------
    readings : sequence of RunIndicators
        Indicators of each run.
    wrong : sequence of set of Observation
        Failures of each run, in the order of `readings`.
    judged : bool
        True if a judge found the failures, False if they are suspected from the attention.
    """

    def order(what: Observation) -> tuple[int, Observation]:
        return FAILURE_KINDS.index(what.kind), what

    found = []
    for what in sorted(set().union(*wrong), key=order):
        there = [reading for reading, each in zip(readings, wrong, strict=True) if what in each]
        indicators = [indicator for reading in there if (indicator := _shown(reading, what)) is not None]
        clearest = max(indicators, key=lambda indicator: indicator.strength, default=None)
        showing = [reading for reading in there if clearest is not None and clearest.key in reading.indicators]
        step, layers, heads = Onset() if clearest is None else onset(showing, clearest.key)
        taken = "" if clearest is None or clearest.token == what.entity else clearest.token
        found.append(
            Failure(
                kind=what.kind,
                entity=what.entity,
                other=what.other,
                token=what.token or taken,
                seeds=tuple(reading.run.seed for reading in there),
                of=len(readings),
                step=step,
                layers=layers,
                heads=heads,
                judged=judged,
            )
        )
    return tuple(sorted(found, key=lambda failure: -failure.count))


def _shown(reading: RunIndicators, what: Observation) -> Indicator | None:
    """Indicator that shows a failure most strongly; None if no indicator of the failure has a strength above 0.

    Parameters
    ----------
    reading : RunIndicators
        Indicators in the attention of the run that fails.
    what : Observation
        The failure.
    """
    kinds = SHOWS[what.kind]
    fitting = [
        indicator
        for indicator in reading.indicators.values()
        if indicator.kind in kinds
        and indicator.strength > 0
        and (what.entity == indicator.entity or (what.entity == indicator.other and what.kind != "missing"))
    ]
    return max(fitting, key=lambda indicator: indicator.strength, default=None)


def _with_onset(readings: Sequence[RunIndicators], cause: Cause) -> Cause:
    """Copy of a cause with the step and the layers in which the cause is first visible in the attention.

    A cause that was found in the text encoder is returned unchanged. A cause that none of the runs shows is also
    returned unchanged. `readings` contains the indicators of each run.
    """
    key = cause.kind, cause.entity, cause.other, cause.token
    showing = [reading for reading in readings if reading.run.seed in cause.seeds and key in reading.indicators]
    if not showing or cause.in_text_encoder:
        return cause
    step, layers, _ = onset(showing, key)
    return replace(cause, step=step, layers=layers)
