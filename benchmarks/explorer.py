"""Data volume and frame rate of the explorer: ``python -m benchmarks.explorer``.

Builds recordings of 50 steps x 12 layers x 8 tokens at 64x64, 32x32 and 16x16, and prints the bytes sent for one run,
the size of a page with two runs, and, if Chromium and playwright are installed, the time to the first view and the
frames per second while moving through every step. ``--keep FOLDER`` keeps the pages; ``--images docs`` writes the
screenshots of the docs instead.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import numpy as np
import typer
import xarray as xr
from PIL import Image, ImageDraw

import elakit
from elakit.guidance import Trace

PROMPT = "a [red car] beside a [bird]"  # six of eight tokens; the others are start-of-text and the end
IMAGED = "a [green apple] and a [red car]"
MB = 10**6
SIDES = (64, 32, 16)
PAINTS = {"red": "#c0392b", "blue": "#2f6fb5", "green": "#3f8f4f", "white": "#eceae4", "black": "#33363b"}
# Time from the first byte of the page to the first frame with painted maps.
FIRST_VIEW = """() => new Promise((done) => {
  const look = () => document.querySelector(".elx-stage canvas")?.width > 1
    ? requestAnimationFrame(() => done(performance.now())) : requestAnimationFrame(look);
  look();
})"""
# Moves the slider through all steps three times, one step per frame, and returns the duration of each frame.
SCRUB = """async () => {
  const slider = document.querySelector(".elx-transport input[type=range]"), took = [];
  const frame = () => new Promise(requestAnimationFrame);
  await frame();
  let last = performance.now();
  for (let round = 0; round < 3; round++) {
    for (let step = 0; step <= Number(slider.max); step++) {
      slider.value = step;
      slider.dispatchEvent(new Event("input", { bubbles: true }));
      await frame(); // the explorer requested this frame first and has painted it
      const now = performance.now();
      took.push(now - last);
      last = now;
    }
  }
  return took;
}"""


@dataclass(frozen=True)
class Shape:
    """Shape of a synthetic recording.

    Attributes
    ----------
    steps, layers : int
        Number of steps; and number of layers, of which each map size has the same share, half of it in the decoder.
    sides : tuple of int
        Sides of the maps, in locations.
    heads : int
        Number of heads; 1 stands for the mean of heads.
    """

    steps: int = 50
    layers: int = 12
    sides: tuple[int, ...] = SIDES
    heads: int = 1


class _Words:
    """Stand-in for a pipeline's tokenizer, with one token per word."""

    model_max_length = 77

    def __call__(self, text: str, add_special_tokens: bool = True, **options: Any) -> dict[str, list[int]]:
        ids = [2 + sum(word.encode()) for word in text.replace(",", " ,").split()]
        return {"input_ids": [0, *ids, 1] if add_special_tokens else ids}


