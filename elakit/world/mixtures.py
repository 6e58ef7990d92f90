"""Hybrids of two things, composed with ground truth as training examples for the judge.

Generated images fuse two things in many ways, four of which are composed here. The second thing is painted over the
first ("overlaid"), both things are transparent ("blended"), each thing shows one half ("halves"), or the outline of the
first thing has the colors and texture of the second ("filled"). For comparison, a fifth kind of image has no hybrid:
the second thing is partly in front of the first ("occluded"). A `Mixture` holds an image of any of the five kinds.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image

from elakit import checks
from elakit.errors import SettingError
from elakit.world.backgrounds import background
from elakit.world.layouts import Place, posed
from elakit.world.scenes import Subject, World, blend, mean_color, sample_subjects, sprite_layer, sprite_of

KINDS = ("overlaid", "blended", "halves", "filled")
UNCERTAIN = 255  # class of pixels that show two things about equally
LEAST_SHARE = 0.2  # of a hybrid's pixels that each of its two things must show
TRIES = 40  # placements before two drawings are given up: glasses cover no fifth of a lion


@dataclass(frozen=True)
class Mixture:
    """An image with a hybrid or, for the kind "occluded", with one thing partly in front of another.

    Attributes
    ----------
    image : ndarray, uint8, (size, size, 3)
    subjects : tuple of Subject
        The two subjects that are combined. A third subject, which may be missing, stands beside the two.
    owner : ndarray, uint8, (size, size)
        Thing that each pixel shows most: 1, 2 or 3 for the first, second or third subject, 0 for the background.
        The value is ``UNCERTAIN`` where two things are blended about equally.
    mixed : ndarray, bool, (size, size)
        Pixels of the hybrid; all False for "occluded".
    kind : str
        One of `KINDS`, or "occluded".
    """

    image: np.ndarray
    subjects: tuple[Subject, ...]
    owner: np.ndarray
    mixed: np.ndarray
    kind: str


def compose_mixture(subjects: tuple[Subject, ...], kind: str, world: World, rng: np.random.Generator) -> Mixture:
    """Compose an image with a hybrid of the first two subjects; a third subject, if given, stands beside the hybrid.

    Parameters
    ----------
    subjects : tuple of Subject
        Two or three subjects.
    kind : str
        One of `KINDS`, or "occluded": the second thing is in front of the first and covers part of it, at most 30%.
    world : World
    rng : numpy.random.Generator

    Returns
    -------
    Mixture

    Raises
    ------
    SettingError
        The kind is unknown, the number of subjects is not 2 or 3, or no placement was found in which both things are
        visible enough.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> mixture = compose_mixture((Subject("cat"), Subject("frog")), "halves", World(artists=("noto",)), rng)
    >>> mixture.image.shape, bool(mixture.mixed.any())
    ((128, 128, 3), True)
    """
    if kind not in (*KINDS, "occluded"):
        raise SettingError(f"Unknown kind of mixture {kind!r}. Choose from {', '.join((*KINDS, 'occluded'))}.")
    if not 2 <= len(subjects) <= 3:
        raise SettingError(f"A mixture has two or three subjects, not {len(subjects)}.")
    alone = len(subjects) == 2
    for _ in range(TRIES):
        sprites = [sprite_of(s, world, rng) for s in subjects]
        scale = rng.uniform(0.45, 0.75) if alone else rng.uniform(0.4, 0.52)
        x = 0.5 + rng.uniform(-0.1, 0.1) if alone else rng.choice([0.27, 0.73])
        place = Place(x, 0.5 + rng.uniform(-0.1, 0.1), scale)
        layer, owned, mixed = _meet(sprites[0], sprites[1], kind, place, world, rng)
        shares = [(owned == i).sum() / max(1, (owned > 0).sum()) for i in (1, 2)]
        if kind == "blended" or min(shares) >= LEAST_SHARE:
            break
    else:
        raise SettingError(
            f"{subjects[0].noun} and {subjects[1].noun} cannot be combined as {kind!r}: none of {TRIES} random "
            "placements shows enough of both. Choose other nouns or another kind."
        )
    canvas, _ = background(world.backgrounds, [mean_color(sprite) for sprite in sprites], world.size, rng)
    owner = np.zeros((world.size, world.size), np.uint8)
    if not alone:
        beside = Place(1 - x, 0.5 + rng.uniform(-0.1, 0.1), rng.uniform(0.36, 0.46))
        third = sprite_layer(sprites[2], posed(beside, rng, world.mirrored), world)
        canvas = blend(canvas, third, world.shadow)
        owner[third[..., 3] > 0.5] = 3
    canvas = blend(canvas, layer, world.shadow)
    inside = layer[..., 3] > 0.5
    owner[inside] = owned[inside]
    image = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Mixture(image=image, subjects=subjects, owner=owner, mixed=mixed & inside, kind=kind)


def sample_mixture(world: World, rng: np.random.Generator, kinds: tuple[str, ...] = KINDS) -> Mixture:
    """Image with a hybrid of two random things; in at most 30% of the images, a third thing stands beside the hybrid.

    Parameters
    ----------
    world : World
    rng : numpy.random.Generator
    kinds : tuple of str
        Kinds to choose from, as in `compose_mixture`. If the kind "occluded" is chosen, the image has no hybrid.

    Returns
    -------
    Mixture

    Raises
    ------
    SettingError
        No kind is given, a kind is unknown, or all scenes of the world have one entity.
    """
    if not kinds:
        raise SettingError(f"No kind of mixture is given. Choose from {', '.join((*KINDS, 'occluded'))}.")
    for one in kinds:
        checks.choice(one, "kind", (*KINDS, "occluded"), owner="sample_mixture")
    if not any(world.entities[1:]):
        raise SettingError(
            f"World(entities={list(world.entities)}): all scenes have one entity, but a mixture needs two. Set, for "
            "example, entities=[0.5, 0.5]: half of the scenes then have two entities."
        )
    kind = str(rng.choice(kinds))
    while True:
        subjects = sample_subjects(world, rng)
        if len(subjects) < 2:
            continue
        with suppress(SettingError):
            return compose_mixture(subjects[: 3 if rng.random() < 0.3 else 2], kind, world, rng)


def _meet(
    first: Image.Image, second: Image.Image, kind: str, place: Place, world: World, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Combine two sprites at a place of the scene, in the way that `kind` names.

    Returns
    -------
    ndarray, (size, size, 4)
        Layer that shows both sprites, as premultiplied RGBA in [0, 1].
    ndarray, uint8, (size, size)
        Sprite that each pixel shows most: 1 or 2, 0 for none, ``UNCERTAIN`` if both are blended about equally. For the
        kind "occluded", all values are 0 if the second sprite covers too much of the first, or nothing.
    ndarray, bool, (size, size)
        Pixels of the hybrid; all False for the kind "occluded".
    """
    size = world.size
    apart = {"overlaid": 0.3, "occluded": 0.85}.get(kind, 0.08) * place.scale
    angle = rng.uniform(0, 2 * np.pi)
    reach = apart * (rng.uniform(0.75, 1) if kind == "occluded" else rng.uniform(0, 1))
    scales = (place.scale, place.scale) if kind != "occluded" else (place.scale * 0.7, place.scale * 0.7)
    offset = np.array([np.cos(angle), np.sin(angle)]) * reach / 2
    a = sprite_layer(
        first, posed(Place(place.x - offset[0], place.y - offset[1], scales[0]), rng, world.mirrored), world
    )
    other = Place(place.x + offset[0], place.y + offset[1], scales[1] * rng.uniform(0.85, 1.1))
    b = sprite_layer(second, posed(other, rng, world.mirrored), world)
    alphas = np.stack([a[..., 3], b[..., 3]])
    owned = np.zeros((size, size), np.uint8)
    if kind in ("overlaid", "occluded"):
        layer = a * (1 - b[..., 3:]) + b
        owned[alphas[0] > 0.5] = 1
        owned[alphas[1] > 0.5] = 2
        if kind == "occluded":
            seen = (owned == 1).sum() / max(1, (alphas[0] > 0.5).sum())
            # too much covered to be a pair, or not touching: rejected
            owned = owned if 0.7 <= seen < 1 else np.zeros_like(owned)
            return layer, owned, np.zeros((size, size), bool)
    elif kind == "blended":
        weight = rng.uniform(0.35, 0.65)
        layer = weight * a + (1 - weight) * b
        layer[..., 3] = np.maximum(layer[..., 3], alphas.max(0) * 0.85)
        strength = alphas * np.array([weight, 1 - weight])[:, None, None]
        owned = np.where(alphas.max(0) > 0.5, 1 + strength.argmax(0), 0).astype(np.uint8)
        if abs(weight - 0.5) < 0.08:
            owned[alphas.min(0) > 0.5] = UNCERTAIN
    elif kind == "halves":
        y, x = np.mgrid[0:size, 0:size] / size
        turn, shift = rng.uniform(0, 2 * np.pi), rng.uniform(-0.2, 0.2) * place.scale
        side = (x - place.x) * np.cos(turn) + (y - place.y) * np.sin(turn) - shift
        share = 1 / (1 + np.exp(-side * size / rng.uniform(0.5, 4)))[..., None]
        layer = share * a + (1 - share) * b
        owned = np.where(layer[..., 3] > 0.5, np.where(share[..., 0] > 0.5, 1, 2), 0).astype(np.uint8)
    else:  # filled: the second's looks inside the first's outline
        layer = a * (1 - b[..., 3:]) + b * a[..., 3:]
        owned[alphas[0] > 0.5] = 1
        owned[(alphas > 0.5).all(0)] = 2
    return layer.astype(np.float32), owned, owned > 0
