"""Captioned scenes whose truth is known: every entity's noun, colour, box and exact mask.

A scene is one or more drawings on a plain background. A `World` says how often a scene has two entities, which pairs
of nouns are never shown together, and how strongly things keep their natural colour.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image

from elakit.errors import SettingError
from elakit.world.art import ARTISTS, Drawing, drawings, rasterise
from elakit.world.backgrounds import background
from elakit.world.recolour import recolour, rule_for
from elakit.world.vocabulary import ANIMALS, COLOURS, NATURAL_COLOUR, NOUNS, article

SPRITE_SIZE = 112  # pixels; larger than any entity in a 128 px scene


@dataclass(frozen=True)
class Subject:
    """What a caption asks for: a noun, and a colour or None for "as drawn"."""

    noun: str
    colour: str | None = None

    @property
    def words(self) -> str:
        """The noun with its colour, without an article: "red car"."""
        return f"{self.colour} {self.noun}" if self.colour else self.noun


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
    """A picture with its caption and its truth.

    Attributes
    ----------
    image : ndarray, uint8, (size, size, 3)
    caption : str
    entities : tuple of SceneEntity
        In the caption's order.
    background : str
    """

    image: np.ndarray
    caption: str
    entities: tuple[SceneEntity, ...]
    background: str


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
    one_entity : float
        Share of scenes with a single entity; the others have two.
    held_out : float
        Share of noun pairs that no scene shows together.
    natural : float
        Probability that a coloured entity has its natural colour (`NATURAL_COLOUR`); otherwise any colour.
    shadow : float
        Darkness of the drop shadow, 0 to 1.
    backgrounds : tuple of str
    """

    size: int = 64
    artists: tuple[str, ...] = ARTISTS
    views: tuple[str, ...] = ("body", "face")
    one_entity: float = 0.4
    held_out: float = 0.25
    natural: float = 0.15
    shadow: float = 0.28
    backgrounds: tuple[str, ...] = ("plain", "gradient", "ground")
    _drawings: dict[str, tuple[Drawing, ...]] = field(default_factory=dict, repr=False, compare=False)

    def drawings(self, noun: str) -> tuple[Drawing, ...]:
        """This world's drawings of a noun."""
        if noun not in self._drawings:
            every = drawings(noun, self.artists)
            self._drawings[noun] = tuple(d for d in every if d.view in self.views) or every
        return self._drawings[noun]

    def held_out_pairs(self) -> frozenset[frozenset[str]]:
        """The pairs of nouns never shown together; the same for every world with the same share."""
        pairs = [frozenset(pair) for pair in itertools.combinations(NOUNS, 2)]
        order = np.random.default_rng(2024).permutation(len(pairs))
        return frozenset(pairs[i] for i in order[: round(self.held_out * len(pairs))])


def caption(subjects: tuple[Subject, ...], correct_article: bool = True) -> str:
    """The caption in the benchmark's form, "a red car and a bird".

    Parameters
    ----------
    subjects : tuple of Subject
    correct_article : bool
        False writes "a" before vowels too, as the benchmark does.

    Examples
    --------
    >>> caption((Subject("car", "orange"), Subject("bird")))
    'an orange car and a bird'
    """
    phrases = [f"{article(s.words) if correct_article else 'a'} {s.words}" for s in subjects]
    return " and ".join(phrases)


def sample_subjects(world: World, rng: np.random.Generator) -> tuple[Subject, ...]:
    """Draw what a scene is about, with the world's shares and without its held-out pairs."""
    if rng.random() < world.one_entity:
        noun = str(rng.choice(NOUNS))
        return (Subject(noun, _sample_colour(noun, world, rng)),)
    held_out = world.held_out_pairs()
    while True:
        first, second = (str(noun) for noun in rng.choice(NOUNS, 2, replace=False))
        if frozenset((first, second)) not in held_out:
            break
    return tuple(Subject(noun, _sample_colour(noun, world, rng)) for noun in (first, second))


