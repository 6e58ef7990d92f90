"""Captioned scenes with ground truth: noun, color, box and exact mask of every entity, the layout and the relation.

A scene has one to four drawings on a background. A `World` holds the settings of scenes: the number of entities, the
layouts of pairs, and the wording of captions. It also sets which pairs of nouns are never shown together, and how often
things have their natural color. A model that is trained on few pairs and mostly natural colors bleeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation

from elakit import checks
from elakit.errors import SettingError
from elakit.measures.masks import bounding_box
from elakit.numbering import plural
from elakit.world.art import ARTISTS, VIEWS, Drawing, drawings, rasterize
from elakit.world.backgrounds import KINDS, background
from elakit.world.layouts import (
    FOUR_LAYOUTS,
    LEAST_SEEN,
    MOST_SEEN_BEHIND,
    PAIR_LAYOUTS,
    THREE_LAYOUTS,
    Place,
    Shape,
    fits,
    group_places,
    pair_places,
    posed,
    relation_of,
    single_place,
    worn_places,
)
from elakit.world.recolor import recolor, rule_for
from elakit.world.vocabulary import ANIMALS, COLORS, NATURAL_COLOR, NOUNS, article

SPRITE_SIZE = 160  # pixels; larger than any entity in a 128 px scene
MOST_ENTITIES = 4
MOST_DRAWS = 10_000  # random sets of nouns before the search for one without a held-out pair is given up
TRIES = 40  # placements of a layout before another layout is chosen
LARGEST_LAYOUT = 0.4  # no layout may have a larger share of the pairs, or a method could rely on it

# Wordings of a caption; "and" is the benchmark's, "bare" leaves the articles out.
BENCHMARK_WORDING = "and"
FREE_WORDINGS = ("next to", "beside", "with", "list", "picture", "bare")
# How a caption states that the first thing has a relation to the second.
RELATION_WORDS = {
    "left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below",
    "in front of": "in front of", "behind": "behind", "on": "on", "under": "under", "wearing": "wearing",
    "worn by": "on",
}  # fmt: skip
# The same pair of things in the other order.
CONVERSE = {
    "left of": "right of", "right of": "left of", "above": "below", "below": "above", "in front of": "behind",
    "behind": "in front of", "on": "under", "under": "on", "wearing": "worn by", "worn by": "wearing",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """An entity of a caption.

    Attributes
    ----------
    noun : str
        One of `elakit.world.vocabulary.NOUNS`.
    color : str or None
        One of `elakit.world.vocabulary.COLORS`; None if the entity has the colors of its drawing.
    """

    noun: str
    color: str | None = None

    @property
    def words(self) -> str:
        """Noun with its color, such as "red car"; the noun alone if there is no color."""
        return f"{self.color} {self.noun}" if self.color else self.noun


@dataclass(frozen=True)
class SceneEntity:
    """One thing in a scene.

    Attributes
    ----------
    subject : Subject
        Noun and color.
    drawing : Drawing
        Drawing by which the scene shows the entity.
    box : tuple of int
        (left, top, right, bottom) of the visible pixels; right and bottom are exclusive.
    mask : ndarray, bool, (size, size)
        Pixels at which the entity is visible, that is, not hidden by another entity in front of it.
    """

    subject: Subject
    drawing: Drawing
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image with its caption and its ground truth.

    Attributes
    ----------
    image : ndarray, uint8, (size, size, 3)
    caption : str
    entities : tuple of SceneEntity
        Entities in the order of the caption.
    background : str
        Kind of the background, one of `elakit.world.backgrounds.KINDS`.
    layout : str
        For one thing, "single". For two things, one of `elakit.world.layouts.PAIR_LAYOUTS`. For three things, "row",
        "column", "triangle" or "free". For four things, "grid" or "free".
    relation : str or None
        Relation of the first entity to the second, a key of `RELATION_WORDS`. None if the relation is not clear, or if
        the scene does not have two entities.
    stated : bool
        True if the caption states the relation.
    """

    image: np.ndarray
    caption: str
    entities: tuple[SceneEntity, ...]
    background: str
    layout: str
    relation: str | None = None
    stated: bool = False


