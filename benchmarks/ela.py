"""How often ELA mends and harms on the embedded model: ``python -m benchmarks.ela``.

Draws prompts of the Attend-and-Excite benchmark plainly and with ELA from the same noise, and lets the judge count.
Even seeds are for choosing options (``--set step_size=0.1``), odd seeds for reporting.
"""

from __future__ import annotations

import ast
import json
import time
from typing import Annotated, Any

import numpy as np
import typer
from tqdm.auto import tqdm

import elakit
from elakit.resources import data_path


def benchmark_prompts(count: int) -> list[str]:
    """`count` prompts spread evenly over the benchmark's 276."""
    table = json.loads(data_path("prompts", "attend_and_excite.json").read_text(encoding="utf-8"))
    every = [prompt for group in table.values() for prompt in group]
    return [every[i] for i in np.linspace(0, len(every) - 1, min(count, len(every))).round().astype(int)]


def option(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def main(
    prompts: Annotated[int, typer.Option(help="Prompts of the 276, evenly spread.")] = 46,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "1,3",
    variants: Annotated[
        list[str] | None, typer.Option("--set", help="Options of a variant, comma-free: a=1 b=2.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
) -> None:
    """Print success of plain generation and of ELA (each --set is one more variant), mended, harmed, and time."""
    pipe = elakit.load("picture-world")
    methods = {"ela (default)": elakit.ELA()} if not variants else {}
    methods |= {v: elakit.ELA(**dict(option(part) for part in v.split())) for v in variants or []}
    numbers = [int(seed) for seed in seeds.split(",")]
    outcomes: dict[str, list[bool]] = {name: [] for name in ("plain", *methods)}
    bleeding: dict[str, list[float]] = {name: [] for name in outcomes}
    seconds = dict.fromkeys(outcomes, 0.0)
    for text in tqdm(benchmark_prompts(prompts), unit="prompt", mininterval=20):
        prompt = elakit.parse(text, pipe)
        for seed in numbers:
            for name, method in {"plain": None, **methods}.items():
                began = time.perf_counter()
                run = elakit.generate(pipe, prompt, seed=seed, steps=steps, guidance=method, progress=False)
                seconds[name] += time.perf_counter() - began
                outcomes[name].append(elakit.judge.judge(run.image, prompt).success)
                bleeding[name].append(float(run.bleeding.to_frame().query("measure == 'bleed'")["value"].mean()))
    plain = np.array(outcomes["plain"])
    drawn = [f"{text} (seed {seed})" for text in benchmark_prompts(prompts) for seed in numbers]
    print(f"{len(plain)} pictures: {prompts} prompts, seeds {seeds}")
    print(f"{'method':40s} right  mended harmed bleed  time/plain")
    for name, results in outcomes.items():
        right = np.array(results)
        print(
            f"{name:40s} {right.mean():5.3f}  {(right & ~plain).sum():4d}   {(~right & plain).sum():4d}   "
            f"{np.mean(bleeding[name]):5.3f}  {seconds[name] / seconds['plain']:.2f}"
        )
    for name in methods:
        right = np.array(outcomes[name])
        for what, chosen in (("mended", right & ~plain), ("harmed", ~right & plain)):
            print(f"{what} by {name}: " + "; ".join(drawn[i] for i in np.flatnonzero(chosen)))


if __name__ == "__main__":
    typer.run(main)
