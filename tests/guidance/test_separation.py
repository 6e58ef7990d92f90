"""Before regions can be localized, ELA moves the maps of different entities apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from elakit.errors import SettingError
from elakit.generation import generate
from elakit.guidance import CONFORM, ELA, Attention, LatentStep, Separation
from elakit.guidance.engine import gradient
from elakit.models import adapter_for
from elakit.prompt import parse

PAIR = "a [red car] and a [blue bird]"
HALVES = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]


def sizes(method: ELA, text: str = PAIR, steps: int = 25) -> list[float]:
    return [update.size for update in method.plan([1.0] * steps, parse(text, tiny_pipeline()))]


def test_all_steps_before_anchoring_separate() -> None:
    method = ELA(anchor=LatentStep(guided=0.08, step_size=0.1), separate=Separation(step_size=10))
    assert sizes(method) == [10] * 4 + [0.1, 0.05]


def test_nothing_is_separated_where_anchoring_starts_at_once_or_there_is_one_entity() -> None:
    assert sizes(ELA(anchor=LatentStep(start=0, guided=0.04)))[0] == 0.1
    assert sizes(ELA(anchor=LatentStep(guided=0.04), regions=HALVES))[0] == 0.1
    assert sizes(ELA(), "a [red car]") == []


def test_the_loss_is_that_of_conform_until_regions_can_be_localized() -> None:
    prompt = parse(PAIR, tiny_pipeline())
    ela, conform = ELA(anchor=LatentStep(start=0.5)), CONFORM()
    mine, theirs = ela.begin(prompt, 4), conform.begin(prompt, 4)
    for step in range(4):
        random = torch.Generator().manual_seed(step)
        attention = Attention((torch.rand(2, prompt.length, 8, 8, generator=random).softmax(1),))
        loss, same = ela.loss(attention, prompt, step, mine), conform.loss(attention, prompt, step, theirs)
        assert (float(loss.total) == float(same.total)) == (step < 2)
        assert (loss.regions is None) == (step < 2)
        assert ("contrast" in loss.terms) == (step < 2)


def test_copies_of_one_map_lose_more_than_maps_apart() -> None:
    prompt = parse("a [red car] and a [blue bird]", tiny_pipeline())
    left, right = torch.zeros(8, 8), torch.zeros(8, 8)
    left[:, :3], right[:, 5:] = 0.5, 0.5
    maps = torch.zeros(prompt.length, 8, 8)
    first, second = ([*e.token_indices, *e.attribute_indices] for e in prompt.entities)
    maps[first], maps[second] = left, right
    same = maps.clone()
    same[second] = left
    apart, copied = (
        float(ELA().loss(Attention((one[None],)), prompt, 0, ELA().begin(prompt, 25)).total) for one in (maps, same)
    )
    # cosines 1 within entities, 0 or 1 between them, and two rivals each: log(1 + 2 e^-2) and log(1 + 2)
    assert apart == pytest.approx(np.log1p(2 * np.exp(-2)), rel=1e-5)
    assert copied == pytest.approx(np.log(3), rel=1e-5)


def test_the_gradient_of_the_first_steps_agrees_with_central_differences() -> None:
    pipe = tiny_pipeline(torch.float64)
    adapter, prompt, method = adapter_for(pipe), parse(PAIR, pipe), ELA()
    embeds = adapter.encode(prompt.text, guided=False)
    pipe.scheduler.set_timesteps(10)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    layers = method.select(adapter.layers(), (8, 8))

    def at(z: torch.Tensor) -> tuple[float, torch.Tensor]:
        states = [method.begin(prompt, 10)]
        (loss,), grad = gradient(
            adapter, method, prompt, layers, z, pipe.scheduler.timesteps[0], embeds, step=0, states=states
        )
        return float(loss.total.detach()), grad

    _, grad = at(latents)
    for seed in range(3):
        along = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        numeric = (at(latents + 1e-5 * along)[0] - at(latents - 1e-5 * along)[0]) / 2e-5
        assert numeric == pytest.approx(float((grad * along).sum()), rel=1e-4)


def test_an_image_that_is_not_anchored_was_separated_and_its_trace_says_so() -> None:
    method = ELA(anchor=LatentStep(start=0.5, needed=2.0))  # the largest shortfall there is
    run = generate(tiny_pipeline(), PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    frame = run.guidance.to_frame()
    assert run.guidance.guided == (0, 1)
    assert frame["guided"].tolist() == [True, True, False]
    assert frame["contrast"].notna().tolist() == [True, True, False]
    assert run.guidance.regions.step.values.tolist() == [2]


def test_separation_follows_the_raw_gradient_and_anchoring_the_normalized_one() -> None:
    method = ELA(anchor=LatentStep(start=0.5, step_size=0.1, needed=None, enough=None, guided=0.5))
    run = generate(tiny_pipeline(), PAIR, seed=5, steps=4, guidance=method, record=False, progress=False)
    frame = run.guidance.to_frame()
    size = 64 * 4  # values of the latent
    assert frame["moved"].iloc[:2].tolist() == pytest.approx(
        (40 * frame["gradient_norm"].iloc[:2] / size**0.5).tolist()
    )
    assert frame["moved"].iloc[2:].tolist() == pytest.approx([0.1, 0.05], rel=1e-3)


def test_a_separation_without_effect_is_refused() -> None:
    with pytest.raises(SettingError, match=r"temperature=0\.2.*step_size=0"):
        Separation(step_size=0, temperature=0.2)
    with pytest.raises(SettingError, match=r"separate=.*step_size=10.*anchoring starts at the first step"):
        ELA(anchor=LatentStep(start=0), separate=Separation(step_size=10))
    with pytest.raises(SettingError, match=r"separate=.*step_size=10.*anchoring starts at the first step"):
        ELA(regions=HALVES, separate=Separation(step_size=10))
    with pytest.raises(SettingError, match=r"separate=0\.1.*a Separation, such as Separation"):
        ELA(separate=0.1)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"separate=.*temperature=1.*anchoring starts at the first step"):
        ELA(anchor=LatentStep(start=0), separate=Separation(temperature=1.0))
