"""The judge says what composed scenes hold, whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

import elakit
from elakit.errors import PromptError
from elakit.judge import judge, knows
from elakit.judge.colour import name_colour
from elakit.world.scenes import Subject, World, compose, sample
from elakit.world.training.config import read_config


@pytest.fixture(scope="module")
def pipe():
    return elakit.load("picture-world")


@pytest.fixture(scope="module")
def world() -> World:
    return read_config().world


def prompt_of(scene, pipe):
    words = " and ".join(f"a [{e.subject.words}]" for e in scene.entities)
    return elakit.parse(words, pipe)


def test_new_scenes_are_judged_right(pipe, world: World) -> None:
    rng = np.random.default_rng(5_000_000)
    scenes = [sample(world, rng) for _ in range(120)]
    right = [judge(Image.fromarray(s.image), prompt_of(s, pipe)).success for s in scenes]
    assert np.mean(right) >= 0.85


def test_what_is_not_there_is_missed_and_a_wrong_colour_is_wrong(pipe, world: World) -> None:
    rng = np.random.default_rng(8)
    wrong = []
    for _ in range(40):
        scene = compose((Subject("car", "red"),), world, rng)
        image = Image.fromarray(scene.image)
        missing = judge(image, elakit.parse("a [red car] and a [bird]", pipe))
        painted = judge(image, elakit.parse("a [blue car]", pipe))
        wrong += [missing.success, painted.success]
    assert np.mean(wrong) <= 0.05
    assert "bird: missing" in str(missing)
    assert str(painted) == "car: red instead of blue"


def test_two_of_a_noun_are_told_apart_by_their_colours(pipe, world: World) -> None:
    rng = np.random.default_rng(3)
    right = []
    for _ in range(20):
        scene = compose((Subject("balloon", "red"), Subject("balloon", "blue")), world, rng)
        verdict = judge(Image.fromarray(scene.image), elakit.parse("a [blue balloon] and a [red balloon]", pipe))
        right.append(verdict.success)
    assert np.mean(right) >= 0.8


def test_masks_lie_where_the_things_are(pipe, world: World) -> None:
    scene = compose((Subject("lion"), Subject("car", "blue")), world, np.random.default_rng(5))
    verdict = judge(Image.fromarray(scene.image).resize((128, 128)), prompt_of(scene, pipe))
    assert verdict.masks.shape == (2, 128, 128)
    for mask, entity in zip(verdict.masks[:, ::2, ::2], scene.entities, strict=True):
        assert (mask & entity.mask).sum() / (mask | entity.mask).sum() > 0.7


def test_words_it_does_not_know_are_refused(pipe) -> None:
    prompt = elakit.parse("a [giraffe] and a [striped cat]", pipe)
    assert not knows(prompt)
    with pytest.raises(PromptError, match="giraffe"):
        judge(Image.new("RGB", (64, 64)), prompt)


def test_no_pixels_have_no_colour() -> None:
    assert name_colour(np.empty((0, 3), np.uint8)) is None
