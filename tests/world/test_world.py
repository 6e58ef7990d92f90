"""Scenes tell the truth about themselves, and training survives being killed."""

from __future__ import annotations

import dataclasses
import io
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation
from skimage.color import rgb2lab
from torch import nn

from elakit.errors import SettingError
from elakit.judge.color import name_color
from elakit.world.art import drawings, rasterize
from elakit.world.backgrounds import KINDS as KINDS_OF_BACKGROUND
from elakit.world.backgrounds import background
from elakit.world.layouts import (
    FOUR_LAYOUTS,
    PAIR_LAYOUTS,
    SUPPORTS,
    THREE_LAYOUTS,
    WORN,
    Shape,
    group_places,
    pair_places,
    worn_places,
)
from elakit.world.mixtures import KINDS, compose_mixture, sample_mixture
from elakit.world.recolor import PAINTS, recolor, rule_for
from elakit.world.scenes import FREE_WORDINGS, RELATION_WORDS, Subject, World, caption, compose, sample, sample_subjects
from elakit.world.spoiled import KINDS as KINDS_OF_SPOILED
from elakit.world.spoiled import sample_spoiled
from elakit.world.tokenizer import train_tokenizer
from elakit.world.training import judge
from elakit.world.training.config import read_config
from elakit.world.training.data import compose_scenes
from elakit.world.training.judge import judges_world, unseen
from elakit.world.training.loop import Schedule, train
from elakit.world.vocabulary import ANIMALS, COLORS, NATURAL_COLOR, NOUNS, USUAL_COLORS

FLUENT = World(artists=("fluent-3d", "own"))
SHIPPED = read_config().world
# Images of half the size are composed ten times faster; they serve where many scenes are counted.
SMALL_FLUENT = dataclasses.replace(FLUENT, size=64)
SMALL = dataclasses.replace(SHIPPED, size=64)


def test_every_noun_has_drawings_and_a_natural_color() -> None:
    assert len(NOUNS) == 24
    assert len(COLORS) == 11
    assert set(NATURAL_COLOR) == set(NOUNS)
    assert set(NATURAL_COLOR.values()) <= set(COLORS) == set(PAINTS)
    assert all(len(drawings(noun)) >= 3 for noun in NOUNS)


@given(seed=st.integers(0, 10_000), count=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_masks_are_exactly_the_pixels_that_an_entity_shows(seed: int, count: int) -> None:
    world = dataclasses.replace(FLUENT, shadow=0, backgrounds=("plain",), free_captions=0.0, stated=0.0)
    rng = np.random.default_rng(seed)
    subjects = tuple(Subject(str(noun)) for noun in rng.choice(NOUNS, count, replace=False))
    scene = compose(subjects, world, np.random.default_rng(seed))
    masks = np.stack([entity.mask for entity in scene.entities])
    assert not (masks.sum(0) > 1).any()
    for entity in scene.entities:
        left, top, right, bottom = entity.box
        assert entity.mask.sum() == entity.mask[top:bottom, left:right].sum() > 30
    assert tuple(e.subject for e in scene.entities) == subjects
    # where nothing stands, the plain background shows (drawings have faint soft edges)
    covered = binary_dilation(masks.any(0), iterations=2)
    bare = scene.image[~covered].astype(int)
    assert (np.abs(bare - np.median(bare, 0)).max(1) <= 3).mean() > 0.99


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
        for scene in [compose((Subject(noun, color),), SMALL_FLUENT, rng)]
    ]
    assert np.mean(right) >= 0.95


def test_a_world_that_cannot_give_what_is_asked_for_is_refused_and_not_searched_forever() -> None:
    rng = np.random.default_rng(0)
    apart = World(artists=("noto",), held_out=1.0, entities=(0.0, 1.0))
    with pytest.raises(SettingError, match=r"World\(held_out=1.0\).*2 nouns were refused.*Lower held_out"):
        sample_subjects(apart, rng)
    alone = World(artists=("noto",), entities=(1.0,))
    with pytest.raises(SettingError, match="all scenes have one entity"):
        sample_mixture(alone, rng)
    with pytest.raises(SettingError, match=r"kind='melted'.*'halves'"):
        sample_mixture(World(artists=("noto",)), rng, kinds=("halves", "melted"))
    with pytest.raises(SettingError, match="two or three subjects, not 1"):
        compose_mixture((Subject("cat"),), "halves", alone, rng)
    with pytest.raises(SettingError, match="No kind of background is given"):
        background((), [], 64, rng)
    with pytest.raises(SettingError, match="Unknown background 'sea'"):
        background(("plain", "sea"), [], 64, rng)


