"""Scenes as training data: composed once, kept as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from elakit.world.scenes import World, sample
from elakit.world.vocabulary import COLOURS, NOUNS

BACKGROUND = 0  # class of pixels that belong to no entity; noun n of NOUNS has class n + 1


@dataclass(frozen=True)
class Scenes:
    """Composed scenes.

    Attributes
    ----------
    pictures : ndarray, uint8, (n, size, size, 3)
    captions : list of str
    classes : ndarray, uint8, (n, size, size)
        0 for the background, 1 + index in ``NOUNS`` elsewhere.
    colours : ndarray, int8, (n, 3)
        Index in ``COLOURS`` of each entity's colour, -1 for "as drawn" or no entity.
    """

    pictures: np.ndarray
    captions: list[str]
    classes: np.ndarray
    colours: np.ndarray

    def __len__(self) -> int:
        return len(self.pictures)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        """Pictures as floats in [-1, 1], (n, 3, size, size)."""
        pixels = torch.from_numpy(self.pictures[indices]).permute(0, 3, 1, 2).float()
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
    pictures = np.empty((count, world.size, world.size, 3), np.uint8)
    classes = np.zeros((count, world.size, world.size), np.uint8)
    colours = np.full((count, 3), -1, np.int8)
    captions = []
    for i in tqdm(range(count), desc="scenes", unit="scene", mininterval=5):
        scene = sample(world, rng)
        pictures[i] = scene.image
        captions.append(scene.caption)
        for j, entity in enumerate(scene.entities):
            classes[i][entity.mask] = 1 + NOUNS.index(entity.subject.noun)
            if entity.subject.colour is not None:
                colours[i, j] = COLOURS.index(entity.subject.colour)
    return Scenes(pictures, captions, classes, colours)


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """From [-1, 1] to [0, 1]."""
    return pictures / 2 + 0.5
