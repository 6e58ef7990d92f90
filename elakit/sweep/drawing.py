"""Draw a unit: its images, judged and measured, as rows of the sweep's table."""

from __future__ import annotations

import time
from functools import lru_cache
from threading import Lock
from typing import Any

import diffusers
import numpy as np
import transformers

from elakit.attention import RecordSpec
from elakit.generation import Run, generate
from elakit.guidance import Trace
from elakit.judge import FAILURES, Detector, Verdict, judge
from elakit.judge.detectors import load_detector
from elakit.models import load
from elakit.prediction import features, load_predictor
from elakit.sweep.units import Unit

# Columns that are means of a measure of bleeding over steps and entities.
BLEEDING = ("bleed", "intrusion", "spill", "ruzicka", "attribute_bleed")

_lock = Lock()


def draw(unit: Unit) -> list[dict[str, Any]]:
    """Draw a unit's seeds in one batch, judge and measure them.

    The model is loaded once a process, and stays loaded until another is asked for.

    Parameters
    ----------
    unit : Unit

    Returns
    -------
    list of dict
        One row a seed; the columns are those of `elakit.sweep.table`.

    Examples
    --------
    >>> rows = draw(Unit("picture-world", "a [cat] and a [lion]", (1, 3), steps=2))
    >>> [(row["seed"], row["method"], row["steps"], row["skipped"]) for row in rows]
    [(1, 'plain', 2, 0), (3, 'plain', 2, 0)]
    """
    with _lock:  # threads of one process share the pipeline, which is recorded and guided by hooks
        pipe = _pipeline(unit.model, unit.device, unit.dtype)
        only_if = unit.only_if()
        guide_if = load_predictor().guide_if(only_if["above"], after=only_if["after"]) if only_if else None
        began = time.perf_counter()
        runs = generate(
            pipe,
            unit.prompt,
            seed=unit.seeds,
            steps=unit.steps,
            guidance_scale=unit.guidance_scale,
            guidance=unit.guidance(),
            guide_if=guide_if,
            record=RecordSpec(tokens="entities"),
            progress=False,
        )
        seconds = (time.perf_counter() - began) / len(runs)
        return [_row(unit, run, seconds) for run in runs]


def _row(unit: Unit, run: Run, seconds: float) -> dict[str, Any]:
    if unit.detector is None:
        verdict = run.verdict
    else:
        verdict = judge(run.image, run.prompt, _detector(unit.detector, unit.device))
    overall = run.measure().overall().groupby("measure")["value"].mean()
    return {
        **unit.labels(),
        "seed": run.seed,
        # what the model chose where the unit does not say
        "steps": run.settings["steps"],
        "guidance_scale": run.settings["guidance_scale"],
        **_judged(verdict),
        **{name: float(overall.get(name, np.nan)) for name in BLEEDING},
        **_guided(run.guidance),
        "seconds": seconds,
        "features": features(run).to_numpy(np.float32).ravel(),
    }


def _judged(verdict: Verdict | None) -> dict[str, Any]:
    if verdict is None:
        return {}  # columns without a value are empty
    wrong = {name.replace(" ", "_"): name in verdict.failures for name in FAILURES}
    return {
        "success": verdict.success,
        **wrong,
        "extra": len(verdict.extra),
        "present": float(np.mean(list(verdict.present.values()))),
        "score": float(np.mean([thing.score for thing in verdict.things])) if verdict.things else np.nan,
    }


def _guided(trace: Trace | None) -> dict[str, Any]:
    rows = trace.rows if trace else []
    return {
        "loss_first": float(rows[0]["loss"]) if rows else np.nan,
        "loss_last": float(rows[-1]["loss"]) if rows else np.nan,
        "skipped": trace.skipped if trace else 0,
        "refinements": sum(int(row["refinements"]) for row in rows),
    }


@lru_cache(maxsize=1)
def _pipeline(model: str, device: str | None, dtype: str | None) -> Any:
    # loading bars of many workers would run into each other, and into the sweep's own
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return load(model, device=device, dtype=dtype)


@lru_cache(maxsize=1)
def _detector(name: str, device: str | None) -> Detector:
    return load_detector(name, device=device)
