"""Diagnoses of a tiny pipeline with random weights, with verdicts chosen by the test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
from tiny import tiny_pipeline

from elakit.diagnosis import Diagnosis, Pair
from elakit.generation import generate
from elakit.guidance import ELA, build, options_of
from elakit.judge import Verdict
from elakit.run import Run

PAIR = "a [red car] and a [blue bird]"


def verdict(run: Run, right: bool) -> Verdict:
    """A verdict in which everything is right, or the bird is missing and the car is green."""
    entities = tuple(entity.label for entity in run.prompt.entities)
    asked = {entity.label: entity.attributes[-1] if entity.attributes else None for entity in run.prompt.entities}
    present = {label: right or label != "bird" for label in entities}
    colors = {label: (asked[label] if right else "green") if present[label] else None for label in entities}
    masks = np.zeros((len(entities), 4, 4), bool)
    return Verdict(entities=entities, present=present, colors=colors, asked=asked, masks=masks)


def diagnosis(text: str = PAIR, seeds: int = 1, judged: str = "", length: int = 20, **options: Any) -> Diagnosis:
    """A diagnosis; `judged` says for each seed whether plain and guided are right: "nyyy" for two seeds."""
    pipe, pairs, ela = tiny_pipeline(length=length), [], build(ELA, options)
    for seed in range(seeds):
        runs = [
            generate(pipe, text, seed=seed, steps=4, guidance_scale=3, guidance=guidance, progress=False)
            for guidance in (None, ela)
        ]
        said = [verdict(run, right == "y") for run, right in zip(runs, judged[2 * seed :], strict=False)]
        pairs.append(Pair(*runs, *said))
    return Diagnosis(prompt=runs[0].prompt, method="ela", options=options_of(ela), pairs=tuple(pairs), seconds=12.0)


@cache
def tiny_runs() -> list[Run]:
    """Two plain runs."""
    return generate(tiny_pipeline(), PAIR, seed=[0, 1], steps=2, progress=False)


def judged_run(run: Run, right: bool) -> Run:
    """A copy of a run with a verdict."""
    copy = replace(run)
    copy.__dict__["verdict"] = verdict(run, right)
    return copy
