"""Scenes tell the truth about themselves, and training survives being killed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import rgb2lab
from torch import nn

from elakit.errors import SettingError
from elakit.judge.colour import name_colour
from elakit.world.art import drawings, rasterise
from elakit.world.recolour import PAINTS, recolour, rule_for
from elakit.world.scenes import Subject, World, caption, compose, sample
from elakit.world.tokenizer import train_tokenizer
from elakit.world.training.config import read_config
from elakit.world.training.data import compose_scenes
from elakit.world.training.loop import Schedule, train
from elakit.world.vocabulary import COLOURS, NATURAL_COLOUR, NOUNS

FLUENT = World(artists=("fluent-3d", "own"))


def test_every_noun_has_drawings_and_a_natural_colour() -> None:
    assert len(NOUNS) == 24
    assert len(COLOURS) == 11
    assert set(NATURAL_COLOUR) == set(NOUNS)
    assert set(NATURAL_COLOUR.values()) <= set(COLOURS) == set(PAINTS)
    assert all(len(drawings(noun)) >= 3 for noun in NOUNS)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_masks_are_exactly_the_pixels_that_an_entity_shows(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    subjects = tuple(Subject(str(noun)) for noun in rng.choice(NOUNS, count, replace=False))
    scene = compose(subjects, dataclasses.replace(FLUENT, shadow=0), np.random.default_rng(seed))
    masks = np.stack([entity.mask for entity in scene.entities])
    assert not (masks.sum(0) > 1).any()
    assert all(mask.any() for mask in masks)
    for entity in scene.entities:
        left, top, right, bottom = entity.box
        assert entity.mask[top:bottom, left:right].sum() == entity.mask.sum()
    # the same scene with the first thing in another colour differs nowhere outside its mask's soft edge
    other = compose(
        (Subject(subjects[0].noun, "purple"), *subjects[1:]),
        dataclasses.replace(FLUENT, shadow=0),
        np.random.default_rng(seed),
    )
    assert np.array_equal(other.entities[0].mask, masks[0])


def test_recolouring_changes_what_is_drawn_inside_the_mask_only() -> None:
    world = dataclasses.replace(FLUENT, shadow=0, backgrounds=("plain",))
    rgba = rasterise(drawings("car", ("fluent-3d",))[0], 64)
    red = recolour(rgba, "red", rule_for(drawings("car", ("fluent-3d",))[0]))
    assert np.array_equal(red[..., 3], rgba[..., 3])
    scene = compose((Subject("car", "red"),), world, np.random.default_rng(1))
    assert name_colour(scene.image[scene.entities[0].mask]) == "red"
    outside = rgb2lab(scene.image)[~scene.entities[0].mask]
    assert np.median(np.abs(outside - np.median(outside, 0))) < 1


def test_colours_come_out_as_asked() -> None:
    rng = np.random.default_rng(7)
    right = [
        name_colour(scene.image[scene.entities[0].mask]) == colour
        for noun in NOUNS
        for colour in COLOURS
        for scene in [compose((Subject(noun, colour),), FLUENT, rng)]
    ]
    assert np.mean(right) >= 0.95


def test_a_quarter_of_the_pairs_is_never_shown_together() -> None:
    held_out = FLUENT.held_out_pairs()
    assert len(held_out) == 69
    rng = np.random.default_rng(0)
    shown = {frozenset(e.subject.noun for e in sample(FLUENT, rng).entities) for _ in range(1500)}
    assert not shown & held_out
    assert len([pair for pair in shown if len(pair) == 2]) > 190


def test_captions_are_the_benchmarks() -> None:
    subjects = (Subject("elephant"), Subject("car", "orange"))
    assert caption(subjects) == "an elephant and an orange car"
    assert caption(subjects, correct_article=False) == "a elephant and a orange car"


def test_wrong_words_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(SettingError, match="giraffe"):
        compose((Subject("giraffe"),), FLUENT, rng)
    with pytest.raises(SettingError, match="mauve"):
        compose((Subject("car", "mauve"),), FLUENT, rng)
    with pytest.raises(SettingError, match="not 4"):
        compose((Subject("car"),) * 4, FLUENT, rng)


def test_training_data_keeps_the_truth() -> None:
    data = compose_scenes(FLUENT, 12, seed=11)
    assert data.batch(np.arange(3)).shape == (3, 3, 64, 64)
    for text, classes in zip(data.captions, data.classes, strict=True):
        shown = {NOUNS[c - 1] for c in np.unique(classes) if c}
        assert shown == {noun for noun in NOUNS if noun in text.split()}


@given(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=18))
@settings(max_examples=60, deadline=None)
def test_the_tokenizer_takes_any_text_and_loses_no_byte(text: str) -> None:
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False).input_ids
    letters = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("</w>", "")
    folded = "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())
    assert len(letters) == len(folded.encode())


TOKENIZER = train_tokenizer(1024, 24)


def test_words_of_the_world_are_one_token_each() -> None:
    assert all(len(TOKENIZER.tokenize(word)) == 1 for word in (*NOUNS, *COLOURS, "a", "an", "and"))
    assert len(TOKENIZER("a car", padding="max_length").input_ids) == 24


def test_a_killed_training_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    def fit(folder: Path, stop_at: int | None = None) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        seen: list[int] = []

        def loss(step: int) -> torch.Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            seen.append(step)
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 2, generator=generator)
            return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()

        schedule = Schedule(samples=160, batch=8, learning_rate=0.05, warmup=2)
        try:
            averaged = train(model, loss, schedule, folder, "line", checkpoint_seconds=0.0)
        except KeyboardInterrupt:
            averaged = model
        averaged.seen = seen
        return averaged

    straight = fit(tmp_path / "straight")
    fit(tmp_path / "killed", stop_at=13)
    resumed = fit(tmp_path / "killed")
    assert resumed.seen == list(range(13, 20))
    assert torch.equal(straight.weight, resumed.weight)


def test_a_training_file_with_a_wrong_setting_is_refused(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "data" / "picture-world" / "training.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("kl =", "kll ="))
    with pytest.raises(SettingError, match=r"\[vae\].*kll"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(text.replace("[text]", "[txt]"))
    with pytest.raises(SettingError, match="txt"):
        read_config(tmp_path / "c.toml")
