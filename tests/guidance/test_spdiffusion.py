"""SPDiffusion: regions of a rehearsal by hand, the run starts again, and words are hidden where they do not belong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from guided_families import FAMILIES, PAIR, SIZE, shared
from tiny import tiny_pipeline

from elakit import generate
from elakit.errors import SettingError
from elakit.guidance import SPDiffusion
from elakit.guidance.holding import Holder
from elakit.guidance.method import Attention
from elakit.models import adapter_for
from elakit.pipeline_call import Progress
from elakit.prompt import parse


def similarity(side: int, groups: torch.Tensor) -> torch.Tensor:
    """Self-attention in which locations attend to those of their own group, (y, x, y, x)."""
    alike = (groups.flatten()[:, None] == groups.flatten()).double()
    return (alike / alike.sum(1, keepdim=True)).reshape(side, side, side, side)


def test_a_region_is_what_resembles_the_peak_of_one_concept_and_not_of_the_other() -> None:
    side = 6
    groups = torch.zeros(side, side)
    groups[:, 4:] = 1  # the bird's part; the car's is the rest but its first row
    groups[0] = 2
    maps = torch.full((2, side, side), 0.1, dtype=torch.float64)
    maps[0, 2, 2] = maps[1, 3, 4] = 0.9
    maps[0, 0, 5] = 5.0  # the outermost locations are left out: the largest value of the map counts for nothing
    regions = SPDiffusion().find(maps, similarity(side, groups))
    assert np.array_equal(regions[0], (groups == 0).numpy())
    assert np.array_equal(regions[1], (groups == 1).numpy())


def test_the_thresholds_are_shares_of_the_largest_value() -> None:
    own = torch.zeros(4, 4, 4, 4, dtype=torch.float64)
    own[..., 1, 1] = torch.tensor([[0.0, 0.09, 0.11, 1.0]] * 4)  # attention to the seed of the first concept
    maps = torch.zeros(2, 4, 4, dtype=torch.float64)
    maps[0, 1, 1], maps[0, 2, 2] = 1.0, 0.85
    maps[1, 2, 1] = 1.0
    assert SPDiffusion().find(maps, own)[0][0].tolist() == [False, False, True, True]
    assert SPDiffusion(self_threshold=0.05).find(maps, own)[0][0].tolist() == [False, True, True, True]
    # a lower threshold takes a location into the seed that nothing attends to, which halves every value alike
    assert SPDiffusion(cross_threshold=0.8).find(maps, own)[0][0].tolist() == [False, False, True, True]


def test_a_concept_without_a_peak_has_no_region() -> None:
    maps = torch.full((2, 4, 4), 0.2, dtype=torch.float64)
    maps[1, 2, 2] = 0.9
    groups = torch.zeros(4, 4)
    groups[2, 2] = 1
    first, second = SPDiffusion().find(maps, similarity(4, groups))
    assert not first.any() or not (first & second).any()
    assert second[2, 2]


def test_the_run_starts_anew_from_the_regions_of_its_first_two_plain_steps() -> None:
    pipe = tiny_pipeline()
    method = SPDiffusion()
    run = generate(pipe, PAIR, seed=3, steps=4, guidance=method, progress=False)
    assert run.recording.steps == (0, 1, 2, 3)  # the rehearsal is not recorded
    assert run.guidance is not None
    regions = run.guidance.regions
    assert regions is not None
    assert regions.step.values.tolist() == [0, 1, 2, 3]
    assert (regions.values == regions.values[0]).all()
    # the same regions, from the attention of two plain steps
    adapter = adapter_for(pipe)
    holder = Holder(adapter, method.select(adapter.layers(), (8, 8)), 1, reads_self=True)
    seen: list[Attention] = []

    def look(so_far: Progress) -> bool:
        seen.append(holder.attention(0))
        return so_far.step == 1

    with holder():
        generate(pipe, PAIR, seed=3, steps=4, record=False, progress=False, stop_if=look)
    state = method.begin(run.prompt, 4)
    method.rehearse(seen, run.prompt, state)
    assert np.array_equal(state.regions, regions.values[0])
    # words are hidden from the first step on: the run did not go on from the rehearsal
    car, bird = run.entity_maps().isel(step=0).values
    assert car[regions.values[0, 1]].max() < 1e-6 < car.max()
    assert bird[regions.values[0, 0]].max() < 1e-6 < bird.max()


def test_a_stochastic_sampler_draws_the_same_noise_after_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(scheduler="euler-ancestral")
    plain = generate(pipe, PAIR, seed=3, steps=4, record=False, progress=False)
    # without a region nothing is hidden, and the image is that of a plain run
    monkeypatch.setattr(SPDiffusion, "find", lambda self, maps, own: np.zeros(maps.shape, bool))
    run = generate(pipe, PAIR, seed=3, steps=4, guidance=SPDiffusion(), record=False, progress=False)
    assert np.array_equal(np.asarray(run.image), np.asarray(plain.image))


@pytest.mark.parametrize("name", FAMILIES)
def test_in_every_family_no_concept_is_attended_to_in_the_region_of_another(name: str) -> None:
    pipe = shared(name)
    run = generate(pipe, PAIR, seed=2, steps=3, guidance=SPDiffusion(), progress=False, **SIZE)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert frame.index.tolist() == [0, 1, 2]
    assert frame.outside.max() < 1e-6
    assert frame.attributes.max() < 1e-6


def test_images_of_a_batch_have_regions_of_their_own() -> None:
    pipe = tiny_pipeline()
    batch = generate(pipe, PAIR, seed=[0, 1, 2], steps=3, guidance=SPDiffusion(), progress=False)
    found = []
    for run in batch:
        alone = generate(pipe, PAIR, seed=run.seed, steps=3, guidance=SPDiffusion(), progress=False)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
        assert run.guidance is not None
        assert alone.guidance is not None
        assert np.array_equal(run.guidance.regions, alone.guidance.regions)
        found.append(run.guidance.regions.values[0].tobytes())
    assert len(set(found)) > 1  # or the test would show nothing


def test_without_a_rehearsal_nothing_is_hidden_silently() -> None:
    prompt = parse(PAIR, tiny_pipeline())
    with pytest.raises(SettingError, match=r"elakit\.generate"):
        SPDiffusion().hold(None, (4, 4), prompt, 0, SPDiffusion().begin(prompt, 4))
