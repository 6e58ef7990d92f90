"""Images of every figure for the docs: ``python -m benchmarks.gallery`` writes docs/gallery/*.png.

The runs are generated with picture-world. The comparison of methods needs a small sweep, which is stored in the folder
``--sweep`` and resumed if it exists. Chromium renders the plotly figures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import plotly.graph_objects as go
import typer

import elakit
from elakit import causes, plot, sweep
from notebooks.static_figures import image, open_page

ROOT = Path(__file__).parents[1]
PROMPT, SEED = "a [green apple] and a [red car]", 0
METHODS = ["plain", "ela", "regional-attention", "ebama", "conform"]
PAIRS = ("a green apple and a red car", "a red car and a blue bird", "a bear and a blue clock")
SEEDS = [1, 3, 5, 7]
SUITE, PROMPTS, SWEEP_SEEDS = "attend-and-excite", 12, [1]


def figures(folder: Path) -> Iterator[tuple[str, go.Figure]]:
    """Yield the name and the figure of each image."""
    pipe = elakit.load("picture-world")
    spec = elakit.RecordSpec(heads="all")
    prompt = elakit.parse(PROMPT, pipe)
    plain = elakit.generate(pipe, prompt, seed=SEED, record=spec)
    ela = elakit.generate(pipe, prompt, seed=SEED, record=spec, guidance=elakit.ELA())
    yield "images", plot.images(plain, ela)
    yield "token-maps", plot.token_maps(plain)
    yield "entity-maps", plot.entity_maps(plain, ela)
    yield "region-evolution", plot.region_evolution(plain)
    yield "region-animation", shown_at(plot.region_animation(ela), len(ela.regions.step) // 2)
    yield "leakage", plot.leakage(plain, ela)
    yield "leakage-attributes", plot.leakage(plain, attributes=True)
    yield "bleeding-over-steps", plot.bleeding_over_steps(plain, ela)
    yield "agreement", plot.agreement(plain)
    table = causes.profile(plain)
    yield "bleeding-by-head", plot.bleeding_by_layer(table)
    yield "bleeding-by-step", plot.bleeding_by_layer(table, "intrusion", across="step")
    yield "pairs", pairs(pipe)
    found = sweep.table(swept(folder))
    yield "method-comparison", plot.method_comparison(sweep.summary(found))
    yield "sweep-failures", sweep.figures(found)["failures"]


def pairs(pipe: Any) -> go.Figure:
    """Return one row of plain and one row of guided images from the same noise for each prompt of `PAIRS`."""
    drawn = [
        (name, run)
        for text in PAIRS
        for name, guidance in (("plain", None), ("ELA", elakit.ELA()))
        for run in elakit.generate(pipe, text, seed=SEEDS, guidance=guidance, record=False, progress=False)
    ]
    names = [f"{name}, seed {run.seed}" for name, run in drawn]
    return plot.images(*(run for _, run in drawn), names=names, columns=len(SEEDS), panel=150, title="")


def swept(folder: Path) -> Path:
    """Return the folder of a small sweep, after generating its missing units."""
    prompts = {SUITE: sweep.spread(sweep.suite(SUITE), PROMPTS)}
    sweep.run(sweep.plan(prompts, seeds=SWEEP_SEEDS, methods=METHODS), folder)
    return folder


def shown_at(figure: go.Figure, frame: int) -> go.Figure:
    """Return an animation that opens at one of its frames."""
    shown = figure.frames[frame]
    for place, trace in zip(shown.traces, shown.data, strict=True):
        figure.data[place].update(z=trace.z)
    figure.layout.sliders[0].active = frame
    return figure


def main(
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = ROOT / "docs" / "gallery",
    folder: Annotated[Path, typer.Option("--sweep", help="Folder of the small sweep, which is resumed.")] = (
        ROOT / "work" / "gallery-sweep"
    ),
    only: Annotated[str, typer.Option(help="Write only the figures whose names contain this text.")] = "",
) -> None:
    """Write images of all figures, and print the size of each."""
    out.mkdir(parents=True, exist_ok=True)
    with open_page() as page:
        for name, figure in figures(folder):
            if only in name:
                (out / f"{name}.png").write_bytes(image(page, json.loads(figure.to_json())))
                print(f"{name}.png: {(out / f'{name}.png').stat().st_size / 1000:.0f} kB", flush=True)
    print(f"all: {sum(path.stat().st_size for path in out.glob('*.png')) / 1e6:.2f} MB")


if __name__ == "__main__":
    typer.run(main)
