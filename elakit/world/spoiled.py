"""Unrecognizable shapes, composed with ground truth as training examples for the judge.

Weak models generate blobs of the right color at the right location. Here drawings are turned into such shapes in one of
five ways: bent ("warped"), blurred ("smeared"), reduced to scattered parts ("erased"), cut into tiles that change
places ("shuffled"), or replaced by a random outline that is filled with their colors ("blob").
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter, map_coordinates, zoom

from elakit.errors import SettingError
from elakit.numbering import plural
from elakit.world.backgrounds import background
from elakit.world.layouts import Place, posed
from elakit.world.scenes import World, blend, mean_color, sample_subjects, sprite_layer, sprite_of

KINDS = ("warped", "smeared", "erased", "shuffled", "blob")
SCALES = (0.3, 0.7)  # longest side of the drawing that is spoiled, as a share of the scene's


@dataclass(frozen=True)
class Spoiled:
    """An image with an unrecognizable shape, and perhaps a recognizable ("clean") thing beside it.

    Attributes
    ----------
    image : ndarray, uint8, (size, size, 3)
    spoiled : ndarray, bool, (size, size)
        Pixels of the unrecognizable shape.
    clean : ndarray, bool, (size, size)
        Pixels of the clean thing; all False if there is none.
    nouns : tuple of str
        Noun of the drawing that was made unrecognizable, and, if there is a clean thing, its noun.
    kind : str
        One of `KINDS`.
    """

    image: np.ndarray
    spoiled: np.ndarray
    clean: np.ndarray
    nouns: tuple[str, ...]
    kind: str


def sample_spoiled(world: World, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Spoiled:
    """Random image with an unrecognizable shape.

    In half of the images, a recognizable thing stands beside the shape.

    Parameters
    ----------
    world : World
        Settings from which the image is composed, such as its size.
    rng : numpy.random.Generator
    kinds : tuple of str
        Kinds of unrecognizable shapes to choose from: "warped", "smeared", "erased", "shuffled" and "blob".

    Returns
    -------
    Spoiled
        The image, with a mask of the shape and a mask of the recognizable thing.

    Raises
    ------
    SettingError
        A kind is unknown.

    Examples
    --------
    The image has a side of 128 pixels, the default. The mask of the shape is not empty. No pixel is in both masks:

    >>> spoiled = sample_spoiled(World(artists=("noto",)), np.random.default_rng(0), ("shuffled",))
    >>> spoiled.image.shape, bool(spoiled.spoiled.any()), bool((spoiled.spoiled & spoiled.clean).any())
    ((128, 128, 3), True, False)
    """
    if unknown := set(kinds) - set(KINDS):
        named = ", ".join(map(repr, sorted(unknown)))
        raise SettingError(
            f"Unknown {plural('kind', len(unknown))} {named} of unrecognizable shapes. Choose from {', '.join(KINDS)}."
        )
    kind, beside = str(rng.choice(kinds)), bool(rng.random() < 0.5)
    subjects = sample_subjects(World(entities=(0, 1), held_out=0, natural=world.natural), rng)[: 1 + beside]
    sprites = [sprite_of(subject, world, rng) for subject in subjects]
    scale, x = float(rng.uniform(*SCALES)), 0.5
    if beside:
        scale, x = min(scale, 0.48), float(rng.choice([0.26, 0.74]))
    place = posed(Place(x, 0.5 + float(rng.uniform(-0.12, 0.12)), scale), rng, world.mirrored)
    shape = _spoil(sprite_layer(sprites[0], place, world), kind, place, rng)
    canvas, _ = background(world.backgrounds, [mean_color(sprite) for sprite in sprites], world.size, rng)
    clean = np.zeros((world.size, world.size), bool)
    if beside:
        clear = Place(1 - x, 0.5 + float(rng.uniform(-0.12, 0.12)), float(rng.uniform(0.36, 0.48)))
        other = posed(clear, rng, world.mirrored)
        layer = sprite_layer(sprites[1], other, world)
        canvas, clean = blend(canvas, layer, world.shadow), layer[..., 3] > 0.5
    canvas = blend(canvas, shape, world.shadow)
    spoiled = shape[..., 3] > 0.5
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Spoiled(
        image=image, spoiled=spoiled, clean=clean & ~spoiled, nouns=tuple(s.noun for s in subjects), kind=kind
    )


def _spoil(layer: np.ndarray, kind: str, place: Place, rng: np.random.Generator) -> np.ndarray:
    """Make the drawing in an RGBA layer unrecognizable.

    `layer` and the result are premultiplied, (size, size, 4). `kind` is one of `KINDS`. `place` is the place of the
    drawing in the layer.
    """
    size, side = len(layer), place.scale * len(layer)
    if kind == "warped":
        return _warped(layer, 0.14, side, rng)
    if kind == "smeared":
        return gaussian_filter(_warped(layer, 0.06, side, rng), (0.11 * side, 0.11 * side, 0)).clip(0, 1)
    if kind == "erased":
        patches = _noise(size, side, rng)
        cut = np.quantile(patches[layer[..., 3] > 0.5], rng.uniform(0.6, 0.75))
        return _warped(layer * ((patches - cut) * 4 + 0.5).clip(0, 1)[..., None], 0.05, side, rng)
    if kind == "shuffled":
        count = int(rng.integers(3, 5))
        top, left = (round(c * size - side / 2) for c in (place.y, place.x))
        step = max(2, round(side / count))
        corners = [
            (int(np.clip(top + i * step, 0, size - step)), int(np.clip(left + j * step, 0, size - step)))
            for i in range(count)
            for j in range(count)
        ]
        mixed = layer.copy()
        for (y, x), k in zip(corners, rng.permutation(len(corners)), strict=True):
            v, u = corners[int(k)]
            mixed[y : y + step, x : x + step] = layer[v : v + step, u : u + step]
        return _warped(gaussian_filter(mixed, (0.7, 0.7, 0)), 0.05, side, rng)
    # blob: a random outline filled with the drawing's colors
    y, x = np.mgrid[0:size, 0:size]
    radius = np.hypot(y - place.y * size, x - place.x * size) / side
    outline = _noise(size, side, rng) * 0.12 + 0.38 - radius
    alpha = (outline * side).clip(0, 1)[..., None]
    filling = gaussian_filter(_warped(layer, 0.2, side, rng), (0.05 * side, 0.05 * side, 0))
    ink = filling[..., :3] / np.maximum(filling[..., 3:], 1e-3)
    mean = layer[..., :3].sum((0, 1)) / max(1.0, float(layer[..., 3].sum()))
    color = np.where(filling[..., 3:] > 0.3, ink, mean).clip(0, 1)
    return np.concatenate([color * alpha, alpha], -1).astype(np.float32)


def _warped(layer: np.ndarray, strength: float, side: float, rng: np.random.Generator) -> np.ndarray:
    """Bend the drawing in an RGBA layer, (size, size, 4), by shifting pixels with a smooth random field.

    The shifts have a standard deviation of about `strength * side` pixels. `side` is the longest side of the drawing,
    in pixels.
    """
    size = len(layer)
    knots = int(np.clip(round(5 * size / side), 5, 16))
    shift = strength * side * rng.normal(0, 1, (2, knots, knots))
    shift = zoom(shift, (1, size / knots, size / knots), order=3, grid_mode=True, mode="nearest")
    at = np.mgrid[0:size, 0:size] + shift
    return np.stack([map_coordinates(layer[..., c], at, order=1) for c in range(4)], -1)


def _noise(size: int, side: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth random field, (size, size), with mean 0 and variance 1.

    The field has about four bumps along a length of `side` pixels. `side` is the longest side of the drawing that the
    field distorts.
    """
    field = gaussian_filter(rng.normal(0, 1, (size, size)), max(1.5, side / 9), mode="wrap")
    return (field - field.mean()) / field.std()
