"""Diagnose a prompt: draw it, judge and measure it, find why it fails, and try what would fix it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from elakit import causes
from elakit.diagnosis.drawer import Drawer
from elakit.diagnosis.remedies import OTHERS, SHARE, TRIES, Tried, attempt, check, guided, ranked, usable
from elakit.diagnosis.result import Diagnosis, Outcome, Pair
from elakit.errors import ElakitError, OutputError, SettingError
from elakit.generation import Run
from elakit.guidance import METHODS, Method, without_regions
from elakit.guidance.metadata import options_of
from elakit.models import name_of
from elakit.prediction import Predictor, load_predictor
from elakit.prompt import Prompt, parse

__all__ = ["Diagnosis", "Outcome", "Pair", "diagnose"]


def diagnose(
    pipe: Any,
    prompt: str | Prompt,
    *,
    seeds: int | list[int] = 4,
    method: str | Method = "ela",
    remedies: bool | Sequence[str | Method] = False,
    steps: int | None = None,
    guidance_scale: float | None = None,
    predictor: Predictor | None = None,
    batch: int | None = None,
    folder: str | Path | None = None,
    on_progress: Callable[[int, int, str], object] | None = None,
) -> Diagnosis:
    """Draw a prompt plainly and guided, from the same noise, find what goes wrong and why, and try what fixes it.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : str or Prompt
    seeds : int or list of int
        How many seeds (0, 1, ...), or which.
    method : str or Method
        A name in `elakit.guidance.METHODS`, or an instance with options.
    remedies : bool or sequence of str or Method
        What else to try: True for `elakit.diagnosis.DEFAULT`, or names of methods, methods with options,
        "another-seed", "swapped" (the entities in the opposite order), "next-to" (instead of "and"), "regions" (ELA
        with a box for each entity, side by side). Where all plain images are judged right none is tried. One that
        raises is reported as failed, and the others go on.
    steps, guidance_scale : optional
        As in `generate`.
    predictor : Predictor, optional
        Foretells failures and chooses other seeds; by default the one shipped for the model, if there is one.
    batch : int, optional
        Most seeds drawn at a time; by default all for an embedded model, 1 for others. Batches differ from single
        images by the rounding of the arithmetic only.
    folder : str or Path, optional
        Keep every run there as soon as it is drawn, and the diagnosis in the end. Called again with the same folder,
        what is there already is not drawn anew.
    on_progress : callable, optional
        Called with (images done, images in all, what is drawn now) before each batch and after each step.

    Returns
    -------
    Diagnosis

    Raises
    ------
    SettingError
        No seed, an unknown method or remedy.
    OutputError
        The folder cannot be written to, or is of something else.

    Examples
    --------
    >>> import elakit
    >>> pipe = elakit.load("picture-world")
    >>> found = elakit.diagnose(pipe, "a [cat] and a [lion]", seeds=[3], steps=2)
    >>> found.pairs[0].seed, found.judged
    (3, True)
    >>> found = elakit.diagnose(pipe, "a [cat] and a [lion]", seeds=1, steps=2, remedies=["swapped", "regions"])
    >>> sorted(tried.remedy.name for tried in found.remedies)
    ['ela', 'regions', 'swapped']
    """
    parsed = parse(prompt, pipe)
    numbers = _seeds(seeds)
    chosen = _method(method)
    others = [one for one in check(remedies) if _name(one) != chosen.name]
    model = name_of(pipe)
    predictor = predictor or _shipped(model)
    drawer = Drawer(
        pipe, steps=steps, guidance_scale=guidance_scale, batch=batch, folder=folder, on_progress=on_progress
    )
    drawer.expect(2 * len(numbers) + sum(_images(one, len(numbers)) for one in others))
    began = time.perf_counter()
    plain = drawer.draw(parsed, numbers, what="plain")
    guided_runs = drawer.draw(parsed, numbers, chosen, what=_name(chosen))
    pairs = tuple(Pair(a, b, a.verdict, b.verdict) for a, b in zip(plain.runs, guided_runs.runs, strict=True))
    tried = [
        Tried(
            guided(chosen, parsed), plain.runs, guided_runs.runs, guided_runs.seconds,
            guided_runs.seconds / plain.seconds,
        )
    ]  # fmt: skip
    problems: list[str] = []
    found = _findings(pipe, plain.runs, problems)
    if all(pair.plain_verdict is not None and pair.plain_verdict.success for pair in pairs):
        drawer.skip(sum(_images(one, len(numbers)) for one in others))
    else:
        for one in others:
            before = drawer.done
            tried.append(attempt(one, parsed, drawer, plain.runs, plain.seconds, predictor))
            drawer.skip(_images(one, len(numbers)) - (drawer.done - before))
    diagnosis = Diagnosis(
        parsed,
        chosen.name,
        options_of(chosen),
        pairs,
        time.perf_counter() - began,
        found,
        ranked(tried),
        _predicted(plain.runs, predictor, model, problems),
        tuple(problems),
    )
    if folder is not None:
        diagnosis.save(folder)
    return diagnosis


def _seeds(seeds: int | list[int]) -> list[int]:
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise SettingError(f"seeds={seeds!r}: give a number of seeds of 1 or more, or a list of seeds.")
    if len(set(numbers)) < len(numbers):
        raise SettingError(f"seeds={seeds!r}: give each seed once.")
    return numbers


def _method(method: str | Method) -> Method:
    if not isinstance(method, str):
        return method
    if method not in METHODS:
        raise SettingError(f"Unknown method {method!r}. Choose from {', '.join(METHODS)}.")
    chosen: Method = without_regions(method)
    return chosen


def _name(one: str | Method) -> str:
    return one if isinstance(one, str) else one.name


def _images(remedy: str | Method, seeds: int) -> int:
    """Images that a remedy draws, those that are begun only as the share of them that is drawn."""
    return seeds * (1 + TRIES) if remedy == OTHERS[0] else seeds


def _findings(pipe: Any, runs: Sequence[Run], problems: list[str]) -> causes.Findings | None:
    try:
        return causes.find(pipe, runs)
    except Exception as error:  # images that are drawn are worth more than their explanation
        why = str(error) if isinstance(error, ElakitError) else f"{type(error).__name__}: {error}"
        problems.append(f"Causes could not be looked for: {why}")
        return None


def _predicted(runs: Sequence[Run], predictor: Predictor | None, model: str, problems: list[str]) -> dict[int, float]:
    """Probability that each run fails, after `SHARE` of its steps."""
    if predictor is None or not usable(predictor, model):
        return {}
    try:
        tables = [(run.seed, predictor.predict(run)) for run in runs]
    except ElakitError as error:
        problems.append(f"Failure could not be predicted: {error}")
        return {}
    return {seed: float(table.loc[SHARE, "failure"]) for seed, table in tables if SHARE in table.index}


@lru_cache(maxsize=1)
def _shipped(model: str) -> Predictor | None:
    """The predictor that is shipped, where it is for this model."""
    try:
        predictor = load_predictor()
    except OutputError:
        return None
    return predictor if usable(predictor, model) else None
