"""Maps, time and memory of elakit and attention-map-diffusers 1.0 (AMD), on every family that elakit records.

Both record the attention of the image to the text, of every head, layer and step, from the same noise: elakit to the
words of the prompt, attention-map-diffusers to all positions. The maps of the words are compared. The pipelines are
those of the tests: real classes with random weights and few channels. Families that attention-map-diffusers refuses are
listed below the table with its message. From the root of the repository, in an environment with elakit and its test
dependencies::

    pip install attention-map-diffusers==1.0.0
    python -m benchmarks.parity_amd  # --side, --steps, --repeats, --family
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tiny
import tiny_families

import elakit
from benchmarks.shapes import MB, machine
from elakit.attention import RecordSpec
from elakit.models import adapter_for

TEXT = "a [red car] and a [blue giraffe]"
# Without classifier-free guidance, one denoiser call per step has one row, which sees the prompt.
PLAIN = {"guidance_scale": 1.0}
# Builder, and further arguments of the call.
FAMILIES: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Stable Diffusion 1.x/2.x": (tiny.tiny_pipeline, PLAIN),
    "Stable Diffusion XL": (tiny.tiny_sdxl, PLAIN),
    "PixArt-Alpha/Sigma": (tiny.tiny_pixart, PLAIN | {"use_resolution_binning": False}),
    "Stable Diffusion 3/3.5": (tiny.tiny_sd3, PLAIN),
    "FLUX.1": (tiny.tiny_flux, {}),
} | {name: (make, PLAIN) for name, make in tiny_families.BUILDERS.items()}
OPTIONS: dict[str, dict[str, Any]] = {
    "FLUX.2": {},
    "Z-Image": {"guidance_scale": 0.0},
    "Sana": PLAIN | {"use_resolution_binning": False},
    "FLUX.1 Kontext": {"image": Image.new("RGB", (128, 128), "teal"), "_auto_resize": False},
}
FAMILIES |= {name: (FAMILIES[name][0], options) for name, options in OPTIONS.items()}
# attention-map-diffusers reads CogView3-Plus as a video model, because it has the attention processor of CogVideoX.
RELATIONS = {"CogView3-Plus": "video->text"}
TOLERANCE = 1e-5


def main() -> int:
    """Print one row per family, and return 1 if any maps differ by more than `TOLERANCE`, else 0."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("::\n", ":\n"), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=128, help="height and width of the images in pixels")
    parser.add_argument("--steps", type=int, default=4, help="number of denoising steps")
    parser.add_argument("--repeats", type=int, default=5, help="number of runs of each kind, in turn")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="family to measure; by default all")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"{options.steps} steps, {options.side} pixels, float32 on {machine('cpu')}; ", end="")
    print(f"CPU time of the run and of all its maps relative to the plain run, median of {options.repeats} runs\n")
    columns = ["family", "largest difference", "layers: elakit, AMD", "images unchanged", "time: elakit", "AMD"]
    columns += ["MB of maps: elakit", "AMD"]
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    worst, refused = 0.0, []
    for name in options.family or FAMILIES:
        if reason := refusal(name):
            refused.append(f"{name}: {reason}")
            continue
        difference, cells = compare(name, options.side, options.steps, options.repeats)
        worst = max(worst, difference)
        print(f"| {name} | {difference:.1g} | {' | '.join(cells)} |", flush=True)
    print("\nRefused by attention-map-diffusers:\n" * bool(refused) + "\n".join(refused))
    return int(worst > TOLERANCE)


def refusal(name: str) -> str | None:
    """Message with which attention-map-diffusers refuses a family; None if it records the family."""
    try:
        with capture_of(name, FAMILIES[name][0]()):
            return None
    except RuntimeError as error:
        return str(error)


def capture_of(name: str, pipe: Any) -> Any:
    """Capture of attention-map-diffusers with every head, layer and step of the attention to the text."""
    from attention_map_diffusers import AttentionCapture

    return AttentionCapture(pipe, relations=relation_of(name), timesteps="all", heads="all")


def relation_of(name: str) -> str:
    """Name that attention-map-diffusers has for the attention of the image to the text in a family."""
    return RELATIONS.get(name, "image->text")


def compare(name: str, side: int, steps: int, repeats: int) -> tuple[float, list[str]]:
    """Largest difference between the two packages' maps of a family, and its other columns in the table."""
    make, call = FAMILIES[name]
    if "image" in call:  # Kontext computes the image's size from its area
        call = call | {"max_area": side**2}
    pipe = make()
    prompt = elakit.parse(TEXT, pipe)
    spec = RecordSpec(heads="all", dtype="float32")

    def draw() -> np.ndarray:
        settings = {"num_inference_steps": steps, "height": side, "width": side, "output_type": "np"}
        generator = torch.Generator().manual_seed(0)
        image: np.ndarray = pipe(prompt=prompt.text, generator=generator, **settings, **call).images
        return image

    def ours() -> tuple[np.ndarray, Any]:
        with elakit.record(pipe, prompt, spec) as recording:
            return draw(), recording

    def theirs() -> tuple[np.ndarray, Any]:
        with capture_of(name, pipe) as capture:
            image = draw()
        return image, capture.compute()

    seconds: dict[str, list[float]] = defaultdict(list)
    found: dict[str, Any] = {}
    for way in (draw, ours, theirs):  # hooks and processors are made for the first time
        way()
    for _ in range(repeats):
        for way, run in (("plain", lambda: (draw(), None)), ("elakit", ours), ("AMD", theirs)):
            began = time.process_time()
            found[way] = run()
            seconds[way].append(time.process_time() - began)
    ratios = [
        statistics.median(a / b for a, b in zip(seconds[way], seconds["plain"], strict=True))
        for way in ("elakit", "AMD")
    ]
    recording = found["elakit"][1]
    records = [one for one in found["AMD"][1] if one.relation == relation_of(name)]
    kept = sum(one.data.numel() * one.data.element_size() for one in records)
    same = ["yes" if np.array_equal(found["plain"][0], found[way][0]) else "no" for way in ("elakit", "AMD")]
    layers = {layer.name for layer in adapter_for(pipe).layers()}
    read = {one.layer_id.partition(".")[2] for one in records}
    cells = [f"{len(layers)}, {len(layers & read)}", ", ".join(same), *(f"{ratio:.2f}" for ratio in ratios)]
    cells += [f"{recording.nbytes / MB:.1f}", f"{kept / MB:.1f}"]
    return largest_difference(pipe, prompt, recording, records), cells


def largest_difference(pipe: Any, prompt: Any, recording: Any, records: list[Any]) -> float:
    """Largest difference between both packages' maps, over steps, layers that both read, heads, locations and words."""
    of_layer: dict[str, list[Any]] = defaultdict(list)
    for one in records:
        of_layer[one.layer_id.partition(".")[2]].append(one.data)
    worst, compared = 0.0, 0
    for node in recording.tree.children.values():
        kept = node["probability"]
        for layer in kept["layer"].values:
            for step, maps in enumerate(of_layer.get(str(layer), [])):
                size = kept.sizes["y"], kept.sizes["x"]
                # In Kontext, the rows of the input image follow.
                theirs = maps[-1][:, : size[0] * size[1]].unflatten(1, size)
                for token in prompt.tokens:
                    ours = kept.sel(layer=layer, token=token.label).isel(step=step, image=0).values
                    worst = max(worst, float(np.abs(ours - theirs[..., token.index].numpy()).max()))
                    compared += 1
    if not compared:
        raise SystemExit("attention-map-diffusers recorded none of the layers that elakit reads.")
    return worst


if __name__ == "__main__":
    raise SystemExit(main())