@dataclass(frozen=True)
class World:
    """Settings from which random scenes are composed.

    Attributes
    ----------
    size : int
        Side of a scene in pixels, at least 1.
    artists : tuple of str
        Artists whose drawings are used (see `elakit.world.art.ARTISTS`).
    views : tuple of str
        Views of the drawings that are used: "body", "face" or both. If a noun has no drawing with such a view, all its
        drawings are used.
    most_drawings : int
        Largest number of drawings per noun, at least 1: the first ones in the order of `elakit.world.art.drawings`.
    mirrored : float
        Probability that an entity is mirrored from left to right.
    entities : tuple of float
        Shares of scenes with one, two, three and four entities; they add up to 1. Trailing zeros may be omitted.
    single_sizes : tuple of float
        Smallest and largest size of a single entity, as shares of the scene's side, greater than 0 and at most 1.
    layouts : mapping of str to float
        Shares of the layouts of pairs; they add up to 1, and none is larger than `LARGEST_LAYOUT`.
    free_captions : float
        Probability that a caption has one of the `FREE_WORDINGS`, chosen at random. Otherwise, it is worded as in the
        benchmark, "a red car and a bird". With three or four entities, 60% of the captions have the wording
        "list" instead. The setting has no effect on captions that state a relation.
    stated : float
        Probability that the caption of a pair states the relation of the two entities, if the relation is clear.
    held_out : float
        Share of noun pairs that no scene shows together.
    natural : float
        Probability that a colored entity has its natural color (`NATURAL_COLOR`); otherwise its color is random.
    shadow : float
        Darkness of the drop shadow, 0 to 1.
    backgrounds : tuple of str
        Kinds of backgrounds to choose from; see `elakit.world.backgrounds.KINDS`.

    Raises
    ------
    SettingError
        A number is outside the range that is stated for its setting. The shares of `entities` or of `layouts` do not
        add up to 1. `artists`, `views`, `layouts` or `backgrounds` is empty or has an unknown name.
    """

    size: int = 128
    artists: tuple[str, ...] = ARTISTS
    views: tuple[str, ...] = VIEWS
    most_drawings: int = 100
    mirrored: float = 0.5
    entities: tuple[float, ...] = (0.4, 0.4, 0.15, 0.05)
    single_sizes: tuple[float, float] = (0.25, 0.85)
    layouts: Mapping[str, float] = field(
        default_factory=lambda: {
            "row": 0.28,
            "column": 0.18,
            "diagonal": 0.12,
            "free": 0.12,
            "occluded": 0.1,
            "large and small": 0.1,
            "worn": 0.06,
            "on": 0.04,
        }
    )
    free_captions: float = 0.25
    stated: float = 0.3
    held_out: float = 0.25
    natural: float = 0.35
    shadow: float = 0.28
    backgrounds: tuple[str, ...] = KINDS
    _drawings: dict[str, tuple[Drawing, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        shares = self.entities
        if not 1 <= len(shares) <= MOST_ENTITIES or not abs(sum(shares) - 1) <= 1e-6 or min(shares) < 0:
            raise SettingError(
                f"World(entities={list(shares)}): must be one to {MOST_ENTITIES} numbers from 0 to 1 that add up to 1, "
                "such as [0.4, 0.4, 0.15, 0.05]. The first number is the share of scenes with one entity, the second "
                "the share with two entities, and so on."
            )
        if len(self.single_sizes) != 2 or not 0 < self.single_sizes[0] <= self.single_sizes[1] <= 1:
            raise SettingError(
                f"World(single_sizes={list(self.single_sizes)}): must be two numbers above 0 and at most 1, the "
                "smaller number first, such as [0.25, 0.85]. They are the smallest and the largest size of a single "
                "entity, as shares of the scene's side."
            )
        for setting in ("size", "most_drawings"):
            checks.whole_number(getattr(self, setting), setting, 1, owner="World")
        for setting in ("mirrored", "free_captions", "stated", "held_out", "natural", "shadow"):
            checks.share(getattr(self, setting), setting, owner="World")
        for setting, allowed in (("artists", ARTISTS), ("views", VIEWS), ("backgrounds", KINDS)):
            if isinstance(chosen := getattr(self, setting), str) or not chosen:
                checks.refuse(chosen, setting, f"a list of one or more of {', '.join(allowed)}", owner="World")
            for one in chosen:
                checks.choice(one, setting, allowed, owner="World")
        if unknown := set(self.layouts) - set(PAIR_LAYOUTS):
            named = ", ".join(map(repr, sorted(unknown)))
            raise SettingError(
                f"Unknown {plural('layout', len(unknown))} {named} in layouts. Choose from {', '.join(PAIR_LAYOUTS)}."
            )
        values = list(self.layouts.values())
        if not abs(sum(values) - 1) <= 1e-6 or min(values) < 0 or max(values) > LARGEST_LAYOUT:
            raise SettingError(
                f"World(layouts={dict(self.layouts)}): each share must be from 0 to {LARGEST_LAYOUT}, and the shares "
                f"must add up to 1. They add up to {sum(values):g}."
            )

    def drawings(self, noun: str) -> tuple[Drawing, ...]:
        """Drawings of a noun that scenes of this world may show."""
        if noun not in self._drawings:
            every = drawings(noun, self.artists)
            seen = tuple(d for d in every if d.view in self.views) or every
            self._drawings[noun] = seen[: self.most_drawings]
        return self._drawings[noun]

    def without(self, hidden: Callable[[Drawing], bool]) -> World:
        """Copy of this world without the drawings for which `hidden` returns True.

        If no drawing of a noun would remain, the noun keeps all its drawings.
        """
        smaller = replace(self)
        for noun in NOUNS:
            every = self.drawings(noun)
            smaller._drawings[noun] = tuple(d for d in every if not hidden(d)) or every
        return smaller

    def held_out_pairs(self) -> frozenset[frozenset[str]]:
        """Pairs of nouns that no scene shows together. Worlds with the same `held_out` have the same pairs."""
        return _held_out_pairs(self.held_out)


@lru_cache(maxsize=8)
def _held_out_pairs(share: float) -> frozenset[frozenset[str]]:
    pairs = [frozenset(pair) for pair in itertools.combinations(NOUNS, 2)]
    order = np.random.default_rng(2024).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: round(share * len(pairs))])


