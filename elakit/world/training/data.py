"""Training scenes, composed once and kept as uint8 arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from elakit.files import replace_file
from elakit.world.backgrounds import background
from elakit.world.layouts import Place, posed
from elakit.world.scenes import Subject, World, blend, mean_color, sample, sprite_layer, sprite_of
from elakit.world.training.workers import in_order
from elakit.world.vocabulary import COLORS, NOUNS

BACKGROUND = 0  # class of pixels that belong to no entity; noun n of NOUNS has class n + 1


@dataclass(frozen=True)
class Scenes:
    """Composed scenes with their ground truth.

    Attributes
    ----------
    images : ndarray, uint8, (n, size, size, 3)
    captions : list of str
    classes : ndarray, uint8, (n, size, size)
        Class of each pixel: 0 for the background, 1 + index of the noun in ``NOUNS`` for an entity.
    colors : ndarray, int8, (n, k)
        Color of each entity, as an index in ``COLORS``. A scene has at most k entities. The index is -1 for an entity
        that has the colors of its drawing. The index is also -1 where a scene has fewer than k entities.
    """

    images: np.ndarray
    captions: list[str]
    classes: np.ndarray
    colors: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Images at the given indices, float32 in [-1, 1], (n, 3, size, size)."""
        pixels = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float()
        return pixels / 127.5 - 1


def compose_scenes(world: World, count: int, seed: int) -> Scenes:
    """Compose random scenes.

    Parameters
    ----------
    world : World
        Settings from which the scenes are composed.
    count : int
        Number of scenes.
    seed : int
        Seed of the random generator. The training uses small seeds, and tests use large seeds.

    Returns
    -------
    Scenes
    """
    rng = np.random.default_rng(seed)
    images = np.empty((count, world.size, world.size, 3), np.uint8)
    classes = np.zeros((count, world.size, world.size), np.uint8)
    colors = np.full((count, len(world.entities)), -1, np.int8)
    captions = []
    for i in tqdm(range(count), desc="scenes", unit="scene", mininterval=5):
        scene = sample(world, rng)
        images[i] = scene.image
        captions.append(scene.caption)
        for j, entity in enumerate(scene.entities):
            classes[i][entity.mask] = 1 + NOUNS.index(entity.subject.noun)
            if entity.subject.color is not None:
                colors[i, j] = COLORS.index(entity.subject.color)
    return Scenes(images, captions, classes, colors)


CROWD_PART = 250  # scenes that one process composes at a time
CROWD, CROWD_SCALES = (4, 8), (0.2, 0.6)  # number of things, and their longest side as a share of the scene's


def compose_crowds(world: World, count: int, seed: int | tuple[int, ...]) -> Scenes:
    """Compose the training scenes of the autoencoder, which show many small things in any color.

    The things may cover each other. The autoencoder needs neither captions nor the colors of the things.

    Parameters
    ----------
    world : World
        Settings from which the scenes are composed.
    count : int
        Number of scenes.
    seed : int or tuple of int
        Seed of the random generator.

    Returns
    -------
    Scenes
        Scenes with empty captions. All values of ``colors`` are -1.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((count, world.size, world.size, 3), np.uint8)
    classes = np.zeros((count, world.size, world.size), np.uint8)
    for i in tqdm(range(count), desc="crowds", unit="scene", mininterval=5):
        nouns = rng.choice(NOUNS, int(rng.integers(*CROWD, endpoint=True)))
        colors = [None if rng.random() < 0.3 else str(rng.choice(COLORS)) for _ in nouns]
        sprites = [sprite_of(Subject(str(n), c), world, rng) for n, c in zip(nouns, colors, strict=True)]
        canvas, _ = background(world.backgrounds, [mean_color(sprite) for sprite in sprites], world.size, rng)
        for noun, sprite in zip(nouns, sprites, strict=True):
            x, y = rng.uniform(0.08, 0.92, 2)
            place = posed(Place(x, y, rng.uniform(*CROWD_SCALES)), rng, world.mirrored)
            layer = sprite_layer(sprite, place, world)
            canvas = blend(canvas, layer, world.shadow)
            classes[i][layer[..., 3] > 0.5] = 1 + NOUNS.index(str(noun))
        images[i] = (canvas.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Scenes(images, [""] * count, classes, np.full((count, 1), -1, np.int8))


def cached_crowds(world: World, count: int, seed: int, path: Path, workers: int = 0) -> Scenes:
    """Read the scenes of `compose_crowds` from the file `path`, or compose the scenes and write this file.

    The file is read if it was made with the same settings. Otherwise, the scenes are composed, and the file is
    replaced. `workers` processes compose the scenes in parts. If `workers` is 0, this process composes the scenes.
    """
    made_with = repr((world, count, seed, CROWD_PART))
    if path.exists():
        with np.load(path) as kept:
            if str(kept["made_with"]) == made_with:
                return Scenes(kept["images"], [""] * count, kept["classes"], np.full((count, 1), -1, np.int8))
    sizes = [min(CROWD_PART, count - start) for start in range(0, count, CROWD_PART)]
    parts = list(in_order(compose_crowds, [(world, size, (seed, i)) for i, size in enumerate(sizes)], workers))
    images, classes = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "classes"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as part:
        np.savez(part, made_with=made_with, images=images, classes=classes)
    return Scenes(images, [""] * count, classes, np.full((count, 1), -1, np.int8))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Images in [-1, 1], converted to [0, 1]."""
    return images / 2 + 0.5
