"""Script of a project that uses elakit: mypy checks it with --strict, and nothing runs it (see test_typing.py)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import xarray as xr
from PIL import Image

import elakit
from elakit.guidance import RegionalAttention


def attention_of(pipe: elakit.Pipeline, prompt: elakit.Prompt) -> xr.DataArray:
    with elakit.record(pipe, prompt, elakit.RecordSpec(steps=2, sizes=16)) as recording:
        pipe(prompt.text, num_inference_steps=4)
    labels: list[str] = [entity.label for entity in prompt.entities]
    return recording.maps(labels, size=16)


def main(folder: Path) -> None:
    pipe = elakit.load("picture-world", device="cpu")
    prompt = elakit.parse("a [red car] and a [blue bird]", pipe)
    maps: xr.DataArray = attention_of(pipe, prompt)
    plain: elakit.Run = elakit.generate(pipe, prompt, seed=1, steps=20, progress=False)
    guided: elakit.Run = elakit.generate(pipe, prompt, seed=1, guidance=elakit.ELA(size=16))
    several: list[elakit.Run] = elakit.generate(pipe, prompt, seed=[1, 2], guidance=RegionalAttention())
    image: Image.Image = guided.image
    bleeding: elakit.Bleeding = plain.bleeding
    table: pd.DataFrame = bleeding.to_frame()
    figure: go.Figure = elakit.plot.region_evolution(guided)
    found: elakit.Diagnosis = elakit.diagnose(pipe, prompt, seeds=range(2))
    again: elakit.Run = elakit.open_run(plain.save(folder / "run"))
    print(maps.sizes, len(several), image.size, table, figure, found.causes, again.seed)


def refused(pipe: elakit.Pipeline) -> None:
    """Errors that mypy must find: with --strict, an ignore without an error is an error."""
    elakit.generate("picture-world", "a [cat]")  # type: ignore[call-overload]
    elakit.generate(pipe, 3)  # type: ignore[call-overload]
    elakit.ELA(size="16")  # type: ignore[arg-type]
    elakit.no_such_name  # type: ignore[attr-defined]  # noqa: B018
