"""Cost of guidance in the shape of Stable Diffusion 1.5 with random weights: time and memory depend on shapes only.

``python -m benchmarks.guidance count`` counts, without computing anything, the operations of a gradient pass, the bytes
that it keeps for the backward pass, and the operations of a run with half of its steps guided, relative to a plain run.
``python -m benchmarks.guidance time`` runs the pipeline without and with guidance, alternately and without refinement,
and prints time relative to the plain run (wall-clock and processor time; the latter depends little on other programs),
extra peak memory, and bytes kept. The number of steps does not matter: every guided step costs the same.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler, StableDiffusionAttendAndExcitePipeline
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

import elakit
from benchmarks.recording import pipeline
from benchmarks.shapes import DTYPES, machine, timed, unet
from elakit import checks
from elakit.cli_options import one_line_errors
from elakit.guidance import AttendAndExcite, LatentStep, checkpointing
from elakit.guidance.engine import frozen, reading
from elakit.models import Conditioning, adapter_for, device_named

PROMPT = "a [red car] and a [blue bird]"
HALF = 0.501  # share of guided steps; guides the step of a one-step run too, with which kept bytes are counted
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
app = typer.Typer(add_completion=False)
Tiny = Annotated[bool, typer.Option(help="Use few channels per layer, for a quick check of this script.")]
Side = Annotated[int, typer.Option(help="Side of the image in pixels.")]


def kept_bytes(run: Callable[[], Any], weights: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, each storage counted once, without the weights."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    seen: dict[int, tuple[int, Any]] = {}  # keeping the storage prevents reuse of its address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            seen[storage._cdata] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in seen.values())


class Operations(TorchDispatchMode):
    """Context in which `total` counts the floating-point operations of matrix products, convolutions and attention."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        elif func._overloadpacket is _CPU_ATTENTION:
            self.total += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif func._overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        return out


def of_diffusers(pipe: Any) -> Any:
    """Attend-and-Excite pipeline of diffusers, with the components of another pipeline."""
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs


@dataclass(frozen=True)
class Cost:
    """Cost of one kind of guidance.

    Attributes
    ----------
    guided, unguided : int
        Operations that guidance adds to a guided step, and to a step of the same run that is not guided.
    kept : int
        Bytes kept for the backward pass.
    """

    guided: int
    unguided: int
    kept: int

    def ratio(self, step: int) -> float:
        """Operations of a run with half of its steps guided, relative to a plain run of `step` operations per step."""
        return 1 + (self.guided + self.unguided) / 2 / step


