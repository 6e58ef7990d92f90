"""Localization of ELA: it reproduces the paper's figure and follows the entities wherever the maps show them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from benchmarks.localization import load_figure
from elakit.generation import generate
from elakit.guidance import ELA, Anchors, Attention, FromMaps, LatentStep, RegionalAttention
from elakit.prompt import Entity, Prompt, Token


@pytest.mark.parametrize("rule", [FromMaps(), FromMaps.figure()], ids=["default", "figure"])
def test_the_regions_of_the_papers_figure_are_reproduced(rule: FromMaps) -> None:
    figure = load_figure()
    masks = rule.masks(torch.from_numpy(figure.maps), torch.from_numpy(figure.sot))
    cat, frog = ((a & b).sum() / (a | b).sum() for a, b in zip(masks, figure.masks, strict=True))
    assert cat >= 0.79
    assert frog >= 0.90


def blobs(*centers: tuple[float, float], side: int = 16) -> np.ndarray:
    """One Gaussian map per center (row, column), on a small pedestal."""
    y, x = np.indices((side, side))
    return np.stack([0.02 + 0.4 * np.exp(-((y - r) ** 2 + (x - c) ** 2) / 8) for r, c in centers])


LAYOUTS = {
    "row": [(8, 3), (8, 12)],
    "column": [(3, 8), (12, 8)],
    "diagonal": [(3, 3), (12, 12)],
    "three": [(3, 3), (3, 12), (12, 8)],
    "five": [(2, 2), (2, 13), (8, 8), (13, 2), (13, 13)],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_regions_follow_what_the_maps_show(name: str) -> None:
    centers = LAYOUTS[name]
    maps = blobs(*centers)
    masks = FromMaps().masks(torch.from_numpy(maps), torch.from_numpy(1 - maps.sum(0)))
    assert masks.sum(0).max() == 1
    for i, (row, column) in enumerate(centers):
        rows, columns = np.nonzero(masks[i])
        assert (rows.mean(), columns.mean()) == pytest.approx((row, column), abs=1)


def test_an_entity_in_front_of_another_takes_its_part_of_the_region() -> None:
    y, x = np.indices((16, 16))
    behind = np.where((abs(y - 8) < 6) & (abs(x - 8) < 6), 0.3, 0.01)
    front = np.where((abs(y - 8) < 2) & (abs(x - 8) < 2), 0.6, 0.01)
    masks = FromMaps().masks(torch.from_numpy(np.stack([behind, front])), torch.full((16, 16), 0.3))
    assert masks[1].sum() == 9
    assert masks[0].sum() == 11 * 11 - 9
    assert not (masks[0] & masks[1]).any()


def pair(car: float, bird: float | None = None, attributes: bool = False) -> tuple[Attention, Prompt]:
    """Attention with two entities side by side, of given strengths; positions are start, car, bird, end.

    With `attributes`, the word of each entity is also an attribute of the other one.
    """
    strengths = np.array([car, car if bird is None else bird])[:, None, None]
    maps = strengths * np.stack([np.eye(1, 16, 4).repeat(16, 0), np.eye(1, 16, 12).repeat(16, 0)])
    rest = (1 - maps.sum(0)) / 2
    cross = torch.from_numpy(np.stack([rest, *maps, rest]))[None]
    crossed = ((2,), (1,)) if attributes else ((), ())
    entities = (
        Entity("car", "car", (), (1,), crossed[0], "car"),
        Entity("bird", "bird", (), (2,), crossed[1], "bird"),
    )
    tokens = (Token(1, "car", "car", 0), Token(2, "bird", "bird", 1))
    return Attention((cross,)), Prompt("car bird", entities, tokens, 3, 4)


def test_an_image_whose_entities_are_anchored_is_not_guided() -> None:
    method = ELA(anchor=LatentStep(needed=0.5, enough=0.2))
    anchored, prompt = pair(0.9)
    neglected, _ = pair(0.1)
    assert method.loss(anchored, prompt, 5, Anchors()).enough
    assert not method.loss(neglected, prompt, 5, Anchors()).enough
    # once guidance has started, the lower threshold counts
    middle, _ = pair(0.7)
    state = Anchors()
    assert not method.loss(neglected, prompt, 5, state).enough
    assert 0.2 < method.loss(middle, prompt, 6, state).terms["shortfall"] < 0.5
    assert not method.loss(middle, prompt, 6, state).enough
    assert method.loss(anchored, prompt, 7, state).enough


def test_the_weakest_entity_decides_whether_an_image_is_guided() -> None:
    method = ELA(anchor=LatentStep(needed=0.5))
    (even, prompt), (uneven, _) = pair(0.6), pair(0.95, 0.3)
    losses = [method.loss(attention, prompt, 5, Anchors()) for attention in (even, uneven)]
    assert float(losses[0].total) > float(losses[1].total)  # on average, the second image is better
    assert [loss.enough for loss in losses] == [True, False]


def test_attributes_in_the_wrong_place_change_the_loss_but_not_whether_an_image_is_guided() -> None:
    method = ELA(anchor=LatentStep(needed=0.5))
    (attention, plain), (_, crossed) = pair(0.9), pair(0.9, attributes=True)
    without, with_attributes = (method.loss(attention, prompt, 5, Anchors()) for prompt in (plain, crossed))
    assert float(with_attributes.total) > float(without.total)
    assert with_attributes.enough
    assert with_attributes.terms["shortfall"] == without.terms["shortfall"]


def test_regions_given_by_hand_are_followed_however_small_the_loss_is() -> None:
    attention, prompt = pair(0.9)
    halves = [(0, 0, 0.5, 1), (0.5, 0, 1, 1)]
    method = ELA(regions=halves)
    loss = method.loss(attention, prompt, 0, method.begin(prompt, 10))
    assert float(loss.total) < method.anchor.needed
    assert not loss.enough


def test_five_entities_get_regions_and_narrow_strips_are_reported() -> None:
    pipe = tiny_pipeline()
    text = "a [cat], a [dog], a [car], a [bird] and a [lamp]"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = generate(pipe, text, steps=8, guidance=ELA(size=8), record=False, progress=False)
    regions = run.guidance.regions
    assert regions.any(("y", "x")).all()
    assert int(regions.sum("entity").max()) == 1
    with pytest.warns(UserWarning, match="divides the image into 5 strips"):
        generate(pipe, text, steps=3, guidance=RegionalAttention(), record=False, progress=False)
    first = RegionalAttention(regions=[(0, 0, 0.2, 1), None, None, None, None])
    with pytest.warns(UserWarning, match="divides the area outside the given regions into 4 strips"):
        generate(pipe, text, steps=3, guidance=first, record=False, progress=False)