def caption(
    subjects: tuple[Subject, ...],
    correct_article: bool = True,
    wording: str = BENCHMARK_WORDING,
    relation: str | None = None,
) -> str:
    """Caption of a scene.

    Parameters
    ----------
    subjects : tuple of Subject
        Subjects in the order in which the caption names them.
    correct_article : bool
        True writes "an" before a vowel; False always writes "a", as the benchmark does.
    wording : str
        "and" (the wording of the benchmark) or one of `FREE_WORDINGS`. "next to", "beside" and "with" replace the first
        "and". "list" replaces every "and" except the last by a comma. "picture" begins the caption with "a picture of".
        "bare" leaves the articles out.
    relation : str, optional
        Relation of the first subject to the second, a key of `RELATION_WORDS`. If it is given, the caption states it,
        and `wording` has no effect.

    Returns
    -------
    str

    Raises
    ------
    SettingError
        The wording or the relation is unknown.

    Examples
    --------
    >>> caption((Subject("car", "orange"), Subject("bird")))
    'an orange car and a bird'
    >>> three = (Subject("bird", "red"), Subject("car", "green"), Subject("dog"))
    >>> caption(three, wording="list")
    'a red bird, a green car and a dog'
    >>> caption(three[:2], wording="next to"), caption(three[:2], wording="bare")
    ('a red bird next to a green car', 'red bird and green car')
    >>> caption(three[:2], relation="left of")
    'a red bird to the left of a green car'
    """
    if wording not in (BENCHMARK_WORDING, *FREE_WORDINGS):
        raise SettingError(
            f"Unknown wording {wording!r}. Choose from {', '.join((BENCHMARK_WORDING, *FREE_WORDINGS))}."
        )
    if relation is not None and relation not in RELATION_WORDS:
        raise SettingError(f"Unknown relation {relation!r}. Choose from {', '.join(RELATION_WORDS)}.")
    if wording == "bare" and relation is None:
        return " and ".join(s.words for s in subjects)
    phrases = [f"{article(s.words) if correct_article else 'a'} {s.words}" for s in subjects]
    if relation is not None:
        return f"{phrases[0]} {RELATION_WORDS[relation]} {' and '.join(phrases[1:])}"
    if wording == "picture":
        return "a picture of " + " and ".join(phrases)
    if wording == "list" and len(phrases) > 2:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if wording in ("next to", "beside", "with") and len(phrases) > 1:
        return f"{phrases[0]} {wording} {' and '.join(phrases[1:])}"
    return " and ".join(phrases)


