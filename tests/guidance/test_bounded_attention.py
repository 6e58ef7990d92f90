"""Bounded Attention: masks, loss and clusters by hand, and bounds that hold in all passes of a run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guided_families import PAIR, SIZE, shared
from tiny import tiny_pipeline

import elakit.guidance.bounded_attention as bounded_attention
from elakit import generate
from elakit.attention.taps import tap
from elakit.guidance import Attention, BoundedAttention
from elakit.guidance.bounded_attention import assigned, clustered, hidden_words
from elakit.guidance.layout import layout_masks
from elakit.models import adapter_for
from elakit.prompt import parse

LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
WEST, EAST = (0.0, 0.0, 0.25, 1.0), (0.75, 0.0, 1.0, 1.0)


def test_words_are_hidden_outside_their_region_and_the_end_in_the_background() -> None:
    prompt = parse(PAIR, tiny_pipeline())  # start a red car and a blue bird end
    masks = torch.tensor([[True, False, False], [False, True, False]])
    seen = (hidden_words(masks, prompt, [1, 4, 5], 20, guidance=False) == 0).int().tolist()
    assert seen[0][:10] == [1, 0, 1, 1, 0, 0, 0, 0, 1, 1]
    assert seen[1][:10] == [1, 0, 0, 0, 0, 0, 1, 1, 1, 1]
    assert seen[2][:10] == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    guided = (hidden_words(masks, prompt, [1, 4, 5], 20, guidance=True) == 0).int().tolist()
    assert guided[:2] == seen[:2]
    assert guided[2][:10] == [1, 0, 1, 1, 0, 0, 1, 1, 1, 1]


def test_the_loss_of_attention_that_is_easily_counted() -> None:
    prompt = parse(PAIR, tiny_pipeline())
    method = BoundedAttention([WEST, EAST])
    cross = torch.zeros(1, 20, 1, 4, dtype=torch.float64)
    cross[0, 3, 0, 0] = cross[0, 7, 0, 3] = 0.6  # each noun in its own column
    cross[0, 2, 0, 1] = 0.1  # "red" in the background
    own = torch.zeros(1, 1, 4, 1, 4, dtype=torch.float64)
    own[0, 0, 0, 0, 0] = own[0, 0, 3, 0, 3] = 0.5
    own[0, 0, 1, 0, 3] = 0.25  # a location of the background attends to the bird
    loss = method.loss(Attention((cross,), (own,)), prompt, 0, method.begin(prompt, 50))
    car, bird = 1 - 0.6 / (0.6 + 2 * 0.1), 1 - 0.5 / (0.5 + 2 * 0.25)
    assert loss.terms == pytest.approx({"cross": car**2 / 2, "self": bird**2 / 2})
    assert float(loss.total) == pytest.approx(1.5 * car**2 + 0.5 * bird**2)
    assert loss.goal == pytest.approx(float(loss.total) / 2)


def test_clusters_are_groups_that_attend_alike_and_go_to_the_subject_that_covers_them() -> None:
    groups = np.array([0, 0, 1, 1, 2, 2])
    own = torch.from_numpy((groups[:, None] == groups) / 2.0)
    labels, centers = clustered(own, 3, None)
    assert len({tuple(np.flatnonzero(labels == one)) for one in range(3)} & {(0, 1), (2, 3), (4, 5)}) == 3
    again, _ = clustered(own, 3, centers)
    assert np.array_equal(again, labels)
    cross = torch.tensor([[0.9, 0.8, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.9, 0.9, 0.0, 0.0]], dtype=torch.float64)
    given = np.zeros((2, 1, 6), bool)
    given[0, 0, :3] = given[1, 0, 3:] = True
    masks = assigned(labels, cross, given, given)
    # the bird's attention at location 2 is outside its last region, but the cluster reaches there
    assert masks.astype(int).tolist() == [[[1, 1, 0, 0, 0, 0]], [[0, 0, 1, 1, 0, 0]]]
    lost = assigned(labels, torch.stack([cross[0], torch.zeros(6, dtype=torch.float64)]), given, given)
    assert lost[1, 0].tolist() == given[1, 0].tolist()  # a subject without a cluster gets its own region


def test_the_first_steps_move_the_latent_and_later_ones_are_only_bounded() -> None:
    plan = BoundedAttention([LEFT, RIGHT]).plan([1.0] * 50, parse(PAIR, tiny_pipeline()))
    assert [update.size for update in plan[:16]] == pytest.approx([8 - 0.4 * i for i in range(15)] + [0])
    assert {(update.repeats, update.until) for update in plan[:15]} == {(4, 0.2)}
    assert all(update.hold for update in plan)


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha"])
def test_in_all_passes_subjects_do_not_see_each_other(name: str) -> None:
    pipe = shared(name)
    adapter = adapter_for(pipe)
    layers = adapter.layers()
    own, cross = adapter.self_layers(layers)[-1], layers[-1]
    across: list[float] = []
    words: list[float] = []

    def look(layer: Any, attend: Any, size: Any) -> None:
        maps = attend(slice(None)).detach()
        car, bird = torch.from_numpy(layout_masks(method.regions, size, 2)).flatten(1)
        if layer.name == own.name:
            across.extend(maps[:, :, car][..., bird].amax((1, 2, 3)).tolist())
        else:
            words.append(float(maps[-1, :, bird][..., list(prompt.entities[0].token_indices)].max()))

    prompt = parse(PAIR, pipe)
    method = BoundedAttention([WEST, EAST], guided=1, iterations=2, step_size=0.5, last_step_size=0.1)
    with tap([own, cross], look):
        run = generate(pipe, PAIR, seed=2, steps=2, guidance=method, record=False, progress=False, **SIZE)
    # every row of the sampler's passes, with and without the prompt
    assert max(across) < 1e-6
    assert max(words) < 1e-6
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert frame.index.tolist() == [0, 1]
    assert (frame.moved > 0).all()


def test_gradient_passes_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Attention] = []
    loss = BoundedAttention.loss
    monkeypatch.setattr(
        BoundedAttention,
        "loss",
        lambda self, attention, *rest: (seen.append(attention), loss(self, attention, *rest))[1],
    )
    method = BoundedAttention([WEST, EAST], guided=1, iterations=1)
    generate(tiny_pipeline(), PAIR, seed=2, steps=1, guidance=method, record=False, progress=False)
    (attention,) = seen
    car = attention.cross[-1][:, 3]
    assert float(car[..., -1].max()) < 1e-6 < float(car[..., 1].min())  # hidden in the bird, seen in the background
    assert float(attention.own[-1][:, :, 0, :, -1].max()) < 1e-6 < float(attention.own[-1][:, :, 1].min())


def test_a_batch_is_made_of_single_runs_and_regions_follow_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(torch.float64)
    found: list[int] = []
    monkeypatch.setattr(bounded_attention, "clustered", lambda *given: (found.append(1), clustered(*given))[1])
    method = BoundedAttention([WEST, EAST], iterations=1, step_size=0.1, last_step_size=0.1)
    options: dict[str, Any] = {"steps": 5, "guidance": method, "record": False, "progress": False}
    for run in generate(pipe, PAIR, seed=[1, 2], **options):
        alone = generate(pipe, PAIR, seed=run.seed, **options)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
        assert run.guidance is not None
        assert alone.guidance is not None
        assert np.array_equal(run.guidance.regions, alone.guidance.regions)
    assert len(found) == 4 * 3  # the regions of four images in the last three of five steps
