"""Training loop that can be interrupted at any time and continues from its last checkpoint."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed, nn
from tqdm.auto import tqdm

from elakit.errors import SettingError
from elakit.files import replace_file
from elakit.numbering import number_of

M = TypeVar("M", bound=nn.Module)


def fast_bfloat16(device: torch.device) -> bool:
    """True if a device computes bfloat16 in hardware.

    A CPU without such hardware is far slower in bfloat16 than in float32.
    """
    return device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device: torch.device) -> torch.autocast:
    """Context manager for mixed precision with bfloat16.

    On devices on which bfloat16 is slow, the computation is in single precision instead.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_bfloat16(device))


def rank_and_world() -> tuple[int, int]:
    """Rank of this process, counted from 0, and number of processes that train together.

    The result is (0, 1) if this process trains alone.
    """
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def share_gradients(model: nn.Module) -> None:
    """Replace each gradient by its mean over all processes that train together."""
    world = rank_and_world()[1]
    if world == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) / world
    distributed.all_reduce(flat)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


@dataclass(frozen=True)
class Schedule:
    """Length of a training run and its learning rate.

    Attributes
    ----------
    samples : int
        Number of images in the whole training, summed over the processes.
    batch : int
        Images per step and process.
    learning_rate : float
        Learning rate after the warm-up.
    warmup : int
        Number of steps in which the learning rate rises from zero.
    decay_from : float
        Share of the steps after which the learning rate begins to fall to zero along a cosine.
    average : float
        Decay of the exponential moving average of the weights.
    processes : int
        Number of processes that train together.
    """

    samples: int
    batch: int
    learning_rate: float
    warmup: int = 200
    decay_from: float = 0.5
    average: float = 0.999
    processes: int = 1

    @property
    def images_per_step(self) -> int:
        """Number of images per optimizer step, summed over the processes."""
        return self.batch * self.processes

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the whole run."""
        return math.ceil(self.samples / self.images_per_step)

    def rate(self, step: int) -> float:
        """Learning rate at a step, counted from 1.

        The learning rate rises linearly during the warm-up, and is then constant. After the share `decay_from` of the
        steps, the learning rate falls to zero along a cosine.

        Examples
        --------
        This schedule has 1000 steps. Step 50 is halfway through the warm-up, and step 1000 is the last step:

        >>> s = Schedule(samples=1000, batch=1, learning_rate=1.0, warmup=100, decay_from=0.5)
        >>> s.rate(50), s.rate(400), round(s.rate(1000), 6)
        (0.5, 1.0, 0.0)
        """
        done = step / self.steps
        decay = max(0.0, (done - self.decay_from) / (1 - self.decay_from))
        return self.learning_rate * min(1.0, step / max(1, self.warmup)) * (0.5 + 0.5 * math.cos(math.pi * decay))


def train(
    model: M,
    loss: Callable[[int], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    name: str,
    *,
    checkpoint_seconds: float = 120.0,
    on_checkpoint: Callable[[M, int], None] | None = None,
) -> M:
    """Train a model, and return a copy with the moving average of the weights.

    Parameters
    ----------
    model : nn.Module
        Module with all parameters that are trained; `loss` must use this object.
    loss : callable
        Function that takes the step number, counted from 0, and returns the scalar loss of one batch. Before each call,
        torch's random generator is seeded with a number that differs for each step and process.
    schedule : Schedule
    folder : Path
        Folder of the checkpoint ``<name>.pt``. If this checkpoint exists, the training continues from it.
    name : str
        Name of the checkpoint and of the progress bar.
    checkpoint_seconds : float
        Wall-clock seconds between checkpoints.
    on_checkpoint : callable, optional
        Function that is called after each checkpoint, for example to save a sample sheet. The arguments are the
        averaged model and the number of steps done.

    Returns
    -------
    nn.Module
        Copy of `model` with the exponential moving average of the weights, in eval mode.

    Raises
    ------
    SettingError
        The checkpoint was trained with a different number of images per step than `schedule` has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.pt"
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(
        model.parameters(), schedule.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3, fused=True
    )
    start, history = 0, []
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["images_per_step"] != schedule.images_per_step:
            raise SettingError(
                f"{path} was trained with {number_of(state['images_per_step'], 'image')} per step, but this run has "
                f"{number_of(schedule.images_per_step, 'image')} per step. Use the batch size and the number of "
                "processes of the earlier run, or give another folder as --out."
            )
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start, history = state["step"], state["history"]
    rank, world = rank_and_world()
    saved = time.monotonic()
    with tqdm(total=schedule.steps, initial=start, desc=name, unit="step", mininterval=5, disable=rank > 0) as bar:
        for step in range(start, schedule.steps):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step + 1)
            optimizer.zero_grad(set_to_none=True)
            # a resumed training gets the same random numbers as one that was not interrupted
            torch.manual_seed(step * world + rank)
            value = loss(step)
            value.backward()
            share_gradients(model)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            decay = min(schedule.average, (step + 1) / (step + 10))
            with torch.no_grad():
                for mean, current in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(current, 1 - decay)
                for kept, seen in zip(average.buffers(), model.buffers(), strict=True):
                    kept.copy_(seen)
            if step % 50 == 0:
                history.append((step, value.item()))
                bar.set_postfix(loss=f"{value.item():.4f}")
            bar.update()
            last = step + 1 == schedule.steps
            if rank == 0 and (last or time.monotonic() - saved > checkpoint_seconds):
                state = {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                    "images_per_step": schedule.images_per_step,
                    "history": history,
                }
                with replace_file(path) as part:  # a kill while writing leaves the previous checkpoint
                    torch.save(state, part)
                if on_checkpoint is not None:
                    on_checkpoint(average, step + 1)
                saved = time.monotonic()
    return average
