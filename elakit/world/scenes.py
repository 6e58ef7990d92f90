"""Captioned scenes whose truth is known: every entity's noun, color, box and exact mask.

A scene is one to three drawings on a quiet background. A `World` says how often a scene has one, two or three entities,
how its caption is worded, which pairs of nouns are never shown together, and how strongly things keep the color they
have in life. Few pairs and a strong prior make a model that bleeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from elakit.errors import SettingError
from elakit.measures.masks import bounding_box
from elakit.world.art import ARTISTS, Drawing, drawings, rasterize
from elakit.world.backgrounds import background
from elakit.world.recolor import recolor, rule_for
from elakit.world.vocabulary import ANIMALS, COLORS, NATURAL_COLOR, NOUNS, article

SPRITE_SIZE = 112  # pixels; larger than any entity in a 128 px scene

# Wordings of a caption; {} is a subject with its article, "bare" leaves the articles out.
BENCHMARK_WORDING = "and"
FREE_WORDINGS = ("next to", "beside", "with", "list", "picture", "bare")


@dataclass(frozen=True)
class Subject:
    """What a caption asks for: a noun, and a color or None for "as drawn"."""

    noun: str
    color: str | None = None

    @property
    def words(self) -> str:
        """The noun with its color, without an article: "red car"."""
        return f"{self.color} {self.noun}" if self.color else self.noun


@dataclass(frozen=True)
class SceneEntity:
    """One thing in a scene.

    Attributes
    ----------
    subject : Subject
    drawing : Drawing
    box : tuple of int
        (left, top, right, bottom) of the visible pixels; right and bottom exclusive.
    mask : ndarray, bool, (size, size)
        Visible pixels: covered by this entity and by none drawn later.
    """

    subject: Subject
    drawing: Drawing
    box: tuple[int, int, int, int]
    mask: np.ndarray


@dataclass(frozen=True)
class Scene:
    """An image with its caption and its truth.

    Attributes
    ----------
    image : ndarray, uint8, (size, size, 3)
    caption : str
    entities : tuple of SceneEntity
        In the caption's order.
    background : str
    layout : str
        "single", "row", "diagonal", "stack" (one above the other), "three" (in a row) or "triangle".
    """

    image: np.ndarray
    caption: str
    entities: tuple[SceneEntity, ...]
    background: str
    layout: str


@dataclass(frozen=True)
class World:
    """What the scenes are like.

    Attributes
    ----------
    size : int
        Side of a scene in pixels.
    artists : tuple of str
        Whose drawings are used (see `elakit.world.art.ARTISTS`).
    views : tuple of str
        "body" and "face" drawings, or one of them; a noun that has none of the view keeps what it has.
    entities : tuple of float
        Shares of scenes with one, two and three entities; they add up to 1.
    free_captions : float
        Share of captions in one of `FREE_WORDINGS`; the others are worded as the benchmark's, "a red car and a bird".
    held_out : float
        Share of noun pairs that no scene shows together.
    natural : float
        Probability that a colored entity has its natural color (`NATURAL_COLOR`); otherwise any color.
    shadow : float
        Darkness of the drop shadow, 0 to 1.
    backgrounds : tuple of str

    Raises
    ------
    SettingError
        The shares of `entities` are not three, or do not add up to 1.
    """

    size: int = 128
    artists: tuple[str, ...] = ARTISTS
    views: tuple[str, ...] = ("body", "face")
    entities: tuple[float, ...] = (0.4, 0.45, 0.15)
    free_captions: float = 0.25
    held_out: float = 0.25
    natural: float = 0.35
    shadow: float = 0.28
    backgrounds: tuple[str, ...] = ("plain", "gradient", "ground")
    _drawings: dict[str, tuple[Drawing, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.entities) != 3 or abs(sum(self.entities) - 1) > 1e-6 or min(self.entities) < 0:
            raise SettingError(
                f"The shares of scenes with one, two and three entities are {list(self.entities)}; "
                "give three numbers that add up to 1, such as [0.4, 0.45, 0.15]."
            )

    def drawings(self, noun: str) -> tuple[Drawing, ...]:
        """This world's drawings of a noun."""
        if noun not in self._drawings:
            every = drawings(noun, self.artists)
            self._drawings[noun] = tuple(d for d in every if d.view in self.views) or every
        return self._drawings[noun]

    def without(self, hidden: Callable[[Drawing], bool]) -> World:
        """This world without some drawings; a noun that would have none left keeps all."""
        smaller = replace(self)
        for noun in NOUNS:
            every = self.drawings(noun)
            smaller._drawings[noun] = tuple(d for d in every if not hidden(d)) or every
        return smaller

    def held_out_pairs(self) -> frozenset[frozenset[str]]:
        """The pairs of nouns never shown together; the same for every world with the same share."""
        pairs = [frozenset(pair) for pair in itertools.combinations(NOUNS, 2)]
        order = np.random.default_rng(2024).permutation(len(pairs))
        return frozenset(pairs[i] for i in order[: round(self.held_out * len(pairs))])


