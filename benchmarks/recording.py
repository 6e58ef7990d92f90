"""Cost of recording, on pipelines with random weights, because time and memory depend on shapes alone.

``python -m benchmarks.recording compare`` (the shapes of SD 1.5; of SDXL with ``--sdxl``) runs a pipeline plain and
recorded, in turns, and prints time, extra peak memory and bytes per step, beside attention-map-diffusers if it is
installed. ``python -m benchmarks.recording stream`` writes 50 steps of SDXL maps to a Zarr store. DAAM requires a
diffusers release of 2023; `benchmarks.recording_daam` measures it on the same pipelines.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

import elakit
from benchmarks import shapes
from benchmarks.shapes import DTYPES, MB, machine, timed
from elakit import checks
from elakit.attention import open_recording
from elakit.cli_options import one_line_errors
from elakit.models import device_named
from elakit.world.tokenizer import train_tokenizer

PROMPT = "a [red car] and a [blue bird]"  # start-of-text and seven words: eight tokens
app = typer.Typer(add_completion=False)


def pipeline(sdxl: bool, thin: bool, device: str, dtype: torch.dtype) -> Any:
    """Build `shapes.pipeline` with a tokenizer like picture-world's and CLIP's length of 77 tokens."""
    return shapes.pipeline(sdxl, thin, device, dtype, train_tokenizer(1024, 77))


@dataclass
class Row:
    """Measurements of one kind of run: seconds, CPU seconds and peak bytes of each run, bytes per step, a remark."""

    name: str
    around: Callable[[], AbstractContextManager[Any]]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    step_bytes: float = 0
    remark: str = ""


def capture(pipe: Any) -> AbstractContextManager[Any] | None:
    """Open attention-map-diffusers in its fast mode, set to keep what elakit keeps; None without the package."""
    if importlib.util.find_spec("attention_map_diffusers") is None:
        return None
    from attention_map_diffusers import AttentionCapture

    settings: dict[str, Any] = {"relations": "image->text", "timesteps": "all", "max_capture_bytes": None}
    return AttentionCapture(pipe, mode="fast", **settings)


def difference(recording: elakit.Recording, captured: Any) -> float:
    """Compute the largest difference between both packages' means over heads, over all layers, steps and words."""
    worst = 0.0
    where = {str(name): node for node in recording.nodes() for name in node["layer"].values}
    records = list(captured.compute())
    calls = sorted({record.step_index for record in records})
    if len(records) != len(where) * len(recording.steps):
        raise RuntimeError(f"{len(records)} maps against {len(where)} layers x {len(recording.steps)} steps")
    for record in records:
        name = next(name for name in where if record.layer_id.endswith(name))
        ours = where[name]["probability"].sel(layer=name).isel(step=calls.index(record.step_index), image=0, head=0)
        words = where[name]["token_index"].values >= 0
        theirs = record.data[-1].float().mean(0).cpu().numpy()[:, where[name]["token_index"].values[words]]
        worst = max(worst, float(abs(ours.values[..., words].reshape(theirs.shape) - theirs).max()))
    return worst