def sample_subjects(world: World, rng: np.random.Generator, layout: str | None = None) -> tuple[Subject, ...]:
    """Random subjects for a scene; their number and colors follow the settings of a world.

    Two nouns that the world never shows together (`World.held_out_pairs`) are not chosen for the same scene.

    Parameters
    ----------
    world : World
    rng : numpy.random.Generator
    layout : str, optional
        Layout of a pair. If it is given, the result is two subjects that can have this layout. By default the number of
        subjects is random.

    Returns
    -------
    tuple of Subject

    Raises
    ------
    SettingError
        No set of nouns was found in which every pair may be shown together: `World.held_out` is too large.
    """
    held_out = world.held_out_pairs()
    count = 2 if layout else 1 + int(rng.choice(len(world.entities), p=world.entities))
    for _ in range(MOST_DRAWS):
        nouns = [str(noun) for noun in rng.choice(NOUNS, count, replace=False)]
        if layout and not fits(layout, nouns[0], nouns[1]):
            continue
        if not any(frozenset(pair) in held_out for pair in itertools.combinations(nouns, 2)):
            return tuple(Subject(noun, _sample_color(noun, world, rng)) for noun in nouns)
    what = f"{count} nouns" + (f" for the layout {layout!r}" if layout else "")
    raise SettingError(
        f"World(held_out={world.held_out}): all {MOST_DRAWS} random choices of {what} were refused, because two of the "
        "nouns are never shown together in this world. Lower held_out."
    )


def _sample_color(noun: str, world: World, rng: np.random.Generator) -> str | None:
    # the benchmark leaves animals uncolored and colors most objects
    if rng.random() < (0.6 if noun in ANIMALS else 0.15):
        return None
    return NATURAL_COLOR[noun] if rng.random() < world.natural else str(rng.choice(COLORS))


def sample(world: World, rng: np.random.Generator) -> Scene:
    """Random scene of a world.

    For a pair, the layout is chosen before the subjects. Therefore, each layout occurs with exactly the probability
    that `World.layouts` gives it.
    """
    count = 1 + int(rng.choice(len(world.entities), p=world.entities))
    if count != 2:
        alone = replace(world, entities=tuple(float(i == count - 1) for i in range(count)))
        return compose(sample_subjects(alone, rng), world, rng)
    layout = str(rng.choice(list(world.layouts), p=list(world.layouts.values())))
    while True:
        subjects = sample_subjects(world, rng, layout)
        if rng.random() < 0.5:  # "a bench under a cat"
            subjects = subjects[::-1]
        if (scene := _attempt(subjects, layout, world, rng)) is not None:
            return scene


def compose(subjects: tuple[Subject, ...], world: World, rng: np.random.Generator, layout: str | None = None) -> Scene:
    """Compose a scene of the given subjects.

    Parameters
    ----------
    subjects : tuple of Subject
        One to four subjects.
    world : World
        Settings of the scene, such as its size and its drawings.
    rng : numpy.random.Generator
    layout : str, optional
        Layout of the scene. By default it is sampled from the layouts that the subjects can have.

    Returns
    -------
    Scene
        Entities and caption are in the order of `subjects`.

    Raises
    ------
    SettingError
        There are no subjects or more than four. The subjects cannot have the given layout, or their drawings do not fit
        into it. Without `layout`: the drawings fit into none of the layouts.

    Examples
    --------
    >>> world, rng = World(artists=("fluent-3d",)), np.random.default_rng(0)
    >>> scene = compose((Subject("lion"), Subject("car", "blue")), world, rng, "row")
    >>> lion, car = scene.entities
    >>> car.subject.words, scene.image.shape, bool((lion.mask & car.mask).any())
    ('blue car', (128, 128, 3), False)
    """
    if not 1 <= len(subjects) <= MOST_ENTITIES:
        raise SettingError(f"A scene has one to {MOST_ENTITIES} subjects, not {len(subjects)}.")
    shares = _possible(subjects, world)
    if layout is not None:
        if layout not in shares:
            raise SettingError(
                f"{' and '.join(s.words for s in subjects)} cannot have the layout {layout!r}. "
                f"Choose from {', '.join(shares)}."
            )
        shares = {layout: 1.0}
    while shares:
        total = sum(shares.values())
        chosen = str(rng.choice(list(shares), p=[value / total for value in shares.values()]))
        if (scene := _attempt(subjects, chosen, world, rng)) is not None:
            return scene
        del shares[chosen]
    named = " and ".join(s.words for s in subjects)
    others = [name for name in _possible(subjects, world) if name != layout]
    if layout is None or not others:
        raise SettingError(f"The drawings of {named} fit no layout. Choose other subjects.")
    raise SettingError(f"The drawings of {named} do not fit the layout {layout!r}. Choose from {', '.join(others)}.")


