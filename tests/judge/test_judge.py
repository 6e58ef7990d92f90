"""Verdicts on composed scenes, whose ground truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import elakit
from elakit.errors import PromptError, SettingError
from elakit.judge import Thing, Verdict, judge, knows
from elakit.judge.color import name_color
from elakit.judge.segmenter import load_segmenter
from elakit.world.mixtures import KINDS, compose_mixture
from elakit.world.scenes import Subject, World, compose, sample
from elakit.world.training.config import read_config


@pytest.fixture(scope="module")
def pipe():
    return elakit.load("picture-world")


@pytest.fixture(scope="module")
def world() -> World:
    # the shipped judge was trained when scenes had these backgrounds and layouts only
    layouts = {"row": 0.4, "column": 0.3, "diagonal": 0.3}
    return replace(read_config().world, layouts=layouts, backgrounds=("plain", "gradient", "ground"))


def prompt_of(scene, pipe):
    words = " and ".join(f"a [{e.subject.words}]" for e in scene.entities)
    return elakit.parse(words, pipe)


def test_new_scenes_are_judged_right(pipe, world: World) -> None:
    rng = np.random.default_rng(5_000_000)
    scenes = [sample(world, rng) for _ in range(120)]
    right = [judge(Image.fromarray(s.image), prompt_of(s, pipe)).success for s in scenes]
    assert np.mean(right) >= 0.85


def test_absent_entities_and_wrong_colors_are_failures(pipe, world: World) -> None:
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


def test_hybrids_are_failures_and_name_their_parts(pipe, world: World) -> None:
    rng = np.random.default_rng(11)
    hybrids, pairs, named = [], [], []
    prompt = elakit.parse("a [cat] and a [car]", pipe)
    for i in range(40):
        subjects = (Subject("cat"), Subject("car"))
        hybrid = judge(Image.fromarray(compose_mixture(subjects, KINDS[i % 4], world, rng).image), prompt)
        hybrids.append(hybrid.mixture and not hybrid.success and "mixture" in hybrid.failures)
        named.append(any({"cat", "car"} & set(nouns) for nouns in hybrid.mixtures))
        pairs.append(judge(Image.fromarray(compose(subjects, world, rng).image), prompt).mixture)
    assert np.mean(hybrids) >= 0.85
    assert np.mean(named) >= 0.75
    assert np.mean(pairs) <= 0.1


def test_things_that_the_prompt_does_not_name_are_counted(pipe, world: World) -> None:
    rng = np.random.default_rng(4)
    seen = []
    for _ in range(20):
        scene = compose((Subject("lion"), Subject("apple", "red"), Subject("bow", "pink")), world, rng)
        verdict = judge(Image.fromarray(scene.image), elakit.parse("a [lion]", pipe))
        seen.append((sorted(verdict.extra), verdict.counts.get("lion"), verdict.success))
    assert np.mean([s == (["apple", "bow"], 1, True) for s in seen]) >= 0.8


def entity_prompt():
    return elakit.parse("a [bird] and a [red chair]", elakit.load("picture-world"))


def verdict_of(things: list[Thing], prompt) -> Verdict:
    return judge(Image.new("RGB", (8, 8), (200, 20, 30)), prompt, lambda image, nouns: things)


def thing(noun: str, columns: slice, color: str | None, mixed_with: tuple[str, ...] = ()) -> Thing:
    mask = np.zeros((8, 8), bool)
    mask[:, columns] = True
    return Thing(noun, mask, 0.9, color, mixed_with)


def test_a_verdict_distinguishes_neglect_mixture_and_wrong_color() -> None:
    prompt = entity_prompt()
    bird, chair = thing("bird", slice(0, 4), "blue"), thing("chair", slice(4, 8), "red")
    right = verdict_of([bird, chair], prompt)
    assert (right.success, right.failures) == (True, ())
    neglected = verdict_of([chair], prompt)
    assert (neglected.success, neglected.failures) == (False, ("neglect",))
    # The bird is part of a hybrid, so it is not neglected.
    fused = verdict_of([thing("chair", slice(0, 8), "red", ("bird",))], prompt)
    assert (fused.success, fused.failures, fused.mixtures) == (False, ("mixture",), (("chair", "bird"),))
    painted = verdict_of([bird, thing("chair", slice(4, 8), "brown")], prompt)
    assert (painted.success, painted.failures) == (False, ("wrong color",))
    assert str(painted) == "bird: present; chair: brown instead of red"


def test_a_color_that_leaks_to_an_entity_without_a_color_is_wrong() -> None:
    # The prompt names red for the chair and no color for the bird.
    verdict = verdict_of([thing("bird", slice(0, 4), "red"), thing("chair", slice(4, 8), "red")], entity_prompt())
    assert verdict.failures == ("wrong color",)
    assert verdict.right_color == {"bird": False, "chair": True}
    assert verdict.leak == {"bird": 1.0, "chair": 0.0}  # every pixel is red
    # Green was named for no entity, so a green bird is no leak.
    assert verdict_of(
        [thing("bird", slice(0, 4), "green"), thing("chair", slice(4, 8), "red")], entity_prompt()
    ).success


def test_a_detector_may_find_other_nouns() -> None:
    prompt = elakit.parse("a [giraffe] and a [red car]", elakit.load("picture-world"))
    verdict = verdict_of([thing("giraffe", slice(0, 4), "yellow"), thing("car", slice(4, 8), "red")], prompt)
    assert verdict.success
    assert verdict.masks.sum((1, 2)).tolist() == [32, 32]


def test_two_entities_of_one_noun_are_distinguished_by_their_colors(pipe, world: World) -> None:
    rng = np.random.default_rng(3)
    right = []
    for _ in range(20):
        scene = compose((Subject("balloon", "red"), Subject("balloon", "blue")), world, rng)
        verdict = judge(Image.fromarray(scene.image), elakit.parse("a [blue balloon] and a [red balloon]", pipe))
        right.append(verdict.success)
    assert np.mean(right) >= 0.8


def test_masks_agree_with_the_ground_truth(pipe, world: World) -> None:
    scene = compose((Subject("lion"), Subject("car", "blue")), world, np.random.default_rng(5))
    verdict = judge(Image.fromarray(scene.image).resize((256, 256)), prompt_of(scene, pipe))
    assert verdict.masks.shape == (2, 256, 256)
    for mask, entity in zip(verdict.masks[:, ::2, ::2], scene.entities, strict=True):
        assert (mask & entity.mask).sum() / (mask | entity.mask).sum() > 0.7


def test_unknown_words_are_refused(pipe) -> None:
    prompt = elakit.parse("a [giraffe] and a [striped cat]", pipe)
    assert not knows(prompt)
    with pytest.raises(PromptError, match=r"it does not know 'giraffe', 'striped'\. It knows only"):
        judge(Image.new("RGB", (64, 64)), prompt)


def test_no_pixels_have_no_color_name() -> None:
    assert name_color(np.empty((0, 3), np.uint8)) is None


@pytest.mark.parametrize(("noun", "color"), [("bird", "gray"), ("elephant", "white"), ("frog", "yellow")])
def test_a_color_that_the_prompt_does_not_name_is_not_stated(pipe, noun: str, color: str) -> None:
    prompt = elakit.parse(f"a [{noun}] and a [red chair]", pipe)
    verdict = verdict_of([thing(noun, slice(0, 4), color), thing("chair", slice(4, 8), "red")], prompt)
    assert str(verdict) == f"{noun}: present; chair: red"
    assert verdict.success


def test_a_color_taken_from_another_entity_is_stated_with_its_owner() -> None:
    verdict = verdict_of([thing("bird", slice(0, 4), "red"), thing("chair", slice(4, 8), "red")], entity_prompt())
    assert str(verdict) == "bird: red, the color of chair; chair: red"


def test_an_image_blacked_out_by_a_safety_checker_is_not_judged(pipe) -> None:
    with pytest.raises(SettingError, match="safety checker"):
        judge(Image.new("RGB", (128, 128)), elakit.parse("a [cat] and a [lion]", pipe))


def test_judging_leaves_the_random_state_of_torch_alone(pipe) -> None:
    load_segmenter.cache_clear()  # building the network is what could change it
    before = torch.get_rng_state()
    judge(Image.new("RGB", (128, 128), "navy"), elakit.parse("a [cat]", pipe))
    assert torch.equal(torch.get_rng_state(), before)
    assert load_segmenter.cache_info().misses == 1


def test_a_shape_that_cannot_be_named_does_not_count_but_is_told() -> None:
    image, prompt = (
        Image.new("RGB", (8, 8), "gray"),
        elakit.parse("a [cat] and a [blue clock]", elakit.load("picture-world")),
    )
    cat, clock = thing("cat", slice(0, 3), "orange"), thing("clock", slice(5, 8), "blue")
    clean = judge(image, prompt, lambda image, nouns: [cat, clock])
    blob = judge(image, prompt, lambda image, nouns: [cat, replace(clock, recognizable=False)])
    assert clean.success
    assert not blob.success
    assert blob.failures == ("neglect",)
    assert (blob.counts, blob.unrecognizable, blob.extra) == ({"cat": 1}, 1, ())
    assert str(blob).endswith("an unrecognizable shape")
