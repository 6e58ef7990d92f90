"""SynGen: the loss by hand, with and without nouns that have no attributes."""

from __future__ import annotations

import math

import pytest
from tiny import tiny_pipeline
from word_maps import attention_of, hand_made, loss_of

from elakit.guidance import Attention
from elakit.guidance.syngen import SynGen
from elakit.prompt import parse


def two_cells(*left: float) -> Attention:
    """Maps of two locations with a share of each token's attention in the left one; how much there is in all varies."""
    return attention_of([[[0.01 * i * share, 0.01 * i * (1 - share)]] for i, share in enumerate(left, start=1)])


# Divergence of (a, 1 - a) from (b, 1 - b) is (a - b) (logit a - logit b) / 2, and the logits of 1/2, 4/5, 1/3 and 1/5
# are 0, 2, -1 and -2 times ln 2. So in units of ln 2, with red 1/2, car 4/5, blue 1/3, bird 1/5:
#   red-car .3, blue-bird 1/15, car-blue .7, car-bird 1.2, red-blue 1/12, red-bird .3
@pytest.mark.parametrize(
    ("pieces", "alike", "unlike"),
    [
        # each pair's others: -1/2 [(.7 + 1.2)/2 + (1/12 + .3)/2] and -1/2 [(.3 + 1.2)/2 + (1/12 + .7)/2]
        (1, 0.3 + 1 / 15, -2 * 0.5 * (0.95 + 0.1916667)),
        # the bird's second piece is just like blue (0, so the first one counts), and one of the car's others; of each
        # other than the bird the piece counts that is less like it, for red and car the first one too:
        # -1/2 [(.7 + 1.2 + .7)/3 + (1/12 + .3 + 1/12)/3] and -1/2 [(.3 + 1.2)/2 + (1/12 + .7)/2]
        (2, 0.3 + 1 / 15, -0.5 * (0.8666667 + 0.1555556) - 0.5 * (0.75 + 0.3916667)),
    ],
)
def test_syngen_draws_pairs_together_and_away_from_the_other_words(pieces: int, alike: float, unlike: float) -> None:
    attention = two_cells(1 / 2, 4 / 5, 1 / 3, 1 / 5, *[1 / 3] * (pieces - 1))
    loss = loss_of(SynGen(), attention, hand_made(pieces))
    assert loss.terms["alike"] == pytest.approx(alike * math.log(2), rel=1e-5)
    assert loss.terms["unlike"] == pytest.approx(unlike * math.log(2), rel=1e-5)
    assert float(loss.total) == pytest.approx((alike + unlike) * math.log(2), rel=1e-5)


@pytest.mark.parametrize(("lone", "car"), [(False, 0.0), (True, -(0.3 + 0.7 + 1.2) / 3)])
def test_syngen_leaves_nouns_without_attributes_out_unless_asked(lone: bool, car: float) -> None:
    # "red" is a word like any other now; the bird's pair is as above
    loss = loss_of(SynGen(lone_nouns=lone), two_cells(1 / 2, 4 / 5, 1 / 3, 1 / 5), hand_made(car=()))
    bird = 1 / 15 - 0.5 * (0.75 + 0.3916667)
    assert float(loss.total) == pytest.approx((car + bird) * math.log(2), rel=1e-5)


def test_syngen_leaves_a_prompt_without_attributes_alone() -> None:
    prompt = parse("a [car] and a [bird]", tiny_pipeline())
    assert SynGen().plan([1.0] * 50, prompt) == []
    assert len(SynGen(lone_nouns=True).plan([1.0] * 50, prompt)) == 25