def _possible(subjects: tuple[Subject, ...], world: World) -> dict[str, float]:
    """Layouts that the subjects can have, each with its relative frequency; the frequencies need not add up to 1."""
    if len(subjects) == 1:
        return {"single": 1.0}
    if len(subjects) == 3:
        return dict(THREE_LAYOUTS)
    if len(subjects) == 4:
        return dict(FOUR_LAYOUTS)
    a, b = (s.noun for s in subjects)
    return {
        name: share for name, share in world.layouts.items() if share and (fits(name, a, b) or fits(name, b, a))
    } or {"free": 1.0}


def _attempt(subjects: tuple[Subject, ...], layout: str, world: World, rng: np.random.Generator) -> Scene | None:
    """A scene with this layout, or None if no placement was found."""
    swapped = len(subjects) == 2 and not fits(layout, subjects[0].noun, subjects[1].noun)
    if swapped:
        subjects = subjects[::-1]
    for _ in range(TRIES):
        chosen = [world.drawings(s.noun)[rng.integers(len(world.drawings(s.noun)))] for s in subjects]
        sprites = [_sprite(drawing, s.color) for drawing, s in zip(chosen, subjects, strict=True)]
        places = _places(layout, subjects, chosen, sprites, world, rng)
        if places is None:
            continue
        # the last is in front; which of an occluded pair that is, is left to chance
        order = list(range(len(subjects)))
        if layout == "occluded" and rng.random() < 0.5:
            order.reverse()
        layers = [sprite_layer(sprite, place, world) for sprite, place in zip(sprites, places, strict=True)]
        masks = _visible(layers, order, layout)
        if masks is not None:
            break
    else:
        return None
    canvas, kind = background(world.backgrounds, [mean_color(sprite) for sprite in sprites], world.size, rng)
    for i in order:
        canvas = blend(canvas, layers[i], world.shadow)
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    entities = [SceneEntity(s, d, bounding_box(m), m) for s, d, m in zip(subjects, chosen, masks, strict=True)]
    relation = _relation(layout, masks, order) if len(subjects) == 2 else None
    if swapped:
        entities.reverse()
        relation = CONVERSE[relation] if relation else None
    text, stated = _caption(tuple(e.subject for e in entities), relation, world, rng)
    return Scene(
        image=image,
        caption=text,
        entities=tuple(entities),
        background=kind,
        layout=layout,
        relation=relation,
        stated=stated,
    )


def _places(
    layout: str,
    subjects: tuple[Subject, ...],
    chosen: list[Drawing],
    sprites: list[Image.Image],
    world: World,
    rng: np.random.Generator,
) -> list[Place] | None:
    if layout == "single":
        return [posed(single_place(world.single_sizes, rng), rng, world.mirrored)]
    if len(subjects) > 2:
        return group_places(layout, len(subjects), rng, world.mirrored)
    first, second = (
        Shape(_ink(sprite), drawing.head, drawing.eyes) for sprite, drawing in zip(sprites, chosen, strict=True)
    )
    if layout == "worn":
        pair = worn_places(subjects[1].noun, (first, second), rng, world.mirrored)
    else:
        pair = pair_places(layout, (first, second), rng, world.mirrored)
    return None if pair is None else list(pair)


def _visible(layers: list[np.ndarray], order: list[int], layout: str) -> np.ndarray | None:
    """Mask of the visible pixels of each of n subjects; None if the placement of the subjects is not acceptable.

    A placement is not acceptable if a thing is covered too much, if the rear thing in the layout "occluded" is hardly
    covered, or if the two things in the layout "worn" or "on" do not touch.

    Parameters
    ----------
    layers : list of ndarray, (size, size, 4)
        Layer of each subject, as `sprite_layer` returns it.
    order : list of int
        Indices of the subjects, from the rearmost to the foremost.
    layout : str

    Returns
    -------
    ndarray, bool, (n, size, size), or None
    """
    whole = np.stack([layer[..., 3] > 0.5 for layer in layers])
    masks = whole.copy()
    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            masks[i] &= ~whole[j]
    seen = masks.sum((1, 2)) / np.maximum(1, whole.sum((1, 2)))
    if seen.min() < LEAST_SEEN.get(layout, 0.7) or (layout == "occluded" and seen.min() > MOST_SEEN_BEHIND):
        return None
    if layout in ("worn", "on") and not binary_dilation(masks[0], iterations=2)[masks[1]].any():
        return None  # it floats beside a narrow support
    return masks