def costs(tiny: bool = False, size: int = 512) -> tuple[int, dict[str, Cost]]:
    """Operations of a plain step, and the cost of each kind of guidance, in single precision; nothing is computed.

    The sum of squares of the maps takes the place of ELA's loss, whose own operations are negligible.
    """
    pipe = pipeline(False, True, "cpu", torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        pipe.unet = unet(False, tiny).eval()
        adapter, prompt = adapter_for(pipe), elakit.parse(PROMPT, pipe)
        nouns = [index for entity in prompt.entities for index in entity.token_indices]
        latent, timestep = torch.randn(1, 4, size // 8, size // 8), torch.tensor(500)
        text = Conditioning({}, {"encoder_hidden_states": torch.randn(1, 77, pipe.unet.config.cross_attention_dim)})
        layers = elakit.ELA(size=size // 32).select(adapter.layers(), (size // 8, size // 8))

        def plain() -> None:
            with torch.no_grad():
                adapter.denoise(torch.cat([latent] * 2), timestep, text)

        def ela() -> None:
            with frozen(pipe.unet), torch.enable_grad(), reading(adapter, layers) as read:
                z = latent.clone().requires_grad_(True)
                (seen,) = read(z, timestep, text)
                torch.autograd.grad(seen.mean.square().sum(), z)

        theirs = of_diffusers(pipe)

        def excite(backward: bool = True) -> None:
            with torch.enable_grad():
                z = latent.clone().requires_grad_(True)
                theirs.unet(z, timestep, **text.inputs)
                peaks = theirs._aggregate_and_get_max_attention_per_token(indices=nouns)
                if backward:
                    theirs._update_latent(z, torch.stack(peaks).sum(), 20.0)

        def operations(run: Callable[[], None]) -> int:
            with Operations() as counted:
                run()
            return counted.total

        def cost(run: Callable[[], None], unguided: int = 0) -> Cost:
            with Operations() as counted:
                kept = kept_bytes(run, pipe.unet)
            return Cost(counted.total, unguided, kept)

        step = operations(plain)
        ways = {"elakit: ELA": cost(ela)}
        with checkpointing(pipe):
            ways["elakit: ELA, checkpoints"] = cost(ela)
        theirs.attention_store = sys.modules[type(theirs).__module__].AttentionStore((size // 32, size // 32))
        theirs.register_attention_control()
        # its other steps run the pass, too, without using the result
        ways["diffusers: Attend-and-Excite"] = cost(excite, operations(lambda: excite(False)))
    return step, ways


@app.command()
def count(tiny: Tiny = False, size: Side = 512) -> None:
    """Count operations and kept bytes of gradient passes in single precision; nothing is computed."""
    step, ways = costs(tiny, size)
    print(f"SD 1.5's shape{' (tiny)' if tiny else ''}, {size} px, float32; a plain step with classifier-free guidance")
    print(f"takes {step / 1e12:.2f} x 10^12 operations\n")
    print("| way | operations of a pass | of a run, x plain | kept for a backward |")
    print("|---|---|---|---|")
    for name, cost in ways.items():
        pass_, kept = f"{cost.guided / 1e12:.2f} x 10^12", f"{cost.kept / 1e9:.2f} GB"
        print(f"| {name} | {pass_} | {cost.ratio(step):.2f} | {kept} |")


@app.command("time")
def take_time(
    tiny: Tiny = False,
    steps: Annotated[int, typer.Option(help="Number of denoising steps; half of them are guided.")] = 50,
    size: Side = 512,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda if available.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Data type of the model: {', '.join(DTYPES)}. Default: bfloat16 on a GPU, float32 on a CPU."
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Number of runs of each kind, in turn; medians are printed.")] = 3,
) -> None:
    """Measure time, extra peak memory and kept activations of guided runs and of the plain run."""
    device = str(device_named(device))
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    pipe = pipeline(False, tiny, device, DTYPES[checks.choice(dtype, "dtype", DTYPES)])
    pipe.scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    theirs, prompt = of_diffusers(pipe), elakit.parse(PROMPT, pipe)
    nouns = [index for entity in prompt.entities for index in entity.token_indices]

    def ours(guidance: Any, steps: int) -> None:
        elakit.generate(
            pipe, prompt, steps=steps, height=size, width=size, guidance=guidance, record=False, progress=False
        )

    def diffusers_own(steps: int) -> None:
        theirs(
            prompt.text,
            token_indices=nouns,
            num_inference_steps=steps,
            max_iter_to_alter=(steps + 1) // 2,
            thresholds={},
            attn_res=(size // 32, size // 32),
            height=size,
            width=size,
            generator=torch.Generator().manual_seed(0),
        )

    def checkpointed(steps: int) -> None:
        with checkpointing(pipe):
            ours(ela, steps)

    ela = elakit.ELA(anchor=LatentStep(start=0, guided=HALF), size=size // 32)
    excite = AttendAndExcite(refine=(), guided=HALF, size=size // 32)
    regional = elakit.RegionalAttention(start=0, size=size // 32)
    ways: dict[str, Callable[[int], None]] = {
        "plain": lambda steps: ours(None, steps),
        "elakit: ELA": lambda steps: ours(ela, steps),
        "elakit: ELA, checkpoints": checkpointed,
        "elakit: regional attention": lambda steps: ours(regional, steps),
        "elakit: Attend-and-Excite": lambda steps: ours(excite, steps),
        "diffusers: Attend-and-Excite": diffusers_own,
    }
    kept = dict.fromkeys(ways, 0)
    for name, run in ways.items():
        if name != "plain":
            kept[name] = kept_bytes(partial(run, 1), pipe.unet)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    of_cpu: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[int]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            began = time.process_time()
            took, peak = timed(device, partial(run, steps))
            of_cpu[name].append(time.process_time() - began)
            seconds[name].append(took)
            peaks[name].append(peak)
    shape = f"SD 1.5's shape{' (tiny)' if tiny else ''}, {size} px"
    print(f"{shape}, {steps} steps, half of them guided (regional attention: all but the first), {dtype}")
    print(f"median of {repeats} runs each, alternately")
    print(f"{machine(device)}\n")
    print("| way | seconds | x plain | x plain, processor | extra peak memory | kept for a backward |")
    print("|---|---|---|---|---|---|")
    for name in ways:
        ratio, cpu_ratio = (
            statistics.median(a / b for a, b in zip(took[name], took["plain"], strict=True))
            for took in (seconds, of_cpu)
        )
        print(
            f"| {name} | {statistics.median(seconds[name]):.1f} | {ratio:.2f} | {cpu_ratio:.2f} | "
            f"{statistics.median(peaks[name]) / 1e9:.2f} GB | {kept[name] / 1e9:.2f} GB |"
        )


if __name__ == "__main__":
    with one_line_errors("benchmarks.guidance"):
        app()