def caption(subjects: tuple[Subject, ...], correct_article: bool = True, wording: str = BENCHMARK_WORDING) -> str:
    """The caption of a scene.

    Parameters
    ----------
    subjects : tuple of Subject
    correct_article : bool
        False writes "a" before vowels too, as the benchmark does.
    wording : str
        "and" (the benchmark's form) or one of `FREE_WORDINGS`.

    Raises
    ------
    SettingError
        The wording is unknown.

    Examples
    --------
    >>> caption((Subject("car", "orange"), Subject("bird")))
    'an orange car and a bird'
    >>> three = (Subject("bird", "red"), Subject("car", "green"), Subject("dog"))
    >>> caption(three, wording="list")
    'a red bird, a green car and a dog'
    >>> caption(three[:2], wording="next to"), caption(three[:2], wording="bare")
    ('a red bird next to a green car', 'red bird and green car')
    """
    if wording not in (BENCHMARK_WORDING, *FREE_WORDINGS):
        raise SettingError(
            f"Unknown wording {wording!r}. Choose from {', '.join((BENCHMARK_WORDING, *FREE_WORDINGS))}."
        )
    if wording == "bare":
        return " and ".join(s.words for s in subjects)
    phrases = [f"{article(s.words) if correct_article else 'a'} {s.words}" for s in subjects]
    if wording == "picture":
        return "a picture of " + " and ".join(phrases)
    if wording == "list" and len(phrases) > 2:
        return f"{', '.join(phrases[:-1])} and {phrases[-1]}"
    if wording in ("next to", "beside", "with") and len(phrases) > 1:
        return f"{phrases[0]} {wording} {' and '.join(phrases[1:])}"
    return " and ".join(phrases)


def sample_subjects(world: World, rng: np.random.Generator) -> tuple[Subject, ...]:
    """Draw what a scene is about, with the world's shares and without its held-out pairs."""
    held_out = world.held_out_pairs()
    count = 1 + int(rng.choice(3, p=world.entities))
    while True:
        nouns = [str(noun) for noun in rng.choice(NOUNS, count, replace=False)]
        if not any(frozenset(pair) in held_out for pair in itertools.combinations(nouns, 2)):
            return tuple(Subject(noun, _sample_color(noun, world, rng)) for noun in nouns)


def _sample_color(noun: str, world: World, rng: np.random.Generator) -> str | None:
    # the benchmark leaves animals uncolored and colors most objects
    if rng.random() < (0.6 if noun in ANIMALS else 0.15):
        return None
    return NATURAL_COLOR[noun] if rng.random() < world.natural else str(rng.choice(COLORS))


def compose(subjects: tuple[Subject, ...], world: World, rng: np.random.Generator) -> Scene:
    """Draw a scene of the given subjects.

    Parameters
    ----------
    subjects : tuple of Subject
        One to three.
    world : World
    rng : numpy.random.Generator

    Returns
    -------
    Scene

    Raises
    ------
    SettingError
        No subject or more than three.

    Examples
    --------
    >>> world, rng = World(artists=("fluent-3d",)), np.random.default_rng(0)
    >>> scene = compose((Subject("lion"), Subject("car", "blue")), world, rng)
    >>> lion, car = scene.entities
    >>> car.subject.words, scene.image.shape, bool((lion.mask & car.mask).any())
    ('blue car', (128, 128, 3), False)
    """
    if not 1 <= len(subjects) <= 3:
        raise SettingError(f"A scene has one to three subjects, not {len(subjects)}.")
    chosen = [world.drawings(s.noun)[rng.integers(len(world.drawings(s.noun)))] for s in subjects]
    sprites = [_sprite(drawing, s.color) for drawing, s in zip(chosen, subjects, strict=True)]
    canvas, kind = background(world.backgrounds, [mean_color(sprite) for sprite in sprites], world.size, rng)
    alphas = np.zeros((len(subjects), world.size, world.size), np.float32)
    layout, places = _layout(len(subjects), rng)
    for i, (place, sprite) in enumerate(zip(places, sprites, strict=True)):
        layer = sprite_layer(sprite, place, world, rng)
        canvas, alphas[i] = blend(canvas, layer, world.shadow), layer[..., 3]
    masks = alphas > 0.5
    for i in range(len(masks)):
        masks[i] &= ~masks[i + 1 :].any(0)
    entities = tuple(SceneEntity(s, d, bounding_box(m), m) for s, d, m in zip(subjects, chosen, masks, strict=True))
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    wording = str(rng.choice(FREE_WORDINGS)) if rng.random() < world.free_captions else BENCHMARK_WORDING
    return Scene(image, caption(subjects, bool(rng.random() < 0.5), wording), entities, kind, layout)