def test_held_out_pairs_are_never_shown_together() -> None:
    held_out = SMALL_FLUENT.held_out_pairs()
    assert len(held_out) == 69
    rng = np.random.default_rng(0)
    shown = {frozenset(e.subject.noun for e in sample(SMALL_FLUENT, rng).entities) for _ in range(1500)}
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
    crowded = dataclasses.replace(SMALL, entities=(0.25, 0.55, 0.1, 0.1))
    scenes = [sample(crowded, rng) for _ in range(1200)]
    for count, share in enumerate(crowded.entities, 1):
        assert abs(np.mean([len(s.entities) == count for s in scenes]) - share) < 0.05
    asked = [e.subject for s in scenes for e in s.entities if e.subject.color]
    natural = np.mean([s.color == NATURAL_COLOR[s.noun] for s in asked])
    assert abs(natural - (SHIPPED.natural + (1 - SHIPPED.natural) / len(COLORS))) < 0.05
    pairs = [s for s in scenes if len(s.entities) == 2]
    for layout, share in SHIPPED.layouts.items():
        assert abs(np.mean([s.layout == layout for s in pairs]) - share) < 0.06, layout
    clear = [s for s in pairs if s.relation]
    assert abs(np.mean([s.stated for s in clear]) - SHIPPED.stated) < 0.08
    assert not any(s.stated for s in scenes if s.relation is None)
    assert {s.layout for s in scenes if len(s.entities) == 3} == set(THREE_LAYOUTS)
    assert {s.layout for s in scenes if len(s.entities) == 4} == set(FOUR_LAYOUTS)
    assert {s.background for s in scenes} == set(KINDS_OF_BACKGROUND)


def test_single_things_stand_anywhere_at_any_size() -> None:
    rng = np.random.default_rng(4)
    alone = dataclasses.replace(SMALL, entities=(1.0,))
    boxes = np.array([sample(alone, rng).entities[0].box for _ in range(400)]) / SMALL.size
    sides = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1])
    assert sides.min() > 0.2
    assert sides.max() < 0.9
    assert np.histogram(sides, [0.25, 0.4, 0.55, 0.7, 0.85])[0].min() > 40
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    for quadrant in [(x, y) for x in (False, True) for y in (False, True)]:
        assert np.mean(((centers > 0.5) == quadrant).all(1)) > 0.15


def test_a_relation_is_true_of_the_pixels_and_said_in_the_right_order() -> None:
    rng = np.random.default_rng(5)
    pairs = dataclasses.replace(SMALL, entities=(0.0, 1.0), stated=1.0)
    seen = Counter()
    for _ in range(500):
        scene = sample(pairs, rng)
        if scene.relation is None:
            assert not scene.stated
            continue
        seen[scene.relation] += 1
        first, second = scene.entities
        words = scene.caption.split()
        assert words.index(first.subject.noun) < words.index(second.subject.noun)
        assert RELATION_WORDS[scene.relation] in scene.caption
        (x1, y1), (x2, y2) = (np.argwhere(e.mask).mean(0)[::-1] for e in scene.entities)
        if scene.relation in ("left of", "right of"):
            assert (x1 < x2) == (scene.relation == "left of")
            assert abs(x1 - x2) > abs(y1 - y2)
        elif scene.relation in ("above", "below"):
            assert (y1 < y2) == (scene.relation == "above")
            assert abs(y1 - y2) > abs(x1 - x2)
        elif scene.relation in ("in front of", "behind"):
            # the thing behind is the one whose drawing has pixels that the other covers: the two touch
            assert (binary_dilation(first.mask) & second.mask).any()
        elif scene.relation in ("on", "under"):
            upper, lower = (first, second) if scene.relation == "on" else (second, first)
            assert lower.subject.noun in SUPPORTS
            assert np.argwhere(upper.mask)[:, 0].mean() < np.argwhere(lower.mask)[:, 0].mean()
            assert binary_dilation(upper.mask, iterations=2)[lower.mask].any()
        else:
            wearer, worn = (first, second) if scene.relation == "wearing" else (second, first)
            assert wearer.subject.noun in ANIMALS
            assert worn.subject.noun in WORN
            assert binary_dilation(wearer.mask, iterations=2)[worn.mask].any()
    assert set(seen) == set(RELATION_WORDS)


def test_the_one_in_front_hides_the_one_behind() -> None:
    # a red apple and a blue suitcase overlap; the pixels that both drawings cover have the color of the one in front
    world = dataclasses.replace(SHIPPED, shadow=0, backgrounds=("plain",))
    for seed in range(12):
        scene = compose(
            (Subject("apple", "red"), Subject("suitcase", "blue")), world, np.random.default_rng(seed), "occluded"
        )
        front = scene.entities[0 if scene.relation == "in front of" else 1]
        assert name_color(scene.image[front.mask]) == front.subject.color
        others = [e for e in scene.entities if e is not front]
        assert others[0].mask.sum() > 100


