"""Trials of remedies: guidance from the same noise, another seed, another wording, or boxes as regions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from math import ceil, sqrt

from elakit.attention import RecordSpec
from elakit.diagnosis.generation import ImageGenerator
from elakit.diagnosis.remedies import Kind, Remedy, RemedyResult
from elakit.errors import ElakitError, SettingError
from elakit.guidance import ELA, METHODS, Method, without_regions
from elakit.guidance.metadata import options_of
from elakit.guidance.method import check_method
from elakit.guidance.registry import WITHOUT_REGIONS
from elakit.pipeline import Pipeline
from elakit.prediction import FEATURES, Predictor
from elakit.prompt import Prompt, parse
from elakit.rewording import next_to, swapped
from elakit.run import Run

# Remedies that are tried by default, in addition to the method that is always compared.
DEFAULT = ("conform", "ebama", "another-seed", "swapped", "next-to", "regions")
OTHERS = ("another-seed", "swapped", "next-to", "regions")
# Number of seeds to choose from, and the share of their steps after which one is chosen.
CANDIDATES, SHARE = 4, 0.3

_KINDS: dict[str, Kind] = {"another-seed": "seed", "regions": "regions", "swapped": "wording", "next-to": "wording"}
_ENTITIES = RecordSpec(tokens="entities")


class NotApplicable(ElakitError):
    """Raised for a remedy that does not apply to a prompt; the message states the reason."""


def check(remedies: bool | Sequence[str | Method]) -> tuple[str | Method, ...]:
    """Check the names of requested remedies, and return the remedies without duplicates.

    Parameters
    ----------
    remedies : bool or sequence of str or Method
        Requested remedies. Each one is the name of a remedy, such as "swapped", the name of a guidance method, such as
        "ela", or a `Method` object. True stands for the remedies in `DEFAULT`, False for no remedy.

    Returns
    -------
    tuple of str or Method
        The requested remedies in the order given.

    Raises
    ------
    SettingError
        A remedy is unknown, or is the name of a method, such as "boxdiff", that needs regions from the user.

    Examples
    --------
    >>> check(["swapped", "magic"])
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: There is no remedy 'magic'. Choose from ela, ...
    """
    if isinstance(remedies, str):
        remedies = [remedies]
    chosen: Sequence[str | Method] = (DEFAULT if remedies else ()) if isinstance(remedies, bool) else remedies
    for one in chosen:
        if isinstance(one, str) and one in METHODS:
            without_regions(one)
        elif not isinstance(one, str):
            check_method(one, "remedy")
        elif one not in OTHERS:
            raise SettingError(f"There is no remedy {one!r}. Choose from {', '.join((*WITHOUT_REGIONS, *OTHERS))}.")
    return tuple(dict.fromkeys(chosen))


def images_of(remedy: str | Method, seeds: int) -> int:
    """Number of images that a remedy generates for `seeds` plain images.

    The remedy "another-seed" also starts `CANDIDATES` candidates per plain image, which are counted, too.
    """
    return seeds * (1 + CANDIDATES) if remedy == "another-seed" else seeds


def side_by_side(entities: int) -> tuple[tuple[float, float, float, float], ...]:
    """Boxes that divide the image among entities: in one row for up to three entities, otherwise in a grid.

    Parameters
    ----------
    entities : int
        Number of entities.

    Returns
    -------
    tuple of (float, float, float, float)
        One box per entity, row by row: left, top, right and bottom as fractions of the image.

    Examples
    --------
    >>> side_by_side(2)
    ((0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0))
    >>> side_by_side(4)[3]
    (0.5, 0.5, 1.0, 1.0)
    """
    columns = entities if entities <= 3 else ceil(sqrt(entities))
    rows = ceil(entities / columns)
    grid = [divmod(i, columns) for i in range(entities)]
    return tuple(
        (round(x / columns, 4), round(y / rows, 4), round((x + 1) / columns, 4), round((y + 1) / rows, 4))
        for y, x in grid
    )


def guidance_remedy(guidance: Method, prompt: Prompt) -> Remedy:
    """Remedy that generates images of the same prompt with guidance, from the noise of the plain images."""
    summary = inspect.getdoc(type(guidance)) or ""
    return Remedy(
        name=guidance.name,
        kind="guidance",
        what=" ".join(["The same prompt and noise, with guidance.", *summary.splitlines()[:1]]),
        prompt=prompt,
        method=guidance.name,
        options=options_of(guidance),
        guidance=guidance,
    )


def build_remedy(which: str | Method, prompt: Prompt, pipe: Pipeline) -> Remedy:
    """Build a remedy for a prompt.

    Parameters
    ----------
    which : str or Method
        Name of a remedy, such as "swapped", name of a guidance method, such as "ela", or a `Method` object.
    prompt : Prompt
    pipe : diffusers.DiffusionPipeline
        Pipeline whose tokenizer is used if the remedy rewords the prompt.

    Returns
    -------
    Remedy

    Raises
    ------
    NotApplicable
        The remedy does not apply to the prompt.
    SettingError
        `which` is the name of a method, such as "boxdiff", that needs regions from the user.
    PromptError
        The reworded prompt is too long for the text encoder.
    """
    if not isinstance(which, str) or which in METHODS:
        return guidance_remedy(without_regions(which) if isinstance(which, str) else which, prompt)
    if which == "another-seed":
        what = (
            f"For each seed, {CANDIDATES} other seeds are run for {SHARE:.0%} of the steps, and only the most "
            "promising of them is run to the end."
        )
        return Remedy(name=which, kind="seed", what=what, prompt=prompt)
    if which == "regions":
        guidance = ELA(regions=side_by_side(_several(prompt)))
        return Remedy(
            name=which,
            kind="regions",
            what="ELA with one box per entity, in the order of the prompt, side by side or in a grid.",
            prompt=prompt,
            method=guidance.name,
            options=options_of(guidance),
            guidance=guidance,
        )
    _several(prompt)
    text = {"swapped": swapped, "next-to": next_to}[which](prompt)
    if text is None:
        raise NotApplicable(
            "the prompt reads the same with its entities in reverse order."
            if which == "swapped"
            else "the prompt does not join its entities with “and” or a comma."
        )
    reworded = parse(text, pipe)
    return Remedy(name=which, kind="wording", what=f"Prompt “{reworded.text}”.", prompt=reworded)


def try_remedy(
    which: str | Method,
    prompt: Prompt,
    generator: ImageGenerator,
    plain: Sequence[Run],
    plain_seconds: float,
    predictor: Predictor | None = None,
) -> RemedyResult:
    """Generate and judge the images of a remedy; an exception is reported in the result and not raised.

    Parameters
    ----------
    which : str or Method
        Name of a remedy, such as "swapped", name of a guidance method, such as "ela", or a `Method` object.
    prompt : Prompt
        Prompt of the diagnosis, which the remedy may reword.
    generator : ImageGenerator
        Generator that made the plain runs.
    plain : sequence of Run
        Plain runs, with which the runs of the remedy are compared. Every remedy except "another-seed" uses the seeds of
        the plain runs.
    plain_seconds : float
        Generation time of a plain image in seconds. `RemedyResult.cost` is relative to this time.
    predictor : Predictor, optional
        Predictor of failures, by which the remedy "another-seed" chooses seeds. Without a predictor that is `usable`
        for the model, the remedy chooses the seeds whose runs bleed least.

    Returns
    -------
    RemedyResult
        The status of the result is "failed" after an exception, and "not tried" if the remedy does not apply to the
        prompt.
    """
    plain = tuple(plain)
    name = which if isinstance(which, str) else which.name
    remedy = Remedy(name=name, kind=_KINDS.get(name, "guidance"), what="", prompt=prompt)
    try:
        remedy = build_remedy(which, prompt, generator.pipe)
        if remedy.kind == "seed":
            return _other_seeds(remedy, generator, plain, plain_seconds, predictor)
        seeds = [run.seed for run in plain]
        batch = generator.generate(remedy.prompt, seeds, remedy.guidance, what=remedy.title, record=_ENTITIES)
        result = RemedyResult(
            remedy=remedy, plain=plain, runs=batch.runs, seconds=batch.seconds, cost=batch.seconds / plain_seconds
        )
        result.to_dict()  # judges and measures the images here, so that exceptions are caught, too
        return result
    except NotApplicable as error:
        return RemedyResult(remedy, plain, status="not tried", why=str(error))
    except Exception as error:
        why = str(error) if isinstance(error, ElakitError) else f"{type(error).__name__}: {error}"
        return RemedyResult(remedy, plain, status="failed", why=why)


def usable(predictor: Predictor | None, model: str) -> bool:
    """True if a predictor can predict, after 30% of the steps, whether an image of a model will fail.

    The predictor must have been fitted on images of the model, with the features that this version of elakit computes.

    Parameters
    ----------
    predictor : Predictor or None
    model : str
        Name of the model, from `elakit.models.name_of`.
    """
    if predictor is None or SHARE not in predictor.shares or "failure" not in predictor.outcomes:
        return False
    return predictor.features == FEATURES and model in predictor.about.get("model", ())


def _other_seeds(
    remedy: Remedy,
    generator: ImageGenerator,
    plain: tuple[Run, ...],
    plain_seconds: float,
    predictor: Predictor | None,
) -> RemedyResult:
    """For each plain run, choose one of `CANDIDATES` new seeds, and generate the image of the chosen seed.

    Each new seed is run for 30% of the steps (`SHARE`). The seed with the lowest score is chosen. The score is the
    predicted probability of failure or, without a usable predictor, the bleeding.
    """
    count = len(plain)
    first = max(run.seed for run in plain) + 1
    seeds = list(range(first, first + CANDIDATES * count))
    steps = ceil(SHARE * generator.steps - 1e-9)
    trials = generator.generate(remedy.prompt, seeds, what="choosing seeds", record=_ENTITIES, stop_after=steps)
    score: Callable[[Run], float] = _bleed_so_far
    by = "bleeding"
    if predictor is not None and usable(predictor, plain[0].settings["model"]):
        predict = predictor.predict

        def score(run: Run) -> float:
            return float(predict(run)["failure"].iloc[-1])

        by = "predicted probability of failure"
    scores = {run.seed: score(run) for run in trials.runs}
    groups = [seeds[i * CANDIDATES : (i + 1) * CANDIDATES] for i in range(count)]
    best = [min(group, key=scores.__getitem__) for group in groups]
    finished = generator.generate(remedy.prompt, best, what=remedy.title, record=_ENTITIES)
    seconds = finished.seconds + CANDIDATES * trials.seconds
    return RemedyResult(
        remedy=remedy,
        plain=plain,
        runs=finished.runs,
        seconds=seconds,
        cost=seconds / plain_seconds,
        candidates=tuple({"seed": seed, "score": scores[seed], "chosen": seed in best} for seed in seeds),
        chosen_by=by,
    )


def _bleed_so_far(run: Run) -> float:
    return float(run.measure().to_frame().query("measure == 'bleed'")["value"].mean())


def _several(prompt: Prompt) -> int:
    if len(prompt.entities) < 2:
        raise NotApplicable("the prompt names only one entity.")
    return len(prompt.entities)