def sample(world: World, rng: np.random.Generator) -> Scene:
    """A random scene of the world."""
    return compose(sample_subjects(world, rng), world, rng)


@dataclass(frozen=True)
class Place:
    """Where a sprite is drawn."""

    x: float  # center, as a share of the scene's side
    y: float
    scale: float  # longest side of the sprite, likewise


def _layout(count: int, rng: np.random.Generator) -> tuple[str, list[Place]]:
    """A layout's name and a place for each entity, in no particular order."""
    if count == 1:
        return "single", [Place(0.5 + rng.uniform(-0.12, 0.12), 0.5 + rng.uniform(-0.1, 0.1), rng.uniform(0.5, 0.8))]
    if count == 3:
        kind = str(rng.choice(["three", "triangle"]))
        if kind == "three":
            centers = [(x, 0.5 + rng.uniform(-0.18, 0.18)) for x in (0.2, 0.5, 0.8)]
            small, large = 0.3, 0.36
        else:
            y, way = 0.5, rng.choice([-1, 1])
            centers = [(0.26, y + way * 0.2), (0.74, y + way * 0.2), (0.5 + rng.uniform(-0.08, 0.08), y - way * 0.22)]
            small, large = 0.36, 0.44
    else:
        small, large = 0.4, 0.5
        kind = str(rng.choice(["row", "diagonal", "stack"], p=[0.7, 0.15, 0.15]))
        if kind == "row":
            y, near = 0.5 + rng.uniform(-0.1, 0.1), rng.uniform(-0.02, 0.03)
            centers = [(x, y + rng.uniform(-0.06, 0.06)) for x in (0.25 - near, 0.75 + near)]
        elif kind == "diagonal":
            rise = rng.choice([-0.2, 0.2])
            centers = [(0.27, 0.5 - rise), (0.73, 0.5 + rise)]
        else:
            centers = [(0.5 + rng.uniform(-0.12, 0.12), y) for y in (0.26, 0.74)]
    order = rng.permutation(count)
    return kind, [Place(float(centers[i][0]), float(centers[i][1]), rng.uniform(small, large)) for i in order]


def sprite_layer(sprite: Image.Image, place: Place, world: World, rng: np.random.Generator) -> np.ndarray:
    """A sprite, perhaps mirrored and tilted, on an empty scene: premultiplied RGBA, float32 (size, size, 4)."""
    size = world.size
    side = max(4, round(place.scale * size))
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        sprite = sprite.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
    sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    layer = Image.new("RGBa", (size, size))
    layer.paste(sprite, (round(place.x * size - side / 2), round(place.y * size - side / 2)))
    return np.asarray(layer, np.float32) / 255


def blend(canvas: np.ndarray, layer: np.ndarray, shadow: float) -> np.ndarray:
    """A layer and its drop shadow over a canvas."""
    alpha, offset = layer[..., 3], max(1, len(canvas) // 40)
    below = np.zeros_like(alpha)
    below[offset:, offset:] = alpha[:-offset, :-offset]
    canvas = canvas * (1 - shadow * below[..., None])
    return canvas * (1 - alpha[..., None]) + layer[..., :3]


def sprite_of(subject: Subject, world: World, rng: np.random.Generator) -> Image.Image:
    """One of the world's drawings of a subject, in its color."""
    every = world.drawings(subject.noun)
    return _sprite(every[rng.integers(len(every))], subject.color)


@lru_cache(maxsize=4096)
def _sprite(drawing: Drawing, color: str | None) -> Image.Image:
    """A drawing in a color as a premultiplied image (what Pillow can rotate and resize without halos)."""
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


def mean_color(sprite: Image.Image) -> np.ndarray:
    """Mean RGB of a sprite's ink."""
    pixels = np.asarray(sprite.resize((8, 8), Image.Resampling.BOX), np.float32)
    return pixels[..., :3].sum((0, 1)) / max(1.0, float(pixels[..., 3].sum()))