def test_a_layout_that_the_things_cannot_have_is_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(SettingError, match=r"cannot have the layout 'worn'.*row"):
        compose((Subject("car"), Subject("bowl")), SHIPPED, rng, "worn")
    nothing_fits = mock.patch("elakit.world.scenes._attempt", return_value=None)
    with nothing_fits, pytest.raises(SettingError, match=r"car and bowl do not fit the layout 'row'\. Choose from \w+"):
        compose((Subject("car"), Subject("bowl")), SHIPPED, rng, "row")
    with nothing_fits, pytest.raises(SettingError, match="fit no layout"):
        compose((Subject("car"), Subject("bowl")), SHIPPED, rng)
    crowned = compose((Subject("crown"), Subject("bear")), SHIPPED, rng, "worn")
    assert [e.subject.noun for e in crowned.entities] == ["crown", "bear"]
    assert crowned.relation == "worn by"
    with pytest.raises(SettingError, match=r"from 0 to 0\.4"):
        World(layouts={"row": 0.7, "column": 0.3})
    with pytest.raises(SettingError, match=r"World\(layouts=.*from 0 to 0\.4"):
        World(layouts={"row": 0.4, "column": 0.4, "diagonal": 0.4, "free": -0.2})
    with pytest.raises(SettingError, match="spiral"):
        World(layouts={"row": 0.4, "column": 0.3, "spiral": 0.3})


def test_single_things_have_the_sizes_that_are_asked_for() -> None:
    rng = np.random.default_rng(0)
    world = dataclasses.replace(SMALL_FLUENT, entities=(1.0,), single_sizes=(0.6, 0.7))
    sides = [max(np.ptp(np.nonzero(sample(world, rng).entities[0].mask), axis=1) + 1) / world.size for _ in range(40)]
    assert 0.5 < np.median(sides) <= 0.75
    assert max(sides) < 0.85  # a tilted thing may be a little larger
    for sizes in ((0.7, 0.6), (0.0, 0.5), (0.5, 1.2), (0.5,)):
        with pytest.raises(SettingError, match=r"World\(single_sizes=.* such as \[0.25, 0.85\]"):
            dataclasses.replace(SMALL_FLUENT, single_sizes=sizes)


def test_shares_that_do_not_add_up_are_refused() -> None:
    for shares in ((0.9, 0.2, 0.1), (1.2, -0.2), (0.5, float("nan"))):
        with pytest.raises(SettingError, match=r"World\(entities=\[.*numbers from 0 to 1 that add up to 1"):
            World(entities=shares)
    with pytest.raises(SettingError, match="Unknown wording 'rhyme'"):
        caption((Subject("cat"),), wording="rhyme")


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("size", 0, r"World\(size=0\): must be a whole number, 1 or more"),
        ("most_drawings", 1.5, r"World\(most_drawings=1.5\): must be a whole number"),
        ("most_drawings", 0, r"World\(most_drawings=0\): must be a whole number, 1 or more"),
        ("mirrored", -0.1, r"World\(mirrored=-0.1\): must be a number from 0 to 1"),
        ("natural", 1.2, r"World\(natural=1.2\): must be a number from 0 to 1"),
        ("stated", float("nan"), r"World\(stated=nan\): must be a number from 0 to 1"),
        ("views", ("side",), r"views='side'.*body.*face"),
        ("artists", ("notto",), r"artists='notto'.*Did you mean 'noto'"),
        ("artists", "noto", r"World\(artists='noto'\): must be a list of one or more of"),
        ("backgrounds", (), r"World\(backgrounds=\(\)\): must be a list of one or more of"),
    ],
)
def test_a_wrong_setting_of_the_world_is_refused(setting: str, value: object, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        World(**{setting: value})


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


def test_examples_of_the_judge_are_kept_for_a_training_that_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = read_config()
    few = dataclasses.replace(shipped.judge, scenes=3, rebuilt=0, redrawn=0, drawn=0, unfinished=0)
    config = dataclasses.replace(shipped, judge=few)
    network = mock.MagicMock()  # nothing is generated
    network.from_pretrained().to().unet.config.sample_size = SHIPPED.size
    network.from_pretrained().to().vae_scale_factor = 1
    monkeypatch.setattr(judge, "AutoencoderTiny", network)
    monkeypatch.setattr(judge, "StableDiffusionPipeline", network)
    made = judge.prepare_examples(config, tmp_path, torch.device("cpu"))
    assert [file.name for file in tmp_path.iterdir()] == ["judge-examples.npz"]
    monkeypatch.setattr(judge, "compose_examples", None)
    kept = judge.prepare_examples(config, tmp_path, torch.device("cpu"))
    assert len(made.captions) == 3
    assert all(np.array_equal(value, vars(kept)[name]) for name, value in vars(made).items())


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS))
@settings(max_examples=20, deadline=None)
def test_a_hybrid_shows_both_of_its_things_in_one_place(seed: int, kind: str) -> None:
    mixture = compose_mixture((Subject("cat"), Subject("car", "blue")), kind, FLUENT, np.random.default_rng(seed))
    owners = mixture.owner[mixture.mixed]
    assert len(owners) > 100
    assert np.array_equal(mixture.mixed, mixture.owner > 0)
    if kind != "blended":
        assert min((owners == i).mean() for i in (1, 2)) >= 0.15


