"""Prediction of clean latents at a denoising step, from the output that a pipeline passes to its scheduler."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from elakit.guidance.engine import noise_levels


class Steps:
    """The model output and the latents that a scheduler received in its latest step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.levels: list[float] | None = None  # ratio of noise to signal before each step
        self.last: tuple[Tensor, Tensor] | None = None  # output of the model, latents

    def predicted(self, step: int) -> Tensor | None:
        """Clean latents predicted at the latest step; None before the first step, or if the prediction type is unknown.

        Parameters
        ----------
        step : int
            Latest step, counted from 0; it determines the noise level.
        """
        if self.last is None:
            return None
        if self.levels is None or len(self.levels) != len(self.scheduler.timesteps):
            self.levels = noise_levels(self.scheduler)
        return predicted_clean(self.scheduler, *self.last, self.levels[step])


@contextmanager
def watched_steps(scheduler: Any) -> Iterator[Steps]:
    """Context that records the arguments of a scheduler's steps without changing the steps.

    Parameters
    ----------
    scheduler : diffusers.SchedulerMixin

    Yields
    ------
    Steps
        Model output and latents of the latest step; each call of ``scheduler.step`` overwrites them.
    """
    steps, plain, had = Steps(scheduler), scheduler.step, "step" in vars(scheduler)

    # by name, since solvers of CogView3-Plus take further arguments before the latents
    names = list(inspect.signature(plain).parameters)

    @wraps(plain)  # pipelines inspect its signature for a generator argument
    def step(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        steps.last = given["model_output"], given["sample"]
        return plain(*args, **kwargs)

    scheduler.step = step
    try:
        yield steps
    finally:
        if had:
            scheduler.step = plain
        else:
            del scheduler.step


def predicted_clean(scheduler: Any, output: Tensor, latents: Tensor, level: float) -> Tensor | None:
    """Compute the clean latents that a model output predicts, according to the scheduler's prediction type.

    Parameters
    ----------
    scheduler : diffusers.SchedulerMixin
    output : Tensor
        Output of the model, after classifier-free guidance.
    latents : Tensor
        Latents before the step, as the scheduler received them.
    level : float
        Ratio of noise to signal in the latents, as `elakit.guidance.engine.noise_levels` computes it.

    Returns
    -------
    Tensor or None
        Clean latents in float32, in the shape of `latents`; None if the scheduler has an unknown prediction type.

    Notes
    -----
    Let x0 be the clean latents and e the noise. In diffusion, latents of unit variance are x = s * x0 + n * e, with
    s = 1 / sqrt(1 + level²) and n = level * s. The output depends on the prediction type: e for "epsilon",
    s * e - n * x0 for "v_prediction", and x0 for "sample". In flow matching, latents are x = (1 - t) * x0 + t * e, with
    t = level / (1 + level), and the output is e - x0.

    Examples
    --------
    The latents are mixed from clean latents of 1 and noise of -2. From the noise, the 1 is computed again:

    >>> from diffusers import DDIMScheduler
    >>> scheduler = DDIMScheduler()
    >>> scheduler.set_timesteps(3)
    >>> clean, noise = torch.ones(1), torch.full((1,), -2.0)
    >>> latents = scheduler.add_noise(clean, noise, scheduler.timesteps[1:2])
    >>> predicted_clean(scheduler, noise, latents, noise_levels(scheduler)[1])
    tensor([1.0000])
    """
    kind = getattr(scheduler.config, "prediction_type", None)
    flow = kind == "flow_prediction" or getattr(scheduler.config, "use_flow_sigmas", False)
    output, latents = output.float(), latents.float()
    if hasattr(scheduler, "precondition_outputs"):  # EDM: the output is scaled and added to the latents
        clean: Tensor = scheduler.precondition_outputs(latents, output, level)
        return clean
    if flow or (kind is None and hasattr(scheduler, "sigmas") and not hasattr(scheduler, "alphas_cumprod")):
        return latents - level / (1 + level) * output
    signal = (1 + level**2) ** -0.5
    noise = level * signal
    # Schedulers of the other kind (Euler) keep latents x0 + level e, whose variance is not 1.
    latents = latents * signal if float(torch.as_tensor(scheduler.init_noise_sigma)) > 1.0001 else latents
    if kind == "epsilon":
        return (latents - noise * output) / signal
    if kind == "v_prediction":
        return signal * latents - noise * output
    return output if kind == "sample" else None
