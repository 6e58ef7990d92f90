"""Cost of DAAM 0.2 on the pipelines of `benchmarks.recording`, in a separate environment.

DAAM requires diffusers 0.21.2 and transformers 4.30.2, with which elakit cannot be installed, so this script imports
nothing from elakit. In a fresh environment, from the root of the repository::

    python3 -m venv daam && daam/bin/pip install daam==0.2.0 "huggingface_hub<0.26" "numpy<2" "pandas<3" matplotlib
    daam/bin/python -m benchmarks.recording_daam  # --sdxl, --thin, --steps, --repeats as in benchmarks.recording
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from daam import trace
from transformers import CLIPTokenizer

from benchmarks.shapes import DTYPES, MB, machine, pipeline, timed

PROMPT = "a red car and a blue bird"


def spelling_tokenizer() -> Any:
    """Build a CLIP tokenizer whose tokens are letters. It suffices, since DAAM keeps all 77 positions of any text."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\na b\n")
        return CLIPTokenizer(f"{folder}/vocab.json", f"{folder}/merges.txt", model_max_length=77)


@dataclass
class Row:
    """Measurements of one kind of run: seconds, CPU seconds, peak bytes and latents per run; bytes that a run keeps."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    kept: int = 0


def main() -> None:
    """Print time, extra peak memory and kept bytes of traced runs beside those of the plain run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("--sdxl", action="store_true", help="use the shapes of SDXL instead of SD 1.5")
    parser.add_argument("--thin", action="store_true", help="use few channels per layer, for a quick test")
    parser.add_argument("--steps", type=int, default=20, help="number of denoising steps")
    parser.add_argument("--repeats", type=int, default=3, help="number of runs of each kind, in turn")
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="cpu or cuda; default: cuda if available")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16" if cuda else "float32",
        help="data type of the model; default: float16 on a GPU, float32 on a CPU",
    )
    options = parser.parse_args()
    pipe = pipeline(options.sdxl, options.thin, options.device, DTYPES[options.dtype], spelling_tokenizer())

    def generate(into: list[Any]) -> None:
        settings = {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
        into.append(pipe(PROMPT, num_inference_steps=options.steps, **settings).images)

    ways: dict[str, Any] = {"plain": nullcontext, "daam": lambda: trace(pipe)}
    rows = {name: Row() for name in ways}
    for turn in range(options.repeats):
        for name, row in rows.items():
            with ways[name]() as tracing:
                began = time.process_time()
                seconds, peak = timed(options.device, partial(generate, row.images))
                row.cpu_seconds.append(time.process_time() - began)
            row.seconds.append(seconds)
            row.peaks.append(peak)
            print(f"turn {turn + 1}, {name}: {seconds:.1f} s, {row.cpu_seconds[-1]:.1f} s of CPU", file=sys.stderr)
            if tracing is not None:
                maps = [heat_map for _, heat_map in tracing.all_heat_maps]
                row.kept = sum(heat_map.numel() * heat_map.element_size() for heat_map in maps)
    plain, daam = rows.values()
    change = float((plain.images[-1] - daam.images[-1]).abs().max())
    shape = f"{'thin ' * options.thin}{'SDXL' if options.sdxl else 'SD 1.5'} shape"
    print(f"{shape}, {options.steps} steps, guided, {options.dtype} on {machine(options.device)}, ", end="")
    print(f"diffusers {diffusers.__version__}; median of {options.repeats} runs")
    print(f"\n{'':30}{'seconds':>9}{'ratio':>8}{'of CPU time':>13}{'extra peak MB':>15}{'MB in total':>12}")
    for name, row in rows.items():
        ratio, of_cpu = (
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in ((row.seconds, plain.seconds), (row.cpu_seconds, plain.cpu_seconds))
        )
        extra = (statistics.median(row.peaks) - statistics.median(plain.peaks)) / MB
        print(f"{name:30}{statistics.median(row.seconds):9.2f}{ratio:8.3f}{of_cpu:13.3f}{extra:15.1f}", end="")
        print(f"{row.kept / MB:12.1f}")
    print(f"daam keeps the sum over the steps, of every head; it changes the latents by up to {change:.1e}")


if __name__ == "__main__":
    main()