def test_a_simple_world_shows_one_drawing_per_noun_the_right_way_round() -> None:
    world = dataclasses.replace(SMALL, views=("face",), most_drawings=1, mirrored=0.0)
    assert {len(world.drawings(noun)) for noun in NOUNS} == {1}
    assert world.drawings("cat")[0].view == "face"
    rng = np.random.default_rng(0)
    shape = Shape((0.1, 0.1, 0.9, 0.9), head=(0.4, 0.2, 0.5), eyes=(0.4, 0.4, 0.4))
    for chance, expected in ((0.0, {False}), (1.0, {True})):
        for layout in set(PAIR_LAYOUTS) - {"worn", "on"}:
            places = pair_places(layout, (shape, shape), rng, chance)
            assert places is not None
            assert {place.flip for place in places} == expected
        worn, on = worn_places("bow", (shape, shape), rng, chance), pair_places("on", (shape, shape), rng, chance)
        assert worn is not None
        assert on is not None
        assert {worn[0].flip, on[1].flip} == expected  # what is worn, or stands on a thing, is not mirrored
        for layout in ("row", "free"):
            group = group_places(layout, 3, rng, chance)
            assert {place.flip for place in group or ()} == expected


def test_one_thing_behind_another_is_no_hybrid_and_a_third_stands_apart() -> None:
    rng = np.random.default_rng(1)
    behind = compose_mixture((Subject("cat"), Subject("car")), "occluded", FLUENT, rng)
    assert not behind.mixed.any()
    assert set(np.unique(behind.owner)) == {0, 1, 2}
    third = compose_mixture((Subject("cat"), Subject("car"), Subject("bird")), "halves", FLUENT, rng)
    assert (third.owner == 3).any()
    assert not third.mixed[third.owner == 3].any()


@pytest.mark.parametrize("kind", KINDS_OF_SPOILED)
def test_a_spoiled_drawing_keeps_little_of_what_it_was(kind: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(6):
        spoiled = sample_spoiled(SHIPPED, rng, (kind,))
        assert spoiled.spoiled.any()
        assert not (spoiled.spoiled & spoiled.clean).any()
        assert bool(spoiled.clean.any()) == (len(spoiled.nouns) == 2)
    with pytest.raises(SettingError, match="Unknown kind 'melted' of unrecognizable shapes"):
        sample_spoiled(SHIPPED, rng, ("melted",))


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
    with pytest.raises(SettingError, match="not 5"):
        compose((Subject("car"),) * 5, FLUENT, rng)


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
    assert len(letters) == len(folded(tokenizer, text).encode())


TOKENIZER = train_tokenizer(1024, 24)


def folded(tokenizer: Any, text: str) -> str:
    """The text after the tokenizer's own normalization, without spaces."""
    if hasattr(tokenizer, "nlp"):  # transformers 4
        return "".join(tokenizer.nlp.tokenize(text))
    return "".join(tokenizer.backend_tokenizer.normalizer.normalize_str(text).split())


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
    (tmp_path / "c.toml").write_bytes(text.replace("pull =", "pull = \xff").encode("latin-1", "replace"))
    with pytest.raises(SettingError, match="Cannot read the training configuration"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text(text, encoding="utf-8-sig")
    assert read_config(tmp_path / "c.toml") == read_config()
    (tmp_path / "c.toml").write_text(text.replace("[text]", "[txt]"))
    with pytest.raises(SettingError, match="txt"):
        read_config(tmp_path / "c.toml")


def test_a_drawing_that_comes_out_blank_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of resvg-py before 0.2.2 leave a fifth of the drawings blank."""
    import resvg_py

    drawing = next(one for noun in NOUNS for one in drawings(noun) if one.file.endswith(".svg"))
    content = io.BytesIO()
    Image.new("RGBA", (32, 32)).save(content, "png")
    monkeypatch.setattr(resvg_py, "svg_to_bytes", lambda **_: list(content.getvalue()))
    with pytest.raises(SettingError, match=r"comes out blank.*resvg-py>=0\.2\.2"):
        rasterize(drawing, 32)
