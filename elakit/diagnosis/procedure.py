"""Diagnosis of a prompt: generate, judge and measure images, find failures and causes, and try remedies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

from elakit import causes
from elakit.diagnosis.data import Pair
from elakit.diagnosis.generation import ImageGenerator
from elakit.diagnosis.remedies import RemedyResult, ranked
from elakit.diagnosis.result import Diagnosis
from elakit.diagnosis.trials import SHARE, check, guidance_remedy, images_of, try_remedy, usable
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.guidance import METHODS, Method, without_regions
from elakit.guidance.metadata import options_of
from elakit.guidance.method import check_method
from elakit.guidance.registry import WITHOUT_REGIONS
from elakit.models import name_of
from elakit.pipeline import Pipeline
from elakit.prediction import Predictor, load_predictor
from elakit.prompt import Prompt, parse
from elakit.run import Run
from elakit.seeds import seed_list


def diagnose(
    pipe: Pipeline,
    prompt: str | Prompt,
    *,
    seeds: Sequence[int] = range(4),
    method: str | Method = "ela",
    remedies: bool | Sequence[str | Method] = False,
    steps: int | None = None,
    guidance_scale: float | None = None,
    negative_prompt: str | None = None,
    height: int | None = None,
    width: int | None = None,
    predictor: Predictor | None = None,
    batch: int | None = None,
    folder: str | Path | None = None,
    on_progress: Callable[[int, int, str], object] | None = None,
) -> Diagnosis:
    """Generate images of a prompt with and without guidance, find failures and their causes, and try remedies.

    For each seed, the images with and without guidance start from the same noise.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : str or Prompt
        Prompt as text, in which brackets may mark the entities, or as the result of `elakit.parse`.
    seeds : sequence of int
        Distinct seeds of the images.
    method : str or Method
        Guidance method: the name of a method in `elakit.guidance.METHODS`, or a method with options, such as
        ``elakit.ELA(regions=...)``. The method itself is always one of the remedies.
    remedies : bool or sequence of str or Method
        Remedies to try in addition to `method`. True stands for `elakit.diagnosis.DEFAULT`, False for no remedy. A
        sequence may contain names of methods, methods with options, and these names:

        - "another-seed": the most promising of several other seeds.
        - "swapped": entities in the opposite order.
        - "next-to": "next to" instead of "and" in the prompt.
        - "regions": ELA with one box per entity.

        If all images without guidance are judged right, no remedy besides `method` is tried. If a remedy raises an
        exception, the result of this remedy reports it, and the next remedy is tried.
    steps, guidance_scale, negative_prompt, height, width : optional
        As in `elakit.generate`. Default: the settings of the model, and no negative prompt.
    predictor : Predictor, optional
        Predictor of failures. Its predictions for the plain images are stored in `Diagnosis.predicted`. The remedy
        "another-seed" also chooses seeds with the predictor. Default: the included predictor, if it was fitted on this
        model.
    batch : int, optional
        Largest number of seeds per batch. By default, a built-in model generates all seeds in one batch, and other
        models generate one image at a time. Images of a batch differ from single images only by rounding.
    folder : str or Path, optional
        Folder in which each run is stored as soon as it is generated. At the end, the diagnosis is stored there, too. A
        later call with the same folder reuses the stored runs.
    on_progress : callable, optional
        Called with (images done, images in total, current activity) before each batch and after each step.

    Returns
    -------
    Diagnosis

    Raises
    ------
    SettingError
        `seeds` is not a list of distinct seeds; the method or a remedy is unknown; a method that needs regions from the
        user, such as "boxdiff", is given by name; or a setting is outside its range.
    PromptError
        The prompt names no entity, or is too long for the text encoder.
    ModelError
        The pipeline's family is not supported.
    OutputError
        The folder cannot be written to, or contains files that do not belong to a diagnosis.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> found = elakit.diagnose(pipe, "a [cat] and a [lion]", seeds=[3], steps=2)
    >>> found.pairs[0].seed, found.judged
    (3, True)

    The results of the remedies include the result of the method:

    >>> found = elakit.diagnose(pipe, "a [cat] and a [lion]", seeds=[0], steps=2, remedies=["swapped", "regions"])
    >>> sorted(result.remedy.name for result in found.remedies)
    ['ela', 'regions', 'swapped']
    """
    numbers = seed_list(seeds)
    chosen = _method(method)
    others = [one for one in check(remedies) if _name(one) != chosen.name]
    parsed = parse(prompt, pipe)
    model = name_of(pipe)
    predictor = predictor or _shipped(model)
    generator = ImageGenerator(
        pipe, steps=steps, guidance_scale=guidance_scale, negative_prompt=negative_prompt, height=height, width=width,
        batch=batch, folder=folder, on_progress=on_progress,
    )  # fmt: skip
    generator.expect(2 * len(numbers) + sum(images_of(one, len(numbers)) for one in others))
    began = time.perf_counter()
    plain = generator.generate(parsed, numbers, what="plain")
    guided = generator.generate(parsed, numbers, chosen, what=chosen.name)
    pairs = tuple(
        Pair(plain=a, guided=b, plain_verdict=a.verdict, guided_verdict=b.verdict)
        for a, b in zip(plain.runs, guided.runs, strict=True)
    )
    results = [
        RemedyResult(
            remedy=guidance_remedy(chosen, parsed),
            plain=plain.runs,
            runs=guided.runs,
            seconds=guided.seconds,
            cost=guided.seconds / plain.seconds,
        )
    ]
    problems: list[str] = []
    findings = _findings(pipe, plain.runs, problems)
    if all(pair.plain_verdict is not None and pair.plain_verdict.success for pair in pairs):
        generator.expect(-sum(images_of(one, len(numbers)) for one in others))
    else:
        for one in others:
            before = generator.done
            results.append(try_remedy(one, parsed, generator, plain.runs, plain.seconds, predictor))
            generator.expect(generator.done - before - images_of(one, len(numbers)))
    diagnosis = Diagnosis(
        prompt=parsed,
        method=chosen.name,
        options=options_of(chosen),
        pairs=pairs,
        seconds=time.perf_counter() - began,
        findings=findings,
        remedies=ranked(results),
        predicted=_predicted(plain.runs, predictor, model, problems),
        problems=tuple(problems),
    )
    if folder is not None:
        diagnosis.save(folder)
    return diagnosis


def _method(method: str | Method) -> Method:
    if not isinstance(method, str):
        return check_method(method, "method")
    if method not in METHODS:
        raise SettingError(f"There is no method {method!r}. Choose from {', '.join(WITHOUT_REGIONS)}.")
    chosen: Method = without_regions(method)
    return chosen


def _name(one: str | Method) -> str:
    return one if isinstance(one, str) else one.name


def _findings(pipe: Pipeline, runs: Sequence[Run], problems: list[str]) -> causes.Findings | None:
    try:
        return causes.find(pipe, runs)
    except Exception as error:  # the images are worth keeping without an explanation
        why = str(error) if isinstance(error, ElakitError) else f"{type(error).__name__}: {error}"
        problems.append(f"The search for causes failed: {why}")
        return None


def _predicted(runs: Sequence[Run], predictor: Predictor | None, model: str, problems: list[str]) -> dict[int, float]:
    """Predicted probability that the image of each run fails, as a dictionary by seed.

    The prediction uses the first 30% of the steps (`SHARE`). The dictionary is empty without a predictor that is
    `usable` for the model, and if the prediction fails. The message of a failed prediction is added to `problems`.
    """
    if predictor is None or not usable(predictor, model):
        return {}
    try:
        tables = [(run.seed, predictor.predict(run)) for run in runs]
    except ElakitError as error:
        problems.append(f"The prediction of failures failed: {error}")
        return {}
    return {seed: float(table.loc[SHARE, "failure"]) for seed, table in tables if SHARE in table.index}


@lru_cache(maxsize=1)
def _shipped(model: str) -> Predictor | None:
    """Failure predictor that is part of elakit, or None if that predictor is not `usable` for the model."""
    try:
        predictor = load_predictor()
    except OutputError:
        return None
    return predictor if usable(predictor, model) else None
