"""Training scenes of the denoiser, composed in chunks when they are needed, and encoded only once."""

from __future__ import annotations

import dataclasses
import hashlib
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import CLIPTokenizer

from elakit.files import replace_file
from elakit.world.scenes import Scene, World, sample
from elakit.world.training.config import Config
from elakit.world.training.loop import autocast, rank_and_world
from elakit.world.vocabulary import NOUNS

ENCODED_AT_ONCE = 64


@dataclass(frozen=True)
class Composed:
    """Composed scenes, as images and captions that are not encoded yet.

    Attributes
    ----------
    images : ndarray, uint8, (n, size, size, 3)
    captions : list of str
    classes : ndarray, uint8, (n, h, w)
        Class of the pixel at the center of each latent location: 0 for the background, 1 + index of the noun in
        ``NOUNS`` for a thing. The latents have h x w locations.
    """

    images: np.ndarray
    captions: list[str]
    classes: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """Encoded scenes: latents of the images, token ids of the captions, and classes.

    Attributes
    ----------
    latents : Tensor, float16, (n, c, h, w)
        Latents of unit variance.
    tokens : Tensor, int64, (n, positions)
        Token ids of the captions, padded to the same length.
    classes : Tensor, uint8, (n, h, w)
        Class of the image at the center of each latent location: 0 for the background, 1 + index of the noun in
        ``NOUNS`` for a thing.
    """

    latents: Tensor
    tokens: Tensor
    classes: Tensor


class GrowingScenes:
    """Encoded training scenes, which are composed in chunks when the training needs more scenes, and kept on disk.

    A training on millions of images needs many scenes, and composing all scenes first would take hours. The training
    begins with a few chunks of scenes. Another chunk is composed whenever the scenes have been seen
    ``config.denoiser.reuse`` times on average.

    Chunks are numbered, and the number of a chunk is the seed of its scenes. A chunk therefore has the same scenes
    whenever it is composed with the same settings. If several processes train together, each process composes and uses
    chunks of its own.

    Parameters
    ----------
    config : Config
    folder : Path
        Folder of the training; chunks are kept in ``folder/scenes``.
    vae : AutoencoderTiny
    tokenizer : CLIPTokenizer
    device : torch.device
    workers : int
        Number of processes that compose the next chunks while the training runs. By default, this process composes each
        chunk when it is needed.
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        vae: Any,
        tokenizer: CLIPTokenizer,
        device: torch.device,
        workers: int = 0,
    ) -> None:
        self._config, self._folder, self._device = config, folder / "scenes", device
        self._vae, self._tokenizer = vae, tokenizer
        self._chunks: list[Encoded] = []
        self._rank, self._world = rank_and_world()
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers else None
        self._ahead: dict[int, Future[Composed]] = {}

    def count(self, samples: int) -> int:
        """Number of scenes in use after training on `samples` images; both numbers are totals over all processes."""
        settings = self._config.denoiser
        wanted = max(settings.first_scenes, samples // settings.reuse)
        return min(settings.scenes, -(-wanted // settings.chunk) * settings.chunk)

    def batch(self, samples: int, size: int) -> Encoded:
        """Random batch of `size` scenes, from the scenes that this process uses after training on `samples` images.

        `samples` is the total over all processes. Torch's global random generator chooses the scenes.
        """
        chunk = self._config.denoiser.chunk
        count = -(-self.count(samples) // (chunk * self._world)) * chunk
        while len(self._chunks) * chunk < count:
            self._chunks.append(self._chunk(len(self._chunks) * self._world + self._rank))
        rows = torch.randint(count, (size,)).tolist()
        picked = [(self._chunks[row // chunk], row % chunk) for row in rows]
        return Encoded(
            *(torch.stack([getattr(part, f.name)[i] for part, i in picked]) for f in dataclasses.fields(Encoded))
        )

    def _chunk(self, number: int) -> Encoded:
        """Chunk with the given number.

        It is read from its file if the file was made with the present settings. Otherwise it is composed and written.
        """
        path = self._path(number)
        if path.exists():
            kept = torch.load(path, weights_only=True)
            if kept.pop("made_with", None) == self._made_with:
                return Encoded(**kept)
            path.unlink()
        data = encode(self._composed(number), self._vae, self._tokenizer, self._device)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as part:
            torch.save(vars(data) | {"made_with": self._made_with}, part)
        return data

    @cached_property
    def _made_with(self) -> str:
        """Hash of everything that determines the content of a chunk: world, size, autoencoder and tokenizer."""
        settings = self._config.denoiser
        size, words = min(settings.chunk, settings.scenes), sorted(self._tokenizer.get_vocab().items())
        found = hashlib.sha256(repr((self._config.world, size, words, self._tokenizer.model_max_length)).encode())
        for name, value in self._vae.state_dict().items():
            found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:04d}.pt"

    def _composed(self, number: int) -> Composed:
        """Composed scenes of the chunk with the number `number`.

        Without workers, this process composes the scenes now. With workers, one of the workers composes the scenes, if
        possible in advance, and the next chunks are queued.
        """
        settings = self._config.denoiser
        size = min(settings.chunk, settings.scenes)
        side = self._config.world.size // 2 ** (len(self._config.vae.encoder_blocks) - 1)
        if self._pool is None:
            return compose(self._config.world, side, size, (2, number))
        last = -(-settings.scenes // settings.chunk)
        end = max(number + 1, min(last, number + self._workers * self._world + 1))
        for later in range(number, end, self._world):
            if later not in self._ahead and not self._path(later).exists():
                self._ahead[later] = self._pool.submit(compose, self._config.world, side, size, (2, later))
        return self._ahead.pop(number).result()


def compose(world: World, side: int, count: int, seed: int | tuple[int, ...]) -> Composed:
    """Compose `count` random scenes, whose latents will have `side` x `side` locations."""
    rng = np.random.default_rng(seed)
    scenes = [sample(world, rng) for _ in tqdm(range(count), desc="compose", unit="scene", mininterval=5)]
    return Composed(
        np.stack([scene.image for scene in scenes]),
        [scene.caption for scene in scenes],
        np.stack([_classes(scene, side) for scene in scenes]),
    )


@torch.no_grad()
def encode(composed: Composed, vae: Any, tokenizer: CLIPTokenizer, device: torch.device) -> Encoded:
    """Encode composed scenes: images with the autoencoder, captions with the tokenizer."""
    latents, tokens = [], []
    for start in range(0, len(composed.images), ENCODED_AT_ONCE):
        rows = slice(start, start + ENCODED_AT_ONCE)
        pixels = torch.from_numpy(composed.images[rows]).permute(0, 3, 1, 2).to(device)
        with autocast(device):
            mean = vae.encode(pixels.float() / 127.5 - 1).latents
        latents.append((mean.float() * vae.config.scaling_factor).half().cpu())
        tokens.append(tokenizer(composed.captions[rows], padding="max_length", return_tensors="pt").input_ids)
    return Encoded(torch.cat(latents), torch.cat(tokens), torch.from_numpy(composed.classes))


def _classes(scene: Scene, side: int) -> np.ndarray:
    """Class numbers of the background or things at the centers of the latent locations, uint8, (side, side).

    The number is 0 for the background, and 1 + index of the noun in ``NOUNS`` for a thing.
    """
    found = np.zeros(scene.image.shape[:2], np.uint8)
    for entity in scene.entities:
        found[entity.mask] = 1 + NOUNS.index(entity.subject.noun)
    step = len(found) // side
    return found[step // 2 :: step, step // 2 :: step]