def _relation(layout: str, masks: np.ndarray, order: list[int]) -> str | None:
    """Relation of the first of two entities to the second, a key of `RELATION_WORDS`; None if it is not clear.

    `masks` are the masks of the entities. `order` has their indices, the rear entity first.
    """
    if layout == "occluded":
        return "behind" if order[0] == 0 else "in front of"
    if layout in ("worn", "on"):
        return "wearing" if layout == "worn" else "on"
    return relation_of(masks[0], masks[1])


def _caption(
    subjects: tuple[Subject, ...], relation: str | None, world: World, rng: np.random.Generator
) -> tuple[str, bool]:
    correct = bool(rng.random() < 0.5)
    if relation is not None and rng.random() < world.stated:
        return caption(subjects, correct, relation=relation), True
    wording = str(rng.choice(FREE_WORDINGS)) if rng.random() < world.free_captions else BENCHMARK_WORDING
    if len(subjects) > 2 and rng.random() < 0.6:
        wording = "list"
    return caption(subjects, correct, wording), False


def sprite_layer(sprite: Image.Image, place: Place, world: World) -> np.ndarray:
    """Transparent layer that shows a sprite at its place: premultiplied RGBA in [0, 1], float32, (size, size, 4)."""
    size = world.size
    side = max(4, round(place.scale * size))
    if place.flip:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if place.angle:
        sprite = sprite.rotate(place.angle, Image.Resampling.BILINEAR)
    sprite = sprite.resize((side, side), Image.Resampling.HAMMING)  # sharper than bilinear, no ringing
    layer = Image.new("RGBa", (size, size))
    layer.paste(sprite, (round(place.x * size - side / 2), round(place.y * size - side / 2)))
    return np.asarray(layer, np.float32) / 255


def blend(canvas: np.ndarray, layer: np.ndarray, shadow: float) -> np.ndarray:
    """Copy of a canvas that shows a layer in front of the canvas, with the layer's drop shadow on the canvas.

    `canvas` is RGB in [0, 1], (size, size, 3). `layer` is premultiplied RGBA, (size, size, 4), as `sprite_layer`
    returns it. `shadow` is the darkness of the shadow, 0 to 1.
    """
    alpha, offset = layer[..., 3], max(1, len(canvas) // 40)
    below = np.zeros_like(alpha)
    below[offset:, offset:] = alpha[:-offset, :-offset]
    canvas = canvas * (1 - shadow * below[..., None])
    return canvas * (1 - alpha[..., None]) + layer[..., :3]


def sprite_of(subject: Subject, world: World, rng: np.random.Generator) -> Image.Image:
    """Random drawing of a subject, in the subject's color, as a premultiplied square image of side `SPRITE_SIZE`."""
    every = world.drawings(subject.noun)
    return _sprite(every[rng.integers(len(every))], subject.color)


@lru_cache(maxsize=4096)
def _sprite(drawing: Drawing, color: str | None) -> Image.Image:
    """Drawing in a color, or in its own colors if `color` is None, as a premultiplied image.

    Pillow can rotate and resize a premultiplied image without halos at the edges.
    """
    rgba = _natural_sprite(drawing)
    if color is not None:
        rgba = recolor(rgba, color, rule_for(drawing))
    rgba = np.dstack([rgba[..., :3] * rgba[..., 3:], rgba[..., 3]])
    return Image.frombuffer(
        "RGBa", rgba.shape[1::-1], (rgba * 255 + 0.5).astype(np.uint8).tobytes(), "raw", "RGBa", 0, 1
    )


@lru_cache(maxsize=256)
def _natural_sprite(drawing: Drawing) -> np.ndarray:
    return rasterize(drawing, SPRITE_SIZE)


def _ink(sprite: Image.Image) -> tuple[float, float, float, float]:
    """Bounding box (left, top, right, bottom) of a sprite's opaque pixels, in shares of the sprite's side."""
    box = sprite.getchannel("a").point(lambda alpha: 255 if alpha > 127 else 0).getbbox() or (0, 0, *sprite.size)
    left, top, right, bottom = (value / sprite.width for value in box)
    return left, top, right, bottom


def mean_color(sprite: Image.Image) -> np.ndarray:
    """Mean RGB color of a sprite's opaque pixels, in [0, 1], (3,)."""
    pixels = np.asarray(sprite.resize((8, 8), Image.Resampling.BOX), np.float32)
    return pixels[..., :3].sum((0, 1)) / max(1.0, float(pixels[..., 3].sum()))
