"""Generation of a unit: its images, judged and measured, as rows of the sweep's table."""

from __future__ import annotations

import io
import time
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from elakit.sweep.options import canonical
from elakit.sweep.units import Unit

# Models are imported by the functions that use them: planning, reports and workers of other functions do without.
if TYPE_CHECKING:
    from PIL import Image

    from elakit.guidance import Trace
    from elakit.judge import Detector, Verdict
    from elakit.run import Run

# Columns that hold the mean of a bleeding measure over steps and entities.
BLEEDING = ("bleed", "intrusion", "spill", "ruzicka", "attribute_bleed")

_lock = Lock()


def generate_unit(unit: Unit, *, keep_images: bool = False) -> list[dict[str, Any]]:
    """Generate the images of a unit in one batch, judge and measure them.

    The pipeline stays loaded in the process until a unit with another model, or with other options of loading it, is
    generated.

    Parameters
    ----------
    unit : Unit
    keep_images : bool
        Also return each image as PNG bytes, in the column "png".

    Returns
    -------
    list of dict
        One row per seed, with the columns of `elakit.sweep.table`.

    Examples
    --------
    >>> rows = generate_unit(Unit("picture-world", "a [cat] and a [lion]", (1, 3), steps=2))
    >>> [(row["seed"], row["method"], row["steps"], row["skipped"]) for row in rows]
    [(1, 'plain', 2, 0), (3, 'plain', 2, 0)]
    """
    from elakit.attention import RecordSpec
    from elakit.generation import generate
    from elakit.prediction import load_predictor

    with _lock:  # threads of one process share the pipeline, which is recorded and guided through hooks
        pipe = _pipeline(unit.model, **unit.loading())
        condition = unit.condition()
        guide_if = load_predictor().guide_if(condition["above"], after=condition["after"]) if condition else None
        began = time.perf_counter()
        runs = generate(
            pipe,
            unit.prompt,
            seed=unit.seeds,
            **unit.generation(),
            guidance=unit.guidance(),
            guide_if=guide_if,
            record=RecordSpec(tokens="entities"),
            progress=False,
        )
        seconds = (time.perf_counter() - began) / len(runs)
        rows = [_row(unit, run, seconds, pipe.device.type) for run in runs]
        return [row | {"png": png(run.image)} for row, run in zip(rows, runs, strict=True)] if keep_images else rows


def png(image: Image.Image) -> bytes:
    """Content of a PNG file with an image."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _row(unit: Unit, run: Run, seconds: float, device: str) -> dict[str, Any]:
    from elakit.judge import is_black, judge
    from elakit.prediction import features

    if run.nsfw or is_black(run.image):
        verdict = None  # a black image (safety checker, overflow in half precision) is not a result of the method
    elif unit.detector is None:
        verdict = run.verdict
    else:
        verdict = judge(run.image, run.prompt, _detector(unit.detector, unit.device))
    overall = run.measure().overall().groupby("measure")["value"].mean()
    return {
        **unit.labels(),
        "seed": run.seed,
        # the values used, where the unit leaves them to the model
        "steps": run.settings["steps"],
        "guidance_scale": run.settings["guidance_scale"],
        "device": device,
        "blocked": run.nsfw,
        "parsed": canonical(run.prompt.to_dict()),
        **_judged(verdict),
        **{name: float(overall.get(name, np.nan)) for name in BLEEDING},
        **_guided(run.guidance),
        "seconds": seconds,
        "features": features(run).to_numpy(np.float32).ravel(),
    }


def _judged(verdict: Verdict | None) -> dict[str, Any]:
    from elakit.judge import FAILURES

    if verdict is None:
        return {}  # columns without a value stay empty
    failures = {name.replace(" ", "_"): name in verdict.failures for name in FAILURES}
    return {
        "success": verdict.success,
        **failures,
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
def _pipeline(model: str, **settings: str | None) -> Any:
    from elakit.models import load
    from elakit.models.library import hide_loading_bars

    hide_loading_bars()  # those of several workers would interleave with each other and with the sweep's own bar
    return load(model, **settings)


@lru_cache(maxsize=1)
def _detector(name: str, device: str | None) -> Detector:
    from elakit.judge.detectors import load_detector

    return load_detector(name, device=device)
