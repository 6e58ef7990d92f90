"""Attend-and-Excite: the loss by hand, and the latents that the pipeline of diffusers takes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionAttendAndExcitePipeline
from tiny import tiny_pipeline
from word_maps import MIDDLE, PAIR, SIDES, hand_made, loss_of, of_shares

from elakit.generation import generate
from elakit.guidance import Guide
from elakit.guidance.attend_excite import AttendAndExcite
from elakit.guidance.engine import gradient
from elakit.models import adapter_for
from elakit.prompt import parse


def test_attend_and_excite_takes_the_largest_smoothed_share_of_the_most_neglected() -> None:
    # The car has .9 of the middle location of nine, .1 of the others; the rest is shared evenly. Smoothed, the car is
    # largest in the middle, .1 + .8 MIDDLE^2, and the bird in a corner, .225 - .2 SIDES^2, as reflection turns both
    # neighbors of a corner into the middle row and column.
    shares = torch.full((5, 3, 3), 0.225)
    shares[1] = 0.1
    shares[:, 1, 1] = 0.025
    shares[1, 1, 1] = 0.9
    loss = loss_of(AttendAndExcite(), of_shares(shares), hand_made())
    car, bird = 0.1 + 0.8 * MIDDLE**2, 0.225 - 0.2 * SIDES**2
    assert (car, bird) == (pytest.approx(0.3655285), pytest.approx(0.1890646))
    assert float(loss.total) == pytest.approx(1 - bird, abs=1e-7)
    assert loss.terms == {"neglect": pytest.approx(1 - (car + bird) / 2, abs=1e-7)}


def test_a_noun_of_two_tokens_has_the_mean_of_their_maps() -> None:
    shares = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.06, 0.04])[:, None, None].expand(-1, 3, 3)
    loss = loss_of(AttendAndExcite(), of_shares(shares), hand_made(pieces=2))
    assert float(loss.total) == pytest.approx(1 - 0.18, abs=1e-6)


Taken = tuple[torch.Tensor, float, torch.Tensor]  # latent before an update, its loss, latent after


def of_ours(pipe: Any, method: AttendAndExcite, steps: int, monkeypatch: pytest.MonkeyPatch) -> list[Taken]:
    """Every update of a guided run of elakit."""
    seen: list[tuple[int, torch.Tensor, float]] = []
    ends: dict[int, torch.Tensor] = {}
    move = Guide.move

    def watched(*args: Any, **options: Any) -> Any:
        losses, grad = gradient(*args, **options)
        seen.append((options["step"], args[4].clone(), float(losses[0].total.detach())))
        return losses, grad

    def moving(guide: Guide, latents: torch.Tensor, step: int, timestep: torch.Tensor) -> torch.Tensor:
        ends[step] = move(guide, latents, step, timestep)
        return ends[step]

    with monkeypatch.context() as patch:
        patch.setattr("elakit.guidance.engine.gradient", watched)
        patch.setattr(Guide, "move", moving)
        generate(pipe, PAIR, seed=5, steps=steps, guidance_scale=3, guidance=method, record=False, progress=False)
    following = [*seen[1:], (-1, None, None)]
    return [
        (z, loss, after if at == step else ends[step])
        for (step, z, loss), (at, after, _) in zip(seen, following, strict=True)
    ]


def of_diffusers(pipe: Any, steps: int, tries: int = 20, **options: Any) -> list[Taken]:
    """Every update of a run of diffusers' pipeline from the same noise; `tries` is fixed to 20 inside it."""
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler", "safety_checker", "feature_extractor")
    parts = {name: getattr(pipe, name) for name in names}
    their: Any = StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    their.set_progress_bar_config(disable=True)
    taken: list[Taken] = []
    update = their._update_latent

    def watched(latents: torch.Tensor, loss: torch.Tensor, step_size: float) -> torch.Tensor:
        moved = update(latents, loss, step_size)
        taken.append((latents.detach(), float(loss.detach()), moved.detach()))
        return moved

    their._update_latent = watched
    their._perform_iterative_refinement_step = partial(
        their._perform_iterative_refinement_step, max_refinement_steps=tries
    )
    adapter, prompt = adapter_for(pipe), parse(PAIR, pipe)
    conditioning = adapter.encode(prompt.text, guided=True)
    their(
        prompt=None,
        token_indices=[entity.token_indices[0] for entity in prompt.entities],
        latents=adapter.noise(torch.Generator().manual_seed(5), 32, 32),
        height=32,
        width=32,
        num_inference_steps=steps,
        guidance_scale=3,
        attn_res=(8, 8),
        output_type="latent",
        **conditioning.call,
        **options,
    )
    return taken


def assert_same(ours: list[Taken], theirs: list[Taken]) -> None:
    # theirs smooths with a kernel in single precision, whatever the model's
    for (z, loss, moved), (their_z, their_loss, their_moved) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(z, their_z, rtol=0, atol=1e-7)
        assert loss == pytest.approx(their_loss, abs=1e-8)
        torch.testing.assert_close(moved, their_moved, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("scale", "refined"), [(20.0, False), (1.0, True)])
def test_attend_and_excite_moves_the_latent_as_diffusers_does(
    scale: float, refined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DDIM does not scale the model's input; the threshold is out of reach, so that all tries are made
    pipe = tiny_pipeline(torch.float64)
    method = AttendAndExcite(
        step_size=scale, guided=0.5, size=8, refine=((0.0, 0.9999, 3), (0.25, 0.9999, 3)) if refined else ()
    )
    ours = of_ours(pipe, method, 4, monkeypatch)
    theirs = of_diffusers(
        pipe, 4, 3, scale_factor=scale, max_iter_to_alter=2, thresholds={0: 0.9999, 1: 0.9999} if refined else {}
    )
    assert len(ours) == (8 if refined else 2)
    assert float((ours[0][0] - ours[-1][2]).abs().max()) > 1e-3
    assert_same(ours, theirs)


def test_refinement_ends_at_its_threshold_where_diffusers_takes_one_step_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(torch.float64)
    free = AttendAndExcite(step_size=0.05, size=8, refine=((0.0, 1.0, 4),))
    losses = [loss for _, loss, _ in of_ours(pipe, free, 2, monkeypatch)]
    assert losses == sorted(losses, reverse=True)
    least = 1 - (losses[1] + losses[2]) / 2  # reached by the second step
    ours = of_ours(pipe, replace(free, refine=((0.0, least, 20),)), 2, monkeypatch)
    theirs = of_diffusers(pipe, 2, scale_factor=0.05, max_iter_to_alter=1, thresholds={0: least})
    assert len(ours) == 3  # two, and the one that follows
    assert len(theirs) == 4
    assert_same(ours, theirs[:3])