def _sample_colour(noun: str, world: World, rng: np.random.Generator) -> str | None:
    # the benchmark leaves animals uncoloured and colours most objects
    if rng.random() < (0.6 if noun in ANIMALS else 0.15):
        return None
    return NATURAL_COLOUR[noun] if rng.random() < world.natural else str(rng.choice(COLOURS))


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
    >>> scene.caption, scene.image.shape, bool((scene.entities[0].mask & scene.entities[1].mask).any())
    ('a lion and a blue car', (64, 64, 3), False)
    """
    if not 1 <= len(subjects) <= 3:
        raise SettingError(f"A scene has one to three subjects, not {len(subjects)}.")
    chosen = [world.drawings(s.noun)[rng.integers(len(world.drawings(s.noun)))] for s in subjects]
    sprites = [_sprite(drawing, s.colour) for drawing, s in zip(chosen, subjects, strict=True)]
    canvas, kind = background(world.backgrounds, [_mean_colour(sprite) for sprite in sprites], world.size, rng)
    alphas = np.zeros((len(subjects), world.size, world.size), np.float32)
    for i, (place, sprite) in enumerate(zip(_layout(len(subjects), rng), sprites, strict=True)):
        canvas, alphas[i] = _draw(canvas, sprite, place, world.shadow, rng)
    masks = alphas > 0.5
    for i in range(len(masks)):
        masks[i] &= ~masks[i + 1 :].any(0)
    entities = tuple(SceneEntity(s, d, _box(m), m) for s, d, m in zip(subjects, chosen, masks, strict=True))
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Scene(image, caption(subjects, bool(rng.random() < 0.5)), entities, kind)


def sample(world: World, rng: np.random.Generator) -> Scene:
    """A random scene of the world."""
    return compose(sample_subjects(world, rng), world, rng)


@dataclass(frozen=True)
class _Place:
    x: float  # centre, as a share of the scene's side
    y: float
    scale: float  # longest side of the sprite, likewise


def _layout(count: int, rng: np.random.Generator) -> list[_Place]:
    if count == 1:
        return [_Place(0.5 + rng.uniform(-0.12, 0.12), 0.5 + rng.uniform(-0.1, 0.1), rng.uniform(0.5, 0.8))]
    if count == 3:
        xs, ys = np.array([0.22, 0.5, 0.78]), 0.5 + rng.uniform(-0.18, 0.18, 3)
        return [
            _Place(float(x), float(y), rng.uniform(0.3, 0.36)) for x, y in zip(rng.permutation(xs), ys, strict=True)
        ]
    kind = rng.choice(["row", "diagonal", "stack"], p=[0.7, 0.15, 0.15])
    if kind == "row":
        y, near = 0.5 + rng.uniform(-0.1, 0.1), rng.uniform(-0.02, 0.03)
        centres = [(x, y + rng.uniform(-0.06, 0.06)) for x in (0.25 - near, 0.75 + near)]
    elif kind == "diagonal":
        rise = rng.choice([-0.2, 0.2])
        centres = [(0.27, 0.5 - rise), (0.73, 0.5 + rise)]
    else:
        centres = [(0.5 + rng.uniform(-0.12, 0.12), y) for y in (0.26, 0.74)]
    order = rng.permutation(2)
    return [_Place(float(centres[i][0]), float(centres[i][1]), rng.uniform(0.4, 0.5)) for i in order]


def _draw(
    canvas: np.ndarray, sprite: Image.Image, place: _Place, shadow: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Blend a sprite and its drop shadow onto the canvas; returns it with the sprite's alpha, (size, size)."""
    size = canvas.shape[0]
    side = max(4, round(place.scale * size))
    if rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.3:
        sprite = sprite.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
    sprite = sprite.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2.0)
    layer = Image.new("RGBa", (size, size))
    layer.paste(sprite, (round(place.x * size - side / 2), round(place.y * size - side / 2)))
    pixels = np.asarray(layer, np.float32) / 255
    colour, alpha = pixels[..., :3], pixels[..., 3]
    offset = max(1, size // 40)
    below = np.zeros_like(alpha)
    below[offset:, offset:] = alpha[:-offset, :-offset]
    canvas = canvas * (1 - shadow * below[..., None])
    return canvas * (1 - alpha[..., None]) + colour, alpha


@lru_cache(maxsize=4096)
def _sprite(drawing: Drawing, colour: str | None) -> Image.Image:
    """A drawing in a colour as a premultiplied picture (what Pillow can rotate and resize without halos)."""
    rgba = _natural_sprite(drawing)
    if colour is not None:
        rgba = recolour(rgba, colour, rule_for(drawing))
    rgba = np.dstack([rgba[..., :3] * rgba[..., 3:], rgba[..., 3]])
    return Image.frombuffer(
        "RGBa", rgba.shape[1::-1], (rgba * 255 + 0.5).astype(np.uint8).tobytes(), "raw", "RGBa", 0, 1
    )


@lru_cache(maxsize=256)
def _natural_sprite(drawing: Drawing) -> np.ndarray:
    return rasterise(drawing, SPRITE_SIZE)


def _mean_colour(sprite: Image.Image) -> np.ndarray:
    pixels = np.asarray(sprite.resize((8, 8), Image.Resampling.BOX), np.float32)
    return pixels[..., :3].sum((0, 1)) / max(1.0, float(pixels[..., 3].sum()))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return (0, 0, 0, 0)
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
