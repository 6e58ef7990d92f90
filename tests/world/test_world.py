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
from elakit.judge.color import name_color
from elakit.world.art import drawings, rasterize
from elakit.world.mixtures import KINDS, compose_mixture
from elakit.world.recolor import PAINTS, recolor, rule_for
from elakit.world.scenes import FREE_WORDINGS, Subject, World, caption, compose, sample
from elakit.world.tokenizer import train_tokenizer
from elakit.world.training.config import read_config
from elakit.world.training.data import compose_scenes
from elakit.world.training.judge import judges_world, unseen
from elakit.world.training.loop import Schedule, train
from elakit.world.vocabulary import COLORS, NATURAL_COLOR, NOUNS, USUAL_COLORS

FLUENT = World(artists=("fluent-3d", "own"))
SHIPPED = read_config().world


def test_every_noun_has_drawings_and_a_natural_color() -> None:
    assert len(NOUNS) == 24
    assert len(COLORS) == 11
    assert set(NATURAL_COLOR) == set(NOUNS)
    assert set(NATURAL_COLOR.values()) <= set(COLORS) == set(PAINTS)
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
    # the same scene with the first thing in another color differs nowhere outside its mask's soft edge
    other = compose(
        (Subject(subjects[0].noun, "purple"), *subjects[1:]),
        dataclasses.replace(FLUENT, shadow=0),
        np.random.default_rng(seed),
    )
    assert np.array_equal(other.entities[0].mask, masks[0])


def test_recoloring_changes_what_is_drawn_inside_the_mask_only() -> None:
    world = dataclasses.replace(FLUENT, shadow=0, backgrounds=("plain",))
    rgba = rasterize(drawings("car", ("fluent-3d",))[0], 64)
    red = recolor(rgba, "red", rule_for(drawings("car", ("fluent-3d",))[0]))
    assert np.array_equal(red[..., 3], rgba[..., 3])
    scene = compose((Subject("car", "red"),), world, np.random.default_rng(1))
    assert name_color(scene.image[scene.entities[0].mask]) == "red"
    outside = rgb2lab(scene.image)[~scene.entities[0].mask]
    assert np.median(np.abs(outside - np.median(outside, 0))) < 1


def test_colors_come_out_as_asked() -> None:
    rng = np.random.default_rng(7)
    right = [
        name_color(scene.image[scene.entities[0].mask]) == color
        for noun in NOUNS
        for color in COLORS
        for scene in [compose((Subject(noun, color),), FLUENT, rng)]
    ]
    assert np.mean(right) >= 0.95


def test_held_out_pairs_are_never_shown_together() -> None:
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


@given(wording=st.sampled_from(("and", *FREE_WORDINGS)), count=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_every_wording_names_every_subject_in_order_and_parses(wording: str, count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    subjects = tuple(Subject(str(n), str(rng.choice(COLORS))) for n in rng.choice(NOUNS, count, replace=False))
    words = caption(subjects, wording=wording).replace(",", "").split()
    named = [word for word in words if word in NOUNS or word in COLORS]
    assert named == [word for s in subjects for word in (s.color, s.noun)]


def test_a_worlds_shares_are_what_its_scenes_show() -> None:
    rng = np.random.default_rng(3)
    scenes = [sample(SHIPPED, rng) for _ in range(1500)]
    for count, share in zip((1, 2, 3), SHIPPED.entities, strict=True):
        assert abs(np.mean([len(s.entities) == count for s in scenes]) - share) < 0.05
    asked = [e.subject for s in scenes for e in s.entities if e.subject.color]
    natural = np.mean([s.color == NATURAL_COLOR[s.noun] for s in asked])
    assert abs(natural - (SHIPPED.natural + (1 - SHIPPED.natural) / len(COLORS))) < 0.05
    free = np.mean([any(w in s.caption for w in ("next to", "beside", "with", "image")) for s in scenes])
    assert 0 < free < SHIPPED.free_captions + 0.05
    assert {s.layout for s in scenes} == {"single", "row", "diagonal", "stack", "three", "triangle"}


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(SettingError, match=r"0\.9.*add up to 1"):
        World(entities=(0.9, 0.2, 0.1))
    with pytest.raises(SettingError, match="Unknown wording 'rhyme'"):
        caption((Subject("cat"),), wording="rhyme")


def test_hidden_drawings_are_never_drawn() -> None:
    world = World().without(lambda drawing: drawing.artist == "noto")
    assert all(d.artist != "noto" for noun in NOUNS for d in world.drawings(noun))
    assert any(d.artist == "noto" for d in World().drawings("cat"))
    only = World().without(lambda drawing: True)
    assert only.drawings("cat") == World().drawings("cat")
    assert dataclasses.replace(world, artists=("own",)).drawings("bench")[0].artist == "own"


def test_the_judge_never_sees_one_artist_of_every_noun_that_has_three() -> None:
    world = judges_world(SHIPPED)
    for noun in NOUNS:
        artists = {d.artist for d in drawings(noun)}
        hidden = [d for d in drawings(noun) if unseen(d)]
        assert len({d.artist for d in hidden}) == (1 if len(artists) >= 3 else 0)
        assert not set(hidden) & set(world.drawings(noun))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
@settings(max_examples=20, deadline=None)
def test_a_hybrid_shows_both_of_its_things_in_one_place(seed: int, kind: str) -> None:
    mixture = compose_mixture((Subject("cat"), Subject("car", "blue")), kind, FLUENT, np.random.default_rng(seed))
    owners = mixture.owner[mixture.mixed]
    assert len(owners) > 100
    assert np.array_equal(mixture.mixed, mixture.owner > 0)
    if kind != "blended":
        assert min((owners == i).mean() for i in (1, 2)) >= 0.15


def test_one_thing_behind_another_is_no_hybrid_and_a_third_stands_apart() -> None:
    rng = np.random.default_rng(1)
    behind = compose_mixture((Subject("cat"), Subject("car")), "occluded", FLUENT, rng)
    assert not behind.mixed.any()
    assert set(np.unique(behind.owner)) == {0, 1, 2}
    third = compose_mixture((Subject("cat"), Subject("car"), Subject("bird")), "halves", FLUENT, rng)
    assert (third.owner == 3).any()
    assert not third.mixed[third.owner == 3].any()


def test_usual_colors_are_those_that_are_drawn() -> None:
    for noun in NOUNS:
        for drawing in SHIPPED.drawings(noun):
            rgba = rasterize(drawing, 96)
            name = name_color(rgba[..., :3][rgba[..., 3] > 0.5])
            assert name in USUAL_COLORS[noun], (noun, drawing.file, name)


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
    assert data.batch(np.arange(3)).shape == (3, 3, 128, 128)
    for text, classes in zip(data.captions, data.classes, strict=True):
        shown = {NOUNS[c - 1] for c in np.unique(classes) if c}
        assert shown == {noun for noun in NOUNS if noun in text.replace(",", "").split()}


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
    assert all(len(TOKENIZER.tokenize(word)) == 1 for word in (*NOUNS, *COLORS, "a", "an", "and"))
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
    text = (Path(__file__).parents[2] / "data" / "picture-world" / "training.toml").read_text()
    (tmp_path / "c.toml").write_text(text.replace("pull =", "pulll ="))
    with pytest.raises(SettingError, match=r"\[vae\].*pulll"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(text.replace("[text]", "[txt]"))
    with pytest.raises(SettingError, match="txt"):
        read_config(tmp_path / "c.toml")