def synthetic_run(
    text: str = PROMPT, shape: Shape = Shape(), seed: int = 0, *, guided: bool = False, width: int = 512
) -> elakit.Run:
    """Return a synthetic run: blobs of attention that contract over the steps, and an image of them.

    Parameters
    ----------
    text : str
        Prompt with brackets around its entities.
    shape : Shape
    seed : int
    guided : bool
        True if the entities are separate, as with guidance; otherwise their attention bleeds into each other.
    width : int
        Width of the image, whose height is 512.
    """
    random = np.random.default_rng(seed)
    prompt = elakit.parse(text, SimpleNamespace(tokenizer=_Words()))
    count = len(prompt.entities)
    places = [((i + 0.5) / count, 0.5 + 0.16 * math.cos(math.pi * i)) for i in range(count)]
    recording = _recording(prompt, shape, places, random, guided, width / 512)
    trace = None
    if guided:
        trace = Trace("ela", {}, tuple(entity.label for entity in prompt.entities))
        trace.rows += [{"step": step, "skipped": False} for step in range(shape.steps // 2)]
    settings = {"steps": shape.steps, "guidance_scale": 7.5, "height": 512, "width": width, "model": "synthetic"}
    return elakit.Run(
        image=_image(prompt, places, width, guided),
        prompt=prompt,
        seed=seed,
        settings=settings,
        recording=recording,
        guidance=trace,
    )


def _recording(
    prompt: elakit.Prompt,
    shape: Shape,
    places: Sequence[tuple[float, float]],
    random: np.random.Generator,
    guided: bool,
    ratio: float,
) -> elakit.Recording:
    """Return a recording: the softmax over tokens of logits that are blobs, noise and a constant for start-of-text."""
    labels = ["<start>", *(token.label for token in prompt.tokens), "<end>"]
    indices = [0, *(token.index for token in prompt.tokens), -1]
    owner = [_owner(prompt, index) for index in indices]
    nodes, order = {}, 0
    for side in shape.sides:
        rows, columns = side, round(side * ratio)
        y, x = np.mgrid[0.5:rows, 0.5:columns] / np.array([rows, columns])[:, None, None]
        per_size = shape.layers // len(shape.sides)
        values = np.empty((shape.steps, 1, per_size, shape.heads, rows, columns, len(labels)), np.float32)
        for step in range(shape.steps):
            done = step / max(1, shape.steps - 1)
            blobs = [_blob(y, x, *place, 0.34 - 0.2 * done) for place in places]
            for layer in range(per_size):
                logits = 0.3 * random.standard_normal((shape.heads, rows, columns, len(labels)), np.float32)
                logits[..., 0] += 3.0
                logits[..., -1] += 1.5
                for column, entity in enumerate(owner):
                    if entity is not None:
                        others = sum(blob for i, blob in enumerate(blobs) if i != entity)
                        leak = (0.3 if guided else 0.75) * (1 - 0.3 * done)
                        logits[..., column] += (2 + layer) * (blobs[entity] + leak * others)
                weights = np.exp(logits)
                values[step, 0, layer] = weights / weights.sum(-1, keepdims=True)
        names, sides = [], []
        for layer in range(per_size):
            place = "down" if layer < per_size // 2 else "up"
            block = SIDES.index(side) if side in SIDES else 0
            block = block if place == "down" else 3 - block
            names.append(f"{place}_blocks.{block}.attentions.{layer % 2}.transformer_blocks.0.attn2")
            sides.append(place)
        nodes[f"{rows}x{columns}"] = xr.Dataset(
            {"probability": (("step", "image", "layer", "head", "y", "x", "token"), values)},
            coords={
                "step": np.arange(shape.steps),
                "timestep": ("step", np.linspace(981, 1, shape.steps)),
                "sigma": ("step", np.full(shape.steps, np.nan)),
                "layer": names,
                "place": ("layer", sides),
                "order": ("layer", np.arange(order, order + per_size)),
                "head": ["mean"] if shape.heads == 1 else np.arange(shape.heads),
                "token": labels,
                "token_index": ("token", indices),
            },
            attrs={"size": f"{rows}x{columns}"},
        )
        order += per_size
    tree = xr.DataTree.from_dict(nodes)
    tree.attrs = {
        "prompt": json.dumps(prompt.to_dict()),
        "model": "synthetic",
        "calls": shape.steps,
        "expected": shape.steps,
        "averaged": 0,
    }
    return elakit.Recording(tree)


def _owner(prompt: elakit.Prompt, index: int) -> int | None:
    for i, entity in enumerate(prompt.entities):
        if index in (*entity.token_indices, *entity.attribute_indices):
            return i
    return None


def _blob(y: np.ndarray, x: np.ndarray, across: float, down: float, spread: float) -> np.ndarray:
    return np.exp(-((x - across) ** 2 + (y - down) ** 2) / (2 * spread**2)).astype(np.float32)


def _image(prompt: elakit.Prompt, places: Sequence[tuple[float, float]], width: int, guided: bool) -> Image.Image:
    """Return an image with one disc per entity, in its color; without guidance the colors are exchanged."""
    image = Image.new("RGB", (2 * width, 1024), "#dfe6e2")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 700, 2 * width, 1024), fill="#b9c7a8")
    asked = [next((PAINTS[a] for a in entity.attributes if a in PAINTS), "#c08a3e") for entity in prompt.entities]
    if not guided:
        asked = asked[1:] + asked[:1]
    radius = 190 if len(places) < 3 else 95
    for (across, down), paint in zip(places, asked, strict=True):
        center = across * 2 * width, down * 1024
        box = (center[0] - radius, center[1] - radius, center[0] + radius, center[1] + radius)
        draw.ellipse(box, fill=paint, outline="#2b2f33", width=6)
    return image.resize((width, 512), Image.Resampling.LANCZOS)


