"""What guidance costs: ``python -m benchmarks.guidance`` (SD 1.5's shape, random weights, half of the steps guided).

Runs the pipeline plainly, with ELA, with our Attend-and-Excite and with diffusers' own, in turns and without
refinement, and prints time relative to the plain run, extra peak memory, and the bytes that one gradient pass keeps for
its backward.
Weights do not matter: time and memory depend on shapes alone.
"""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline

import elakit
from benchmarks.recording import pipeline, timed
from elakit.guidance import AttendAndExcite

PROMPT = "a [red car] and a [blue bird]"
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def kept_bytes(run: Callable[[], Any], weights: torch.nn.Module) -> int:
    """Bytes that autograd keeps for a backward while `run` runs, each storage once, weights left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in weights.parameters()}
    seen: dict[int, tuple[int, Any]] = {}  # holding on to a tensor keeps its address from being used again

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes(), tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in seen.values())


def main(
    tiny: Annotated[bool, typer.Option(help="The same layers with few channels, to see that this works.")] = False,
    steps: Annotated[int, typer.Option(help="Denoising steps; half of them are guided.")] = 50,
    size: Annotated[int, typer.Option(help="Side of the picture in pixels.")] = 512,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="By default bfloat16 on cuda, else float32.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each way, in turns; medians are told.")] = 3,
) -> None:
    """Print time, extra peak memory and kept activations of guided runs beside those of the plain one."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipe = pipeline(False, tiny, device, _DTYPES[dtype])
    pipe.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    theirs = StableDiffusionAttendAndExcitePipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    prompt = elakit.parse(PROMPT, pipe)
    nouns = [index for entity in prompt.entities for index in entity.token_indices]

    def ours(guidance: Any, count: int) -> None:
        elakit.generate(
            pipe, prompt, steps=count, height=size, width=size, guidance=guidance, record=False, progress=False
        )

    def diffusers_own(count: int) -> None:
        theirs(
            prompt.text,
            token_indices=nouns,
            num_inference_steps=count,
            max_iter_to_alter=(count + 1) // 2,
            thresholds={},
            attn_res=(size // 32, size // 32),
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(0),
        )

    ways: dict[str, Callable[[int], None]] = {
        "plain": lambda count: ours(None, count),
        "elakit: ELA": lambda count: ours(elakit.ELA(size=size // 32), count),
        "elakit: Attend-and-Excite": lambda count: ours(AttendAndExcite(refine=(), size=size // 32), count),
        "diffusers: Attend-and-Excite": diffusers_own,
    }
    kept = dict.fromkeys(ways, 0)
    for name, run in ways.items():
        if name != "plain":
            kept[name] = kept_bytes(lambda run=run: run(1), pipe.unet)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            took, peak = timed(device, lambda run=run: run(steps))
            seconds[name].append(took)
            peaks[name].append(peak)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(
        f"SD 1.5's shape{' (tiny)' if tiny else ''}, {size} px, {steps} steps, {steps // 2} guided, {dtype}, {where},"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, median of {repeats} runs in turns\n")
    print("| way | seconds | x plain | extra peak memory | kept for a backward |")
    print("|---|---|---|---|---|")
    for name in ways:
        ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["plain"], strict=True))
        print(
            f"| {name} | {statistics.median(seconds[name]):.1f} | {ratio:.2f} | "
            f"{statistics.median(peaks[name]) / 1e9:.2f} GB | {kept[name] / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    typer.run(main)
