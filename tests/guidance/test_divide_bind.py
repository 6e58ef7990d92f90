"""Divide & Bind: variation and binding by hand."""

from __future__ import annotations

import math

import pytest
import torch
from word_maps import MIDDLE, SIDES, hand_made, loss_of, of_shares

from elakit.guidance import Attention
from elakit.guidance.divide_bind import DivideAndBind

# Shares of red, car, blue, bird, end in the left and the right column of 2 x 2 locations: the car's total variation is
# above .1, the bird's below, and red is where the car is not.
COLUMNS = {"red": (0.02, 0.9), "car": (0.9, 0.02), "blue": (0.02, 0.03), "bird": (0.03, 0.02), "end": (0.03, 0.03)}


@pytest.mark.parametrize(("steps", "step", "weight"), [(50, 0, 1), (50, 9, 1), (50, 10, 5), (50, 20, 10), (10, 2, 5)])
def test_divide_and_bind_weighs_variation_against_binding(steps: int, step: int, weight: float) -> None:
    # Smoothing mixes the two columns, and nothing varies along y, so all can be done on pairs of numbers.
    soft = {name: (MIDDLE * a + SIDES * b, MIDDLE * b + SIDES * a) for name, (a, b) in COLUMNS.items()}

    def spread(values: tuple[float, ...]) -> list[float]:
        return [math.exp(value) / (2 * sum(map(math.exp, values))) for value in values]

    def binding(attribute: str, noun: str, share: float) -> float:
        scale = max(soft[noun]) / max(soft[attribute])
        both = spread(soft[noun]), spread(tuple(scale * value for value in soft[attribute]))
        cut = share * max(both[0])  # the noun's threshold serves both
        p, q = ([max(0, value - cut) + 1e-5 for value in values] for values in both)
        halves = [
            (a * math.log(2 * a / (a + b)) + b * math.log(2 * b / (a + b))) / 2 for a, b in zip(p, q, strict=True)
        ]
        return 2 * sum(halves)  # two rows

    variation = [abs(soft[noun][0] - soft[noun][1]) for noun in ("car", "bird")]
    assert variation[1] < 0.1 < variation[0]
    bound = [binding("red", "car", 0.2), binding("blue", "bird", 0.3)]
    columns = torch.tensor(list(COLUMNS.values()), dtype=torch.float64)[:, None].expand(-1, 2, -1)
    loss = loss_of(DivideAndBind(), of_shares(columns), hand_made(), step, steps)
    assert loss.terms["variation"] == pytest.approx(sum(variation) / 2, rel=1e-6)
    assert loss.terms["binding"] == pytest.approx(sum(bound) / 2, rel=1e-4)
    wanted = max(weight * one - varied for one, varied in zip(bound, variation, strict=True))
    assert float(loss.total) == pytest.approx(wanted, rel=1e-4)


def test_an_attribute_in_proportion_to_its_noun_is_bound_and_more_of_it_changes_nothing() -> None:
    maps = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps[0] = 0.2 * maps[1]  # red to car
    maps[2] = 3 * maps[3]  # blue to bird
    loss = loss_of(DivideAndBind(), of_shares(maps / maps.sum(0)), hand_made())
    assert loss.terms["binding"] == pytest.approx(0, abs=1e-12)
    assert loss.terms["variation"] > 0.01


def test_divide_and_bind_reads_attributes_from_the_finer_maps_thinned_out() -> None:
    shares = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (coarse,) = of_shares(shares / shares.sum(0)).cross
    fine = torch.rand(1, 7, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fine[..., ::2, ::2] = coarse  # of two by two locations the first is kept
    alone, both = (loss_of(DivideAndBind(), Attention(layers), hand_made()) for layers in ((coarse,), (fine, coarse)))
    assert both.terms == pytest.approx(alone.terms, rel=1e-12)
    fine[0, 1, ::2, ::2] += 0.01 * shares[0]  # red
    changed = loss_of(DivideAndBind(), Attention((fine, coarse)), hand_made())
    assert changed.terms["variation"] == alone.terms["variation"]
    assert changed.terms["binding"] > 1.01 * alone.terms["binding"]
