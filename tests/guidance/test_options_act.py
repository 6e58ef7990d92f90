"""Every option of every method acts: another value changes the plan, the loss, the search for noise or the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from method_options import HALVES, OPTIONS
from tiny import tiny_pipeline
from torch import Tensor

from elakit import generate
from elakit.guidance import METHODS, Attention, build, method_options
from elakit.guidance.engine import noise_levels
from elakit.guidance.method import NoiseSearch
from elakit.models import adapter_for
from elakit.prompt import Prompt, parse

PAIR = "a [red car] and a [bird] of a clock"
APART = [(0, 0, 0.25, 1), (0.75, 0, 1, 1)]
# Another value of an option, where half, twice or the opposite of its value is none: of one method's, or of all.
OTHER: dict[str, Any] = {
    "layers": "down", "size": 4, "regions": APART, "layout": "maps", "start": 0.4, "guided": 0.25, "every": 2,
    "anchor.start": 0.6, "anchor.guided": 0.2, "anchor.every": 2, "anchor.gradient": "raw", "anchor.needed": 50.0,
    "anchor.enough": 50.0, "localize.differentiation": "subtract-mean", "localize.binarization": "otsu",
    "localize.threshold": 0.9, "localize.quantile": 0.3, "localize.background": "start", "localize.smooth": 1.5,
    "localize.min_area": 12, "localize.lock_from": 0, "variation": "repaired", "binding": (), "refine": (),
    "clusters": 1, "deleaker.start": 0.7, "deleaker.average_from": 0.7, "bounded-attention.regions": HALVES,
    "ela.size": 8, "self-cross.gate": 0.0,
}  # fmt: skip
# What an option needs to act on random maps, by method or by option.
WITH: dict[str, dict[str, Any]] = {
    "ela": {"anchor.needed": None},
    "localize.lock_from": {"anchor.start": 0.0, "anchor.needed": None},
    "anchor.enough": {"anchor.start": 0.0, "anchor.needed": None},
    "localize.quantile": {"localize.binarization": "quantile"},
    "deleaker": {"threshold": -0.5, "start": 0, "average_from": 0},
    "initno": {"stop_cross": 0.0},
    "stop_conflict": {"stop_cross": 1.0},
    "max_kl": {"learning_rate": 1.0},
    "bounded-attention": {"iterations": 2},
    "attention-regulation": {"iterations": 2, "step_size": 1.0},
}
CASES = [(name, option.name) for name in METHODS for option in method_options(METHODS[name])]


@cache
def pipeline() -> Any:
    return tiny_pipeline()


@cache
def prompt() -> Prompt:
    return parse(PAIR, pipeline())


def attention(seed: int, noise: Tensor | None = None) -> Attention:
    """Uneven attention of 8 x 8 locations, which depends on the noise if some is given."""
    random = torch.Generator().manual_seed(seed)
    shift = torch.zeros(8, 8) if noise is None else noise[0].mean(0)
    floors, scores = (2 * torch.randn(1, prompt().length, n, n, generator=random) for n in (1, 8))
    cross = (floors.softmax(1) + (scores * (1 + shift)).softmax(1)) / 2
    own = (2 * torch.randn(1, 8, 8, 64, generator=random) + shift.flatten()).softmax(-1).unflatten(-1, (8, 8))
    return Attention((cross,), (own,))


def planned(method: Any) -> Any:
    """Layers that are read, and the updates of 50 steps."""
    pipeline().scheduler.set_timesteps(50)
    layers = method.select(adapter_for(pipeline()).layers(), (8, 8))
    return [layer.name for layer in layers], list(method.plan(noise_levels(pipeline().scheduler), prompt()))


def losses(method: Any) -> Any:
    """Losses of three steps, their regions, and the direction of a gradient."""
    state, found = method.begin(prompt(), 10), []
    for step in range(3):
        loss = method.loss(attention(step), prompt(), step, state)
        refinement = None if loss.refinement is None else float(loss.refinement)
        regions = None if loss.regions is None else loss.regions.tolist()
        found.append((float(loss.total), refinement, loss.goal, loss.enough, regions))
    return found, method.direction(torch.arange(4.0)).tolist()


def searched(method: Any) -> Any:
    """Noise that a method searches for."""
    if not isinstance(method, NoiseSearch):
        return None
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return method.search(start, lambda noise: attention(0, noise), prompt())[0].tolist()


def run(method: Any) -> Any:
    """Input of each pass of a short run, and its image."""
    seen: list[bytes] = []
    handle = pipeline().unet.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().numpy().tobytes()))
    try:
        image = generate(pipeline(), PAIR, seed=1, steps=3, guidance=method, record=False, progress=False).image
    finally:
        handle.remove()
    return seen, np.asarray(image).tobytes()


EFFECTS: tuple[Callable[[Any], Any], ...] = (planned, losses, searched, run)  # the cheapest first


@cache
def usual(effect: Callable[[Any], Any], name: str, needed_by: str) -> Any:
    return effect(build(METHODS[name], setting(name, needed_by)))


def setting(name: str, option: str) -> dict[str, Any]:
    """Options with which another value of one option is compared."""
    return OPTIONS.get(name, {}) | WITH.get(name, {}) | WITH.get(option, {})


def changed(value: Any) -> Any:
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value / 2 if isinstance(value, float) and value else value + 1
    raise AssertionError(f"no second value for {value!r}: add it to OTHER")


@pytest.mark.parametrize(("name", "option"), CASES)
def test_another_value_of_any_option_changes_the_run(name: str, option: str) -> None:
    base = setting(name, option)
    default = {each.name: each.default for each in method_options(METHODS[name])}[option]
    given = OTHER.get(f"{name}.{option}", OTHER.get(option))
    value = changed(base.get(option, default)) if given is None else given
    other = build(METHODS[name], base | {option: value})
    needed_by = option if option in WITH else ""
    assert any(effect(other) != usual(effect, name, needed_by) for effect in EFFECTS)
