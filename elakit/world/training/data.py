"""Scenes as training data: composed once, kept as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from elakit.world.scenes import World, sample
from elakit.world.vocabulary import COLORS, NOUNS

BACKGROUND = 0  # class of pixels that belong to no entity; noun n of NOUNS has class n + 1


@dataclass(frozen=True)
class Scenes:
    """Composed scenes.

    Attributes
    ----------
    images : ndarray, uint8, (n, size, size, 3)
    captions : list of str
    classes : ndarray, uint8, (n, size, size)
        0 for the background, 1 + index in ``NOUNS`` elsewhere.
    colors : ndarray, int8, (n, 3)
        Index in ``COLORS`` of each entity's color, -1 for "as drawn" or no entity.
    """

    images: np.ndarray
    captions: list[str]
    classes: np.ndarray
    colors: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Images as floats in [-1, 1], (n, 3, size, size)."""
        pixels = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2).float()
        return pixels / 127.5 - 1


def compose_scenes(world: World, count: int, seed: int) -> Scenes:
    """Compose `count` scenes.

    Parameters
    ----------
    world : World
    count : int
    seed : int
        Training uses small seeds, tests large ones.
    """
    rng = np.random.default_rng(seed)
    images = np.empty((count, world.size, world.size, 3), np.uint8)
    classes = np.zeros((count, world.size, world.size), np.uint8)
    colors = np.full((count, 3), -1, np.int8)
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


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to [0, 1]."""
    return images / 2 + 0.5
