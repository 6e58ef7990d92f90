"""Cost of recording and guidance on an NVIDIA GPU, on pipelines with random weights: ``python -m benchmarks.cuda``.

Prints the seconds of recorded and guided runs in the shapes of SD 1.5 and SDXL, their ratio to those of the plain run,
and the extra peak memory. Without a GPU it prints that there is none and ends.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer

import elakit
from benchmarks.recording import PROMPT, pipeline
from benchmarks.shapes import DTYPES, MB, machine, timed
from elakit import checks
from elakit.cli_options import one_line_errors

app = typer.Typer(add_completion=False)


def ways(pipe: Any, steps: int, side: int) -> dict[str, Callable[[], Any]]:
    """Return functions that make the runs to measure, by name of the run."""
    settings: dict[str, Any] = {"seed": 0, "steps": steps, "height": side, "width": side, "progress": False}

    def run(**options: Any) -> Callable[[], Any]:
        return lambda: elakit.generate(pipe, PROMPT, **settings, **options)

    return {
        "plain": run(record=False),
        "recorded": run(),
        "recorded, on the GPU": run(record=elakit.RecordSpec(device="model")),
        "guided (ELA)": run(guidance=elakit.ELA(), record=False),
        "guided and recorded": run(guidance=elakit.ELA()),
    }


@app.command()
def main(
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 20,
    repeats: Annotated[int, typer.Option(help="Number of runs of each kind; medians are printed.")] = 3,
    dtype: Annotated[str, typer.Option(help=f"Data type of the model: {', '.join(DTYPES)}.")] = "float16",
    thin: Annotated[
        bool, typer.Option(help="Use few channels per layer, with the same layers, heads and maps, for a quick test.")
    ] = False,
) -> None:
    """Print time and peak memory of recorded and guided runs on an NVIDIA GPU, compared with plain generation.

    The pipelines have the shapes of Stable Diffusion 1.5 and SDXL, and random weights.
    """
    precision = DTYPES[checks.choice(dtype, "dtype", DTYPES)]
    if not torch.cuda.is_available():
        print("No CUDA device on this machine; nothing was measured.")
        return
    for sdxl, side in ((False, 512), (True, 1024)):
        pipe = pipeline(sdxl, thin, "cuda", precision)
        runs = ways(pipe, steps, side)
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in runs}
        runs["plain"]()  # the first run loads kernels
        for _ in range(repeats):
            for name, run in runs.items():
                found[name].append(timed("cuda", run))
        print(f"{'SDXL' if sdxl else 'SD 1.5'} shapes, {side}x{side}, {steps} steps, {dtype}, {machine('cuda')}")
        print(f"{'':24}{'seconds':>9}{'ratio':>8}{'peak MB':>10}{'extra MB':>10}")
        plain = statistics.median(peak for _, peak in found["plain"])
        for name, each in found.items():
            ratio = statistics.median(mine[0] / base[0] for mine, base in zip(each, found["plain"], strict=True))
            peak = statistics.median(peak for _, peak in each)
            seconds = statistics.median(second for second, _ in each)
            print(f"{name:24}{seconds:9.2f}{ratio:8.3f}{peak / MB:10.0f}{(peak - plain) / MB:10.1f}")
        del pipe, runs
        torch.cuda.empty_cache()


if __name__ == "__main__":
    with one_line_errors("benchmarks.cuda"):
        app()
