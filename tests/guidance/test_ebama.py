"""EBAMA: the energies by hand."""

from __future__ import annotations

import pytest
import torch
from word_maps import attention_of, hand_made, loss_of

from elakit.guidance.ebama import EBAMA
from elakit.prompt import Entity, Prompt, Token


def test_ebama_draws_attributes_to_objects_and_objects_from_the_rest() -> None:
    # Cosines: red-car and car-bird 1/sqrt 2, blue-bird and red-bird 1/2, car-blue 0; so the attributes are .2928932 and
    # .5 away, and the others on the mean (1 + .2928932)/2 from the car, (.5 + .2928932)/2 from the bird. Maps as faint
    # as these have even shares, .2 each: the objects' largest add -.5 (.2 + .2).
    red, car, blue, bird = [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0]
    faint = 1e-7 * torch.tensor([red, car, blue, bird], dtype=torch.float64).view(4, 2, 2)
    loss = loss_of(EBAMA(), attention_of(faint), hand_made())
    assert loss.terms["attract"] == pytest.approx(0.7928932)
    assert loss.terms["repel"] == pytest.approx(-0.6464466 - 0.3964466)
    assert loss.terms["intensity"] == pytest.approx(-0.4, abs=1e-4)
    assert float(loss.total) == pytest.approx(-0.45, abs=1e-4)
    without = loss_of(EBAMA(intensity=0), attention_of(faint), hand_made())
    assert float(without.total) == pytest.approx(-0.25)


def test_ebama_takes_the_least_alike_piece_and_repels_once_for_every_attribute() -> None:
    # "a red old car" of one object, "car" in two pieces. Cosines with its pieces: a 0, 1; red 1, 0; old 1/sqrt 2 twice.
    names = ["a", "red", "old", "ca", "r"]
    tokens = tuple(Token(i, name, f"{name}/{i}", min(i, 4) - 1) for i, name in enumerate(names, start=1))
    car = Entity("a red old car", "car", ("red", "old"), (4, 5), (2, 3), "car")
    prompt = Prompt("a red old car", (car,), tokens, 6, 8)
    maps = 1e-7 * torch.tensor([[0, 1], [1, 0], [1, 1], [1, 0], [0, 1]], dtype=torch.float64).view(5, 1, 2)
    loss = loss_of(EBAMA(intensity=0), attention_of(maps.expand(-1, 2, -1)), prompt)
    assert loss.terms["attract"] == pytest.approx(1 + 0.2928932)
    assert loss.terms["repel"] == pytest.approx(-2 * 1)