def generating(pipe: Any, side: int) -> Callable[..., Any]:
    """Return a function that generates latents from the same noise each time, with classifier-free guidance."""

    def generate(steps: int, **more: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        options = {"height": side, "width": side, "output_type": "latent", "generator": generator, **more}
        return pipe(elakit.parse(PROMPT, pipe).text, num_inference_steps=steps, **options).images

    return generate


def kept(recording: elakit.Recording) -> str:
    """Describe the content of a recording for the table's caption."""
    locations = sum(len(node["layer"]) * node.sizes["y"] * node.sizes["x"] for node in recording.nodes())
    return f"{len(recording.layers)} layers, {locations} locations, tokens {' '.join(recording.tokens)}"


@app.command()
def compare(
    sdxl: Annotated[bool, typer.Option(help="Use the shapes of SDXL instead of SD 1.5.")] = False,
    thin: Annotated[
        bool, typer.Option(help="Use few channels per layer, with the same layers, heads and maps, for a quick test.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 20,
    size: Annotated[int | None, typer.Option(help="Side of the image in pixels. Default: the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if available.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help=f"Data type of the model: {', '.join(DTYPES)}. Default: float16 on a GPU, float32 on a CPU."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Number of runs of each kind, in turn; medians are printed.")] = 3,
) -> None:
    """Print time, extra peak memory and bytes per step of recorded runs beside those of the plain run."""
    device = str(device_named(device))
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    pipe = pipeline(sdxl, thin, device, DTYPES[checks.choice(dtype, "dtype", DTYPES)])
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    generate = generating(pipe, side)
    shape = f"{'thin ' * thin}{'SDXL' if sdxl else 'SD 1.5'} shape"
    print(f"{shape}, {side}x{side}, {steps} steps, guided, {dtype} on {machine(device)}; median of {repeats} runs")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            Row("plain", nullcontext),
            Row("elakit", lambda: elakit.record(pipe, PROMPT)),
            Row("elakit, to Zarr", lambda: elakit.record(pipe, PROMPT, store=f"{folder}/{time.monotonic_ns()}.zarr")),
            *([Row("attention-map-diffusers, fast", lambda: capture(pipe))] if capture(pipe) else []),
        ]
        caption = agree(pipe, generate)
        take_turns(rows, generate, steps, repeats, device)
        path = max(Path(folder).glob("*.zarr"))
        began = time.perf_counter()
        open_recording(path)
        rows[2].remark = f"{disk_bytes(path) / steps / MB:.3f} MB per step on disk; opens in "
        rows[2].remark += f"{1000 * (time.perf_counter() - began):.0f} ms"
    print(caption)
    print(f"\n{'':30}{'seconds':>9}{'ratio':>8}{'of CPU time':>13}{'extra peak MB':>15}{'MB per step':>12}")
    for row in rows:
        ratio, of_cpu = (
            statistics.median(a / b for a, b in zip(mine, plain, strict=True))
            for mine, plain in ((row.seconds, rows[0].seconds), (row.cpu_seconds, rows[0].cpu_seconds))
        )
        extra = (statistics.median(row.peaks) - statistics.median(rows[0].peaks)) / MB
        line = f"{row.name:30}{statistics.median(row.seconds):9.2f}{ratio:8.3f}{of_cpu:13.3f}{extra:15.1f}"
        print(f"{line}{row.step_bytes / MB:12.3f}  {row.remark}".rstrip())
    if device.startswith("cuda"):
        growth = []
        for count in (steps, 2 * steps):
            with rows[1].around():
                growth.append(timed(device, partial(generate, count))[1])
        print(f"\npeak GPU memory, recorded: {growth[0] / MB:.1f} MB with {steps} steps, ", end="")
        print(f"{growth[1] / MB:.1f} MB with {2 * steps}")


def agree(pipe: Any, generate: Callable[[int], Any]) -> str:
    """Record one step in float32 and the same step with another package; return a description of both."""
    other = capture(pipe)
    with (
        elakit.record(pipe, PROMPT, elakit.RecordSpec(dtype="float32")) as recording,
        other or nullcontext() as captured,
    ):
        generate(1)
    largest = max(float(node["probability"].max()) for node in recording.nodes())
    said = f"{kept(recording)}; probabilities up to {largest:.2f}\n"
    if captured is None:
        return f"{said}attention-map-diffusers is not installed: pip install attention-map-diffusers==1.0.0"
    return f"{said}largest difference from attention-map-diffusers: {difference(recording, captured):.1e}"


def take_turns(rows: list[Row], generate: Callable[[int], Any], steps: int, repeats: int, device: str) -> None:
    """Make all kinds of runs in turn, and fill in the rows."""
    images: dict[str, Any] = {}
    for turn in range(repeats):
        for row in rows:
            with row.around() as recording:
                began = time.process_time()
                seconds, peak = timed(device, lambda: images.update({row.name: generate(steps)}))  # noqa: B023
            row.seconds.append(seconds)
            row.cpu_seconds.append(time.process_time() - began)
            row.peaks.append(peak)
            print(f"turn {turn + 1}, {row.name}: {seconds:.1f} s, {row.cpu_seconds[-1]:.1f} s of CPU", file=sys.stderr)
            if isinstance(recording, elakit.Recording):
                row.step_bytes = recording.nbytes / len(recording.steps)
            elif recording is not None:
                row.step_bytes = recording.collector.peak_capture_bytes / steps
                began = time.perf_counter()
                recording.compute()
                row.remark = f"and {time.perf_counter() - began:.1f} s after the run to compute maps"
            if not np.array_equal(images[row.name].cpu(), images["plain"].cpu()):
                row.remark += " CHANGES THE IMAGE"


@app.command()
def stream(
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 50,
    size: Annotated[int, typer.Option(help="Side of the image in pixels.")] = 1024,
) -> None:
    """Measure the host memory of a recording to a Zarr store, and the time to open the store.

    The recording contains the maps of all tokens and all layers of SDXL, as means over heads. The U-Net has the layers,
    heads and map sizes of SDXL, few channels, and self-attention of each location to itself only, because the cost of
    recording depends on layers, heads and map sizes alone.
    """
    pipe = pipeline(True, True, "cpu", torch.float32)
    for name, module in pipe.unet.named_modules():
        if name.endswith(".attn1"):
            module.set_processor(_own_value)
    # Without guidance, because only the half of a batch that sees the prompt is kept.
    generate = partial(generating(pipe, size), guidance_scale=1.0)
    print(f"thin SDXL shape, {size}x{size}, {steps} steps, unguided, float32 on {machine('cpu')}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.zarr"
        with elakit.record(pipe, PROMPT, elakit.RecordSpec(tokens="all"), Path(folder) / "warm.zarr"):
            generate(1)
        seconds, plain = timed("cpu", partial(generate, steps))
        with elakit.record(pipe, PROMPT, elakit.RecordSpec(tokens="all"), path) as recording:
            recorded_seconds, recorded = timed("cpu", partial(generate, steps))
        del recording
        began = time.perf_counter()
        opened = open_recording(path)
        opening = time.perf_counter() - began
        print(f"{len(opened.layers)} layers, {len(opened.tokens)} tokens, {len(opened.steps)} steps: ", end="")
        print(f"{opened.nbytes / MB:.0f} MB, {disk_bytes(path) / MB:.0f} MB on disk")
    print(f"peak host memory above that before the run: plain {plain / MB:.0f} MB, ", end="")
    print(f"recorded {recorded / MB:.0f} MB: {(recorded - plain) / MB:.0f} MB more")
    print(f"opens in {1000 * opening:.0f} ms; {recorded_seconds - seconds:.0f} s more than {seconds:.0f} s")


def _own_value(attn: Any, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Self-attention processor with nearly no cost."""
    output: torch.Tensor = attn.to_out[0](attn.to_v(hidden_states))
    return output


def disk_bytes(folder: Path) -> int:
    """Return the total size of a store's files in bytes."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    with one_line_errors("benchmarks.recording"):
        app()
