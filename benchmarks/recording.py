"""What recording costs: ``python -m benchmarks.recording`` (SD 1.5's shape), ``--sdxl`` for SDXL's.

Runs a pipeline of random weights plainly and recorded, in turns, and prints time, extra peak memory and bytes a step,
beside attention-map-diffusers where it is installed. Weights do not matter: time and memory depend on shapes alone.
Memory is that of the GPU there, else that of the process (Linux).
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import platform
import statistics
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
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import elakit
from elakit.attention import open_recording
from elakit.world.tokenizer import train_tokenizer

PROMPT = "a [big red car] and a [blue bird]"  # 8 tokens of its own
MB = 10**6
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def unet(sdxl: bool, tiny: bool) -> UNet2DConditionModel:
    """A UNet of SD 1.5's or SDXL's shape; tiny: of its layers' number and sizes, with few channels."""
    if sdxl:
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(32, 64, 64) if tiny else (320, 640, 1280),
            norm_num_groups=8 if tiny else 32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(2, 2, 4) if tiny else (5, 10, 20),
            cross_attention_dim=64 if tiny else 2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + (32 if tiny else 1280),
        )
    return UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(32, 64, 64, 64) if tiny else (320, 640, 1280, 1280),
        norm_num_groups=8 if tiny else 32,
        attention_head_dim=2 if tiny else 8,
        cross_attention_dim=64 if tiny else 768,
    )


def pipeline(sdxl: bool, tiny: bool, device: str, dtype: torch.dtype) -> Any:
    """A pipeline of random weights around that UNet; its encoder of text and of pictures are small."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(1024, 77)

    def encoder(kind: type, width: int) -> Any:
        return kind(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=width,
                projection_dim=width,
                num_hidden_layers=2,
                num_attention_heads=2,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()

    parts: dict[str, Any] = {
        "unet": unet(sdxl, tiny).eval(),
        "vae": AutoencoderKL(
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            norm_num_groups=4,
            latent_channels=4,
            mid_block_add_attention=False,
        ).eval(),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        "tokenizer": tokenizer,
    }
    if sdxl:
        parts["text_encoder"] = encoder(CLIPTextModel, 32 if tiny else 768)
        parts["text_encoder_2"] = encoder(CLIPTextModelWithProjection, 32 if tiny else 1280)
        pipe: Any = StableDiffusionXLPipeline(tokenizer_2=tokenizer, **parts)
    else:
        parts["text_encoder"] = encoder(CLIPTextModel, 64 if tiny else 768)
        extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(**parts, **extra)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device, dtype)


# -- measuring ---------------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """Runs of one way of recording: seconds and peak bytes of each, bytes that are kept of a step, a remark."""

    name: str
    around: Callable[[], AbstractContextManager[Any]]
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)
    step_bytes: float = 0
    remark: str = ""


def host_memory(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes; 0 where /proc does not tell."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), 0)


def timed(device: str, run: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and bytes at the peak above those before."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier runs have freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak back
        before = host_memory("VmRSS")
    began = time.perf_counter()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() - before
    return time.perf_counter() - began, host_memory("VmHWM") - before


def others(pipe: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Ways of other packages, where they can be imported."""
    if importlib.util.find_spec("attention_map_diffusers") is None:
        return {}
    from attention_map_diffusers import AttentionCapture

    settings: dict[str, Any] = {"relations": "image->text", "timesteps": "all", "max_capture_bytes": None}
    return {
        "attention-map-diffusers (fast)": lambda: AttentionCapture(pipe, mode="fast", **settings),
        "attention-map-diffusers (exact)": lambda: AttentionCapture(pipe, mode="exact", **settings),
    }


def agreement(recording: elakit.Recording, capture: Any) -> float:
    """Largest difference between our head means and another package's, over all layers, steps and words."""
    worst = 0.0
    nodes = [node.to_dataset() for node in recording.tree.children.values()]
    where = {str(name): node for node in nodes for name in node["layer"].values}
    records = list(capture.compute())
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


