"""Runs any guidance method: a conditional pass up to the last layer its loss reads, its gradient, a step of the latent.

A method says which layers it reads, what it loses and how far to step (`Method`); this module does the rest, for every
method alike: weights frozen, fused attention kept, the network beyond the last layer skipped, loss and gradient in at
least float32, no gradient outside the guided steps. It enters a pipeline through given latents (before the first step)
and ``callback_on_step_end`` (before every later one), so no pipeline's ``__call__`` is copied.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from elakit.attention import paused
from elakit.attention.taps import Attend, tap
from elakit.errors import SettingError
from elakit.models import Adapter, AttentionLayer, adapter_for
from elakit.prompt import Prompt

# fp16 gradients of a loss of order one underflow; scaling by a power of two loses no digit
_FP16_SCALE = 256.0


@dataclass(frozen=True)
class Loss:
    """What a method loses on one set of maps.

    Attributes
    ----------
    total : Tensor, scalar
        Carries the gradient.
    terms : dict of str to float
        Its named parts, for the trace.
    regions : ndarray, bool, (entity, y, x), optional
        The regions it anchors to.
    """

    total: Tensor
    terms: dict[str, float]
    regions: np.ndarray | None = None


class Method(Protocol):
    """What the engine asks of a guidance method; methods are frozen dataclasses of their options."""

    name: ClassVar[str]

    def select(self, layers: Sequence[AttentionLayer], latent: tuple[int, int]) -> tuple[AttentionLayer, ...]:
        """The layers the loss reads, all of one map size; latent is (h, w)."""

    def begin(self, prompt: Prompt) -> Any:
        """State of a run (such as locked regions), handed to every `loss` of it."""

    def step_sizes(self, steps: int, prompt: Prompt) -> Sequence[float]:
        """Step size of each denoising step; 0 leaves a step alone."""

    def loss(self, maps: Tensor, prompt: Prompt, step: int, state: Any) -> Loss:
        """Loss on raw attention probabilities, (token, y, x), averaged over heads and the selected layers."""

    def direction(self, gradient: Tensor) -> Tensor:
        """The gradient as it is stepped along (raw, or brought to a fixed length)."""


@dataclass
class Trace:
    """What guidance did, step by step.

    Attributes
    ----------
    rows : list of dict
        One a guided step: step, timestep, step_size, loss, its terms, gradient_norm, moved (root mean square of the
        latent's change), seconds, skipped (the gradient was not finite, so the latent was left alone).
    """

    method: str
    options: dict[str, Any]
    entities: tuple[str, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)
    _regions: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """The rows as a frame, indexed by step."""
        frame = pd.DataFrame(self.rows)
        return frame.set_index("step") if len(frame) else frame

    @property
    def regions(self) -> xr.DataArray | None:
        """Regions that were anchored to: boolean (step, entity, y, x); None if the method has none."""
        if not self._regions:
            return None
        return xr.DataArray(
            np.stack(list(self._regions.values())),
            dims=("step", "entity", "y", "x"),
            coords={"step": list(self._regions), "entity": list(self.entities)},
            name="regions",
        )

    @property
    def skipped(self) -> int:
        """Steps whose gradient was not finite."""
        return sum(bool(row["skipped"]) for row in self.rows)

    def add(self, row: dict[str, Any], regions: np.ndarray | None) -> None:
        """Append a step."""
        self.rows.append(row)
        if regions is not None:
            self._regions[row["step"]] = regions


class _Enough(Exception):
    """Ends a pass after the last layer that is read."""


def attention_maps(
    adapter: Adapter,
    layers: Sequence[AttentionLayer],
    latents: Tensor,
    timestep: Tensor,
    embeds: Tensor,
) -> Tensor:
    """Attention of a conditional pass, stopped after the last of the layers; differentiable.

    Parameters
    ----------
    adapter : Adapter
    layers : sequence of AttentionLayer
        All of one map size, in forward order.
    latents : Tensor, (n, c, h, w)
        Scaled by the scheduler.
    timestep : Tensor, scalar
    embeds : Tensor, (n, positions, channels)
        Text states of the prompt.

    Returns
    -------
    Tensor, float32 or float64, (n, token, y, x)
        Raw probabilities, averaged over heads, then layers.

    Raises
    ------
    SettingError
        No layer is given, or their maps differ in size.
    """
    if not layers:
        raise SettingError(
            "Guidance reads no attention layer: none of the model's layers fits its `layers` and `size`."
        )
    maps: list[Tensor] = []

    def collect(layer: AttentionLayer, attend: Attend, size: tuple[int, int]) -> None:
        mean = attend(slice(None)).mean(1)  # (n, h*w, token)
        maps.append(mean.transpose(1, 2).unflatten(2, size))
        if layer is layers[-1]:
            raise _Enough

    with tap(layers, collect), suppress(_Enough):
        adapter.denoise(latents, timestep, embeds)
    sizes = {tuple(m.shape[-2:]) for m in maps}
    if len(sizes) > 1:
        raise SettingError(f"The layers read by guidance have maps of different sizes: {sorted(sizes)}. Set `size`.")
    return torch.stack(maps).mean(0)


def gradient(
    adapter: Adapter,
    method: Method,
    prompt: Prompt,
    layers: Sequence[AttentionLayer],
    latents: Tensor,
    timestep: Tensor,
    embeds: Tensor,
    *,
    step: int = 0,
    state: Any = None,
) -> tuple[Loss, Tensor]:
    """A method's loss at a latent, and its gradient there.

    Parameters
    ----------
    latents : Tensor, (1, c, h, w)
        As the scheduler keeps them (not scaled).

    Returns
    -------
    loss : Loss
    gradient : Tensor, (1, c, h, w)
        In float32 (float64 for float64 latents).
    """
    model_dtype: torch.dtype = next(adapter.denoiser.parameters()).dtype
    scale = _FP16_SCALE if model_dtype == torch.float16 else 1.0
    with torch.enable_grad():
        z = latents.detach().to(torch.promote_types(latents.dtype, torch.float32)).requires_grad_(True)
        scaled = adapter.pipe.scheduler.scale_model_input(z, timestep)
        maps = attention_maps(adapter, layers, scaled.to(model_dtype), timestep, embeds.to(model_dtype))
        loss = method.loss(maps[0], prompt, step, state)
        (grad,) = torch.autograd.grad(loss.total * scale, z)
    return loss, grad / scale


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No weight wants a gradient inside; what wanted one before wants it again afterwards."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


class Guide:
    """One guided run: moves the latent before each denoising step, and keeps the trace.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    method : Method
    prompt : Prompt
    embeds : Tensor, (1, positions, channels)
        Text states of the prompt.
    steps : int
        Denoising steps of the run.
    latent : tuple of int
        (h, w) of the latent.
    """

    def __init__(
        self, pipe: Any, method: Method, prompt: Prompt, embeds: Tensor, steps: int, latent: tuple[int, int]
    ) -> None:
        self.adapter = adapter_for(pipe)
        self.method, self.prompt, self.embeds = method, prompt, embeds
        self.layers = method.select(self.adapter.layers(), latent)
        self.sizes = tuple(method.step_sizes(steps, prompt))
        self.state = method.begin(prompt)
        options = {k: v for k, v in vars(method).items() if not k.startswith("_")}
        self.trace = Trace(method.name, options, tuple(e.label for e in prompt.entities))

    def move(self, latents: Tensor, step: int, timestep: Tensor) -> Tensor:
        """The latent moved for a denoising step about to run; unchanged outside the guided steps."""
        if step >= len(self.sizes) or not self.sizes[step]:
            return latents
        began = time.perf_counter()
        with paused(self.adapter.pipe), frozen(self.adapter.denoiser):
            loss, grad = gradient(
                self.adapter, self.method, self.prompt, self.layers, latents, timestep, self.embeds,
                step=step, state=self.state,
            )  # fmt: skip
        finite = bool(torch.isfinite(grad).all())
        change = self.sizes[step] * self.method.direction(grad) if finite else torch.zeros_like(grad)
        self.trace.add(
            {
                "step": step,
                "timestep": float(timestep),
                "step_size": self.sizes[step],
                "loss": float(loss.total.detach()),
                **loss.terms,
                "gradient_norm": float(grad.norm()),
                "moved": float(change.pow(2).mean().sqrt()),
                "seconds": time.perf_counter() - began,
                "skipped": not finite,
            },
            loss.regions,
        )
        return (latents - change).to(latents.dtype)

    def on_step_end(self, pipe: Any, step: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's ``callback_on_step_end``: moves the latent for the step that follows."""
        following = step + 1
        if following < len(pipe.scheduler.timesteps):
            tensors["latents"] = self.move(tensors["latents"], following, pipe.scheduler.timesteps[following])
        return tensors