def measure_page(path: Path, chromium: str) -> tuple[float, list[float]]:
    """Return the milliseconds to the first view, and of each frame while moving through all steps."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.goto(path.as_uri(), wait_until="commit")
            first = float(page.evaluate(FIRST_VIEW))
            return first, [float(each) for each in page.evaluate(SCRUB)]
        finally:
            browser.close()


def shoot(explorer: elakit.Explorer, folder: Path, chromium: str) -> None:
    """Save screenshots of the explorer, light and dark."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as temporary, sync_playwright() as playwright:
        path = explorer.to_html(Path(temporary, "explorer.html"))
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 770}, reduced_motion="reduce")
        page.goto(path.as_uri())
        page.evaluate(FIRST_VIEW)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=folder / f"explorer-{scheme}.png")
        browser.close()


def main(
    images: Annotated[
        Path | None, typer.Option(help="Only write explorer-light.png and explorer-dark.png to this folder.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Folder in which the pages are kept. Default: none is kept.")
    ] = None,
    browse: Annotated[
        bool, typer.Option(help="Measure the first view and the frame rate in headless Chromium.")
    ] = True,
) -> None:
    """Measure the data volume and the frame rate of the explorer, and print them as a table."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if images:
        if chromium is None:
            raise typer.BadParameter("Chromium is not installed; on Debian: apt-get install chromium.")
        pipe = elakit.load("picture-world")
        shown = [elakit.generate(pipe, IMAGED, seed=0, guidance=guidance) for guidance in (None, elakit.ELA())]
        explorer = elakit.explore(*shown)
        explorer.token, explorer.step = "car", 8
        shoot(explorer, images, chromium)
        return
    shape = Shape()
    runs = [synthetic_run(guided=guided, seed=7) for guided in (False, True)]
    recorded = sum(run.recording.nbytes for run in runs if run.recording) / len(runs)
    began = time.perf_counter()
    one = elakit.explore(runs[0])
    seconds = time.perf_counter() - began
    two = elakit.explore(*runs)
    print(f"{shape.steps} steps x {shape.layers} layers x 8 tokens at {SIDES}, {platform.python_version()}\n")
    print("| | measured | limit |")
    print("|---|---|---|")
    print(f"| one run, recorded | {recorded / MB:.1f} MB | |")
    print(f"| one run, maps sent | {len(one._maps) / MB:.2f} MB | 15 MB |")
    print(f"| one run, explore() | {seconds:.1f} s | |")
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        pages = [each.to_html(folder / name) for each, name in ((one, "one.html"), (two, "two.html"))]
        print(f"| two runs, page | {pages[1].stat().st_size / MB:.2f} MB | 12 MB |")
        if not browse or chromium is None:
            return
        for name, page in zip(("one run", "two runs"), pages, strict=True):
            first, frames = measure_page(page, chromium)
            middle, slow = statistics.median(frames), float(np.quantile(frames, 0.95))
            print(f"| {name}, first view | {first:.0f} ms | 1500 ms |")
            rate = f"{1000 / middle:.0f} frames/s (slowest 5%: {1000 / slow:.0f})"
            print(f"| {name}, moving through steps | {rate} | 30 |")


if __name__ == "__main__":
    typer.run(main)