def main(
    sdxl: Annotated[bool, typer.Option(help="SDXL's shape instead of SD 1.5's.")] = False,
    tiny: Annotated[bool, typer.Option(help="The same layers with few channels, to see that this works.")] = False,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; by default 20, of SDXL 5.")] = None,
    size: Annotated[int | None, typer.Option(help="Side of the picture in pixels; by default the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default cuda where there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model; by default float16 on cuda, else float32.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each way, in turns; the median is told.")] = 3,
    tokens: Annotated[str, typer.Option(help="words (the default recording's) or all 77.")] = "words",
) -> None:
    """Print time, extra peak memory and bytes a step of a recorded run beside those of the plain one."""
    steps = steps or (5 if sdxl else 20)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("float16" if device.startswith("cuda") else "float32")
    pipe = pipeline(sdxl, tiny, device, _DTYPES[dtype])
    side = size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    prompt = elakit.parse(PROMPT, pipe)
    specs = {kept: elakit.RecordSpec(tokens=tokens, dtype=kept, budget=2**40) for kept in ("float32", "float16")}

    def draw(count: int) -> Any:
        generator = torch.Generator().manual_seed(0)
        options = {"height": side, "width": side, "output_type": "latent", "generator": generator}
        return pipe(prompt.text, num_inference_steps=count, **options).images

    with tempfile.TemporaryDirectory() as folder:
        rows = [
            Row("plain", nullcontext),
            Row("elakit", lambda: elakit.record(pipe, prompt, specs["float32"])),
            Row("elakit, float16", lambda: elakit.record(pipe, prompt, specs["float16"])),
            Row(
                "elakit, float16 to Zarr",
                lambda: elakit.record(pipe, prompt, specs["float16"], Path(folder) / f"{time.monotonic_ns()}.zarr"),
            ),
            *(Row(name, around) for name, around in others(pipe).items()),
        ]
        compare(rows, draw, steps, repeats, device)
        for path in list(Path(folder).glob("*.zarr"))[-1:]:
            began = time.perf_counter()
            open_recording(path)
            opening = time.perf_counter() - began
            written = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            rows[3].remark = f"{written / steps / MB:.2f} MB a step on disk; opens in {1000 * opening:.0f} ms"
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    kind = f"{'tiny ' * tiny}{'SDXL' if sdxl else 'SD 1.5'} shape"
    print(f"{kind}, {side}x{side}, {steps} steps, {dtype} on {name}, {torch.get_num_threads()} threads; torch", end=" ")
    print(f"{torch.__version__}; {prompt.text!r}, tokens={tokens!r}; median of {repeats}")
    print(f"\n{'':34}{'seconds':>9}{'ratio':>8}{'extra peak MB':>15}{'MB a step':>11}")
    for row in rows:
        ratio = statistics.median(a / b for a, b in zip(row.seconds, rows[0].seconds, strict=True))
        extra = (statistics.median(row.peaks) - statistics.median(rows[0].peaks)) / MB
        line = f"{row.name:34}{statistics.median(row.seconds):9.2f}{ratio:8.3f}{extra:15.1f}"
        print(f"{line}{row.step_bytes / MB:11.3f}  {row.remark}".rstrip())
    if device.startswith("cuda"):
        growth = []
        for count in (steps, 2 * steps):
            with rows[1].around():
                growth.append(timed(device, partial(draw, count))[1])
        print(f"\nGPU memory at the peak, recorded: {growth[0] / MB:.1f} MB with {steps} steps, ", end="")
        print(f"{growth[1] / MB:.1f} MB with {2 * steps}")
    if len(rows) == 4:
        print("\nattention-map-diffusers is not installed: pip install attention-map-diffusers==1.0.0")
    print("daam 0.2 pins diffusers 0.21.2, which elakit cannot run beside: it needs an environment of its own.")


def compare(rows: list[Row], draw: Callable[[int], Any], steps: int, repeats: int, device: str) -> None:
    """Run every way in turns, after one step each to warm up; fill in the rows."""
    for row in rows:
        with row.around():
            draw(1)
    pictures: dict[str, Any] = {}
    for _ in range(repeats):
        kept: elakit.Recording | None = None
        for row in rows:
            with row.around() as recording:
                seconds, peak = timed(device, lambda: pictures.update({row.name: draw(steps)}))  # noqa: B023
            row.seconds.append(seconds)
            row.peaks.append(peak)
            if isinstance(recording, elakit.Recording):
                row.step_bytes = recording.nbytes / len(recording.steps)
                kept = recording if row.name == "elakit" else kept
            elif recording is not None and kept is not None:
                row.step_bytes = recording.collector.peak_capture_bytes / steps
                row.remark = f"differs from elakit by at most {agreement(kept, recording):.1e}"
            if not np.array_equal(pictures[row.name].cpu(), pictures["plain"].cpu()):
                row.remark += " CHANGES THE PICTURE"


if __name__ == "__main__":
    typer.run(main)
