"""A run of a tiny pipeline, and masks of its image in place of those of the judge."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import xarray as xr
from tiny import tiny_pipeline

from elakit.generation import generate
from elakit.judge import Verdict
from elakit.run import Run

PAIR = "a [red car] and a [blue bird]"
STEPS = 4


def seen(masks: Any, labels: tuple[str, ...] = ("car", "bird")) -> xr.DataArray:
    return xr.DataArray(np.asarray(masks, bool), dims=("entity", "y", "x"), coords={"entity": list(labels)})


def generated_run(text: str = PAIR, **options: Any) -> Run:
    return generate(tiny_pipeline(length=60), text, steps=STEPS, guidance_scale=3, progress=False, **options)


def corner(run: Run, labels: tuple[str, ...] = ("car", "bird")) -> xr.DataArray:
    """Masks with the first entity in the upper left quarter of the image and the others absent."""
    masks = np.zeros((len(labels), run.image.height, run.image.width), bool)
    masks[0, : run.image.height // 2, : run.image.width // 2] = True
    return seen(masks, labels)


def embedded(monkeypatch: pytest.MonkeyPatch, text: str = PAIR) -> tuple[Run, list[str]]:
    """A run that claims to come from the built-in model, and a list that collects the prompts of its verdicts."""
    generated, judged = generated_run(text), []
    generated.settings["model"] = "picture-world"

    def judge(image: Any, prompt: Any) -> Verdict:
        assert image is generated.image
        judged.append(prompt.text)
        labels = tuple(entity.label for entity in prompt.entities)
        return Verdict(labels, {}, {}, {}, corner(generated, labels).values)

    monkeypatch.setattr(importlib.import_module("elakit.run"), "judge", judge)
    return generated, judged
