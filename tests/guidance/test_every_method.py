"""Properties of every guidance method: correct gradients, a decreasing loss, invariance to the order of entities.

A method that is added to `elakit.guidance.METHODS` is tested here automatically.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_options import OPTIONS
from tiny import tiny_pipeline
from word_maps import hand_made

from elakit.generation import generate
from elakit.guidance import METHODS, Attention, SynGen
from elakit.guidance.engine import gradient
from elakit.models import adapter_for
from elakit.prompt import parse

PAIR = "a [red car] and a [blue bird]"
EVERY = [METHODS[name](**OPTIONS.get(name, {})) for name in METHODS] + [SynGen(lone_nouns=True)]
every_method = pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)

At = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


def setting(method: Any) -> tuple[At, torch.Tensor]:
    """A method's loss and gradient at a latent of the second of ten steps, after a first one, and such a latent."""
    pipe = tiny_pipeline(torch.float64)
    adapter, prompt = adapter_for(pipe), parse(PAIR, pipe)
    embeds = adapter.encode(prompt.text, guided=False)
    pipe.scheduler.set_timesteps(10)
    before, latents = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layers = method.select(adapter.layers(), (8, 8))
    kept = method.begin(prompt, 10)

    def at(z: torch.Tensor, step: int, state: Any) -> tuple[float, torch.Tensor]:
        timestep = pipe.scheduler.timesteps[step]
        (loss,), grad = gradient(adapter, method, prompt, layers, z, timestep, embeds, step=step, states=[state])
        return float(loss.total.detach()), grad

    at(before, 0, kept)
    return lambda z: at(z, 1, copy.deepcopy(kept)), latents


@every_method
def test_the_gradient_agrees_with_central_differences(method: Any) -> None:
    at, latents = setting(method)
    _, grad = at(latents)
    assert float(grad.abs().max()) > 0
    step = 1e-5
    for seed in range(3):
        direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numeric = (at(latents + step * direction)[0] - at(latents - step * direction)[0]) / (2 * step)
        assert numeric == pytest.approx(float((grad * direction).sum()), rel=1e-4, abs=1e-9)


@every_method
def test_one_slight_step_lowers_the_loss(method: Any) -> None:
    at, latents = setting(method)
    loss, grad = at(latents)
    direction = method.direction(grad)
    assert at(latents - 1e-3 * direction / direction.pow(2).mean().sqrt())[0] < loss


@every_method
def test_the_order_of_entities_does_not_matter(method: Any) -> None:
    turned = replace(method, regions=method.regions[::-1]) if getattr(method, "regions", None) is not None else method
    prompt = hand_made(pieces=2)
    reverse = replace(prompt, entities=prompt.entities[::-1])
    states = method.begin(prompt, 10), turned.begin(reverse, 10)
    random = torch.Generator().manual_seed(0)
    for step in (0, 1):
        cross = torch.randn(2, prompt.length, 4, 4, generator=random, dtype=torch.float64).softmax(1)
        own = torch.randn(2, 4, 4, 16, generator=random, dtype=torch.float64).softmax(-1).unflatten(-1, (4, 4))
        seen = Attention((cross,), (own,))
        one, other = method.loss(seen, prompt, step, states[0]), turned.loss(seen, reverse, step, states[1])
        assert float(one.total) != 0
        assert float(other.total) == pytest.approx(float(one.total), rel=1e-9)
        assert other.terms == pytest.approx(one.terms, rel=1e-9)


@every_method
def test_a_image_of_one_entity_is_left_alone(method: Any) -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, "a [red car]", seed=2, steps=2, record=False, progress=False)
    run = generate(pipe, "a [red car]", seed=2, steps=2, guidance=method, record=False, progress=False)
    assert np.array_equal(np.asarray(plain.image), np.asarray(run.image))
    assert run.guidance is not None
    assert run.guidance.to_frame().empty
    assert not run.guidance.searched
