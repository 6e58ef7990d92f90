"""Layout guidance: the loss by hand, the layers that it reads, and how far latents move."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from column_maps import APART, EVEN, HALVES, LEFT, NONE, PAIR, PROMPT, RIGHT, attention, total
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from tiny import tiny_pipeline

from elakit.generation import generate
from elakit.guidance import ELA, Attention, Guide, LatentStep
from elakit.guidance.engine import noise_levels
from elakit.guidance.layout_guidance import LayoutGuidance
from elakit.models import adapter_for
from elakit.prompt import parse


def test_layout_guidance_averages_heads_entities_and_layers_of_any_size() -> None:
    fine = attention((EVEN, LEFT, EVEN, LEFT), (EVEN, EVEN, EVEN, EVEN)).cross[0]
    coarse = attention(tuple(EVEN[:2, :2] for _ in range(4))).cross[0]
    # Outside: of the car 0 and 1/2, of the bird 1 and 1/2; of even maps 1/2 each.
    wanted = ((0 + 0.25) / 2 + (1 + 0.25) / 2) / 2
    assert total(LayoutGuidance(HALVES), Attention((fine,))) == pytest.approx(wanted)
    assert total(LayoutGuidance(HALVES), Attention((coarse, fine))) == pytest.approx((0.25 + wanted) / 2)
    method = LayoutGuidance(HALVES)
    loss = method.loss(Attention((coarse, fine)), PROMPT, 0, method.begin(PROMPT, 50))
    assert loss.regions is not None
    assert np.array_equal(loss.regions, np.stack([LEFT.numpy() > 0, RIGHT.numpy() > 0]))


def test_layout_guidance_ends_after_the_update_of_the_pass_that_meets_the_threshold() -> None:
    method = LayoutGuidance(HALVES)
    state = method.begin(PROMPT, 50)
    apart, crossed = Attention(APART.cross), attention((NONE, RIGHT, NONE, LEFT))
    assert not method.loss(crossed, PROMPT, 0, state).enough
    assert not method.loss(apart, PROMPT, 0, state).enough  # below .2, and still followed by its update
    assert method.loss(crossed, PROMPT, 1, state).enough


def test_layout_guidance_truncates_boxes_to_whole_locations() -> None:
    method = LayoutGuidance([(0.2, 0, 0.7, 1), (0.5, 0, 1, 1)])  # columns .8 to 2.8 of four become 0 to 2
    masks = method.loss(APART, PROMPT, 0, method.begin(PROMPT, 50)).regions
    assert masks is not None
    assert masks[0].astype(int).tolist() == [[1, 1, 0, 0]] * 4


@pytest.mark.parametrize(
    ("method", "refinements"),
    [(LayoutGuidance(HALVES, iterations=3, until=0), 2), (ELA(anchor=LatentStep(start=0)), 0)],
)
def test_a_image_is_moved_alike_however_the_scheduler_keeps_its_latents(method: Any, refinements: int) -> None:
    start = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    moves = []
    for kind in (DDIMScheduler, EulerDiscreteScheduler):
        pipe = tiny_pipeline(torch.float64)
        pipe.scheduler = kind.from_config(pipe.scheduler.config, timestep_spacing="leading")
        pipe.scheduler.set_timesteps(10)
        noise = noise_levels(pipe.scheduler)[1]
        # Euler's latents are signal plus noise, DDIM's of unit variance
        spread = math.sqrt(1 + noise**2) if kind is EulerDiscreteScheduler else 1.0
        prompt, adapter = parse(PAIR, pipe), adapter_for(pipe)
        guide = Guide(pipe, method, prompt, adapter.encode(prompt.text, guided=False), (8, 8))
        if kind is EulerDiscreteScheduler:
            pipe.scheduler._step_index = 1  # as in the middle of a run
        moved = guide.move(start * spread, 1, pipe.scheduler.timesteps[1])
        frame = guide.traces[0].to_frame()
        assert frame.refinements.tolist() == [refinements]
        assert frame.moved[1] == pytest.approx(float((moved / spread - start).pow(2).mean().sqrt()), rel=1e-2)
        moves.append(moved / spread - start)
    assert float(moves[0].abs().max()) > 1e-4
    torch.testing.assert_close(moves[0], moves[1], rtol=1e-2, atol=1e-3 * float(moves[0].abs().max()))


def test_layout_guidance_reads_the_middle_and_the_first_upward_block() -> None:
    adapter = adapter_for(tiny_pipeline())
    blocks = {layer.name.split(".attentions")[0] for layer in LayoutGuidance(HALVES).select(adapter.layers(), (8, 8))}
    assert blocks == {"mid_block", "up_blocks.0"}
    everything = LayoutGuidance(HALVES, layers="all").select(adapter.layers(), (8, 8))
    assert {layer.factor for layer in everything} == {1, 2}
    transformer: Any = [SimpleNamespace(name=f"transformer_blocks.{i}.attn2", place="block") for i in range(2)]
    assert LayoutGuidance(HALVES).select(transformer, (8, 8)) == tuple(transformer)


def test_maps_of_different_sizes_are_guided_together() -> None:
    method = LayoutGuidance(HALVES, layers="all", guided=1)
    run = generate(tiny_pipeline(), PAIR, steps=2, guidance=method, record=False, progress=False)
    assert run.guidance is not None
    assert run.guidance.regions is not None
    assert run.guidance.regions.sizes == {"step": 2, "entity": 2, "y": 8, "x": 8}
