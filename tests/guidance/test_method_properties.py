"""Properties of every guidance method: correct gradients, finite losses, order of entities, one entity, whole runs.

A method that is added to `elakit.guidance.METHODS` is tested here automatically.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from method_options import OPTIONS
from tiny import tiny_pipeline
from word_maps import PAIR, hand_made

from elakit.generation import generate
from elakit.guidance import EBAMA, METHODS, AttendAndExcite, Attention, DivideAndBind, NoiseSearch, SynGen
from elakit.guidance.engine import gradient, noise_levels
from elakit.guidance.method import EditsScores
from elakit.models import adapter_for
from elakit.prompt import parse
from elakit.run import open_run

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
def test_an_image_of_one_entity_is_left_alone(method: Any) -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, "a [red car]", seed=2, steps=2, record=False, progress=False)
    run = generate(pipe, "a [red car]", seed=2, steps=2, guidance=method, record=False, progress=False)
    assert np.array_equal(np.asarray(plain.image), np.asarray(run.image))
    assert run.guidance is not None
    assert run.guidance.to_frame().empty
    assert not run.guidance.searched


KINDS = (
    "constant",
    "zero",
    "a noun gets nothing",
    "a noun gets next to nothing",
    "a noun takes all",
    "a location takes all",
)


@every_method
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_finite_where_maps_say_nothing(method: Any, kind: str) -> None:
    prompt = hand_made()
    state = method.begin(prompt, 50)
    evenly = kind in ("constant", "a noun gets nothing", "a noun gets next to nothing")
    cross = torch.full((2, 7, 4, 4), 1 / 7 if evenly else 0.0)
    own = torch.full((2, 4, 4, 4, 4), 1 / 16 if evenly else 0.0)
    if kind == "a noun gets nothing":
        cross[:, 2] = 0
    elif kind == "a noun gets next to nothing":
        cross[:, 2] = 1e-42
    elif kind == "a noun takes all":
        cross[:, 2] = 1
    elif kind == "a location takes all":
        cross[:, 2, 0, 0] = 1
    leaves = cross.requires_grad_(True), own.requires_grad_(True)
    for step in (0, 1):
        loss = method.loss(Attention((cross,), (own,)), prompt, step, state)
        assert math.isfinite(float(loss.total.detach()))
        assert all(type(term) is float and math.isfinite(term) for term in loss.terms.values())
        if loss.total.requires_grad:
            grads = torch.autograd.grad(loss.total, leaves, allow_unused=True)
            assert all(bool(torch.isfinite(grad).all()) for grad in grads if grad is not None)


@pytest.mark.parametrize(
    "method", [one for one in EVERY if not isinstance(one, EditsScores)], ids=lambda method: method.name
)
def test_a_whole_run_is_guided_traced_and_reopened(method: Any, tmp_path: Path) -> None:
    refined = hasattr(method, "refine")
    if refined:
        method = replace(method, refine=((0.0, 2.0, 2),))  # more than there can be, so both tries are made
    if hasattr(method, "until"):
        method = replace(method, until=0)  # less than there can be, so no step is left out
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=5, steps=4, record=False, progress=False)
    run = generate(pipe, PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    trace = run.guidance
    assert trace is not None
    assert run.settings["method"] == run.label == method.name
    assert np.any(np.asarray(run.image) != np.asarray(plain.image))
    frame = trace.to_frame()
    moved = [i for i, update in enumerate(method.plan(noise_levels(pipe.scheduler), run.prompt)) if update.size]
    assert frame.index.tolist() == moved
    assert np.isfinite(frame.loss).all()
    assert not frame.skipped.any()
    assert frame.moved.iloc[0] > 0
    if refined:
        assert frame.refinements.tolist() == [2, *[0] * (len(moved) - 1)]
    assert json.loads(json.dumps(trace.options)).keys() == trace.options.keys()
    assert bool(trace.searched) == isinstance(method, NoiseSearch)
    run.save(tmp_path / "run")
    reopened = open_run(tmp_path / "run").guidance
    assert reopened is not None
    assert reopened.rows == trace.rows
    assert (reopened.regions is None) == (trace.regions is None)


@pytest.mark.parametrize(
    "method", [AttendAndExcite(), SynGen(), DivideAndBind(), EBAMA()], ids=lambda method: method.name
)
def test_layers_of_the_chosen_size_are_read(method: Any) -> None:
    layers = adapter_for(tiny_pipeline()).layers()
    assert {layer.factor for layer in method.select(layers, (8, 8))} == {1}
    finer = {1} if isinstance(method, DivideAndBind) else set()  # of attributes
    assert {layer.factor for layer in replace(method, size=4).select(layers, (8, 8))} == {2} | finer
    if finer:
        assert {layer.factor for layer in replace(method, size=4, binding=()).select(layers, (8, 8))} == {2}
