"""DenseDiffusion: the change of the scores by hand, against the attention that layers really use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from guided_families import SIZE, shared
from tiny import tiny_pipeline

from elakit import generate
from elakit.attention.rescoring import Change, rescored
from elakit.attention.taps import tap
from elakit.guidance import DenseDiffusion
from elakit.guidance.dense_diffusion import covered, modulation, of_words, same_region
from elakit.models import adapter_for
from elakit.prompt import parse

PAIR = "a [red car] and a [blue bird]"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def test_scores_go_up_to_the_largest_inside_and_down_to_the_lowest_elsewhere() -> None:
    scores = torch.tensor([[[-1.0, 0.0, 3.0], [2.0, 2.0, 4.0]]])
    belongs = torch.tensor([[True, False, False], [False, False, True]])
    # first location: all of the way; second: a quarter
    changed = scores + modulation(scores, belongs, torch.tensor([[1.0], [0.25]]))
    assert changed.tolist() == [[[3.0, -1.0, -1.0], [2.0, 2.0, 4.0]]]


def test_small_regions_change_more_and_the_rest_of_the_image_is_a_region() -> None:
    regions = torch.tensor([[True, False, False, False], [False, True, False, False]])
    assert covered(regions).tolist() == [0.25, 0.25, 0.5, 0.5]
    assert same_region(regions).int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert of_words(regions, [(1, 2), (4,)], 6).int().tolist() == [
        [0, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0] * 6, [0] * 6,
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-alpha", "pixart-sigma"])
def test_every_layer_attends_with_the_changed_scores(name: str) -> None:
    pipe = shared(name)
    adapter = adapter_for(pipe)
    layers = adapter.layers()
    every = [*layers, *adapter.self_layers(layers)]
    expected: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    times: set[float] = set()

    def change(site: Any, scores: Any) -> Change:
        values = scores()
        bias = modulation(values, torch.arange(values.shape[-1]) % 2 == 0, torch.tensor([[0.4]]))
        expected[site.layer.name] = (values + bias).softmax(-1)
        times.add(site.time)
        return Change(bias)

    def look(layer: Any, attend: Any, size: Any) -> None:
        found[layer.name] = attend(slice(-1, None))[0]

    with rescored(adapter, every, change), tap(every, look):
        generate(pipe, PAIR, seed=1, steps=2, record=False, progress=False, **SIZE)
    assert len(expected) == len(every)
    assert sorted(times) == sorted(float(t) / 1000 for t in pipe.scheduler.timesteps)
    for layer in every:
        wanted = expected[layer.name]
        if name.startswith("pixart") and layer.reads == "text":  # padding is masked as well
            wanted = wanted * (found[layer.name] > 0)
            wanted = wanted / wanted.sum(-1, keepdim=True)
        torch.testing.assert_close(found[layer.name], wanted, atol=1e-5, rtol=1e-4)


def test_kept_weights_change_the_output_and_nothing_else_does() -> None:
    """With every key kept the weights are those without a bias, and so is the image."""
    pipe = tiny_pipeline()
    adapter = adapter_for(pipe)
    plain = generate(pipe, PAIR, seed=1, steps=2, record=False, progress=False)

    def change(kept: tuple[int, ...]) -> Any:
        return lambda site, scores: Change(torch.randn_like(scores()), kept)

    with rescored(adapter, adapter.layers(), change(tuple(range(20)))):
        kept = generate(pipe, PAIR, seed=1, steps=2, record=False, progress=False)
    with rescored(adapter, adapter.layers(), change(())):
        changed = generate(pipe, PAIR, seed=1, steps=2, record=False, progress=False)
    difference = np.abs(np.asarray(kept.image, int) - np.asarray(plain.image, int)).max()
    assert difference <= 1 < np.abs(np.asarray(changed.image, int) - np.asarray(plain.image, int)).max()


def test_attention_is_drawn_into_the_regions_in_the_first_steps() -> None:
    pipe = tiny_pipeline()
    options: dict[str, Any] = {"seed": 2, "steps": 10, "progress": False}
    run = generate(pipe, PAIR, guidance=DenseDiffusion([LEFT, RIGHT]), **options)
    assert run.guidance is not None
    frame = run.guidance.to_frame()
    assert frame.index.tolist() == [0, 1, 2]
    weak = generate(pipe, PAIR, guidance=DenseDiffusion([LEFT, RIGHT], strength=0, self_strength=0), **options)
    assert weak.guidance is not None
    assert frame.outside.iloc[0] < weak.guidance.to_frame().outside.iloc[0]


def test_words_have_the_states_of_a_text_of_their_own() -> None:
    pipe = tiny_pipeline()
    adapter, prompt = adapter_for(pipe), parse(PAIR, pipe)
    plain = adapter.encode(prompt.text)
    states = DenseDiffusion([LEFT, RIGHT]).encode(adapter, prompt, plain).inputs["encoder_hidden_states"]
    before = plain.inputs["encoder_hidden_states"]
    bird = adapter.encode("a blue bird").inputs["encoder_hidden_states"]
    torch.testing.assert_close(states[:, 5:8], bird[:, 1:4])
    assert not torch.allclose(states[:, 5:8], before[:, 5:8], atol=1e-3)
    others = [0, 4, *range(8, 20)]  # start, "and", end and padding
    assert torch.equal(states[:, others], before[:, others])


def test_the_order_of_entities_and_the_batch_do_not_matter() -> None:
    pipe = tiny_pipeline()
    method = DenseDiffusion([LEFT, RIGHT], guided=1)
    options: dict[str, Any] = {"steps": 3, "guidance": method, "record": False, "progress": False}
    for run in generate(pipe, PAIR, seed=[1, 2], **options):
        alone = generate(pipe, PAIR, seed=run.seed, **options)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
