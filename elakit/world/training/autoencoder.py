"""Train the autoencoder (AutoencoderTiny): images to latents and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch.nn import functional as F

from elakit.world.training.config import Config
from elakit.world.training.data import Scenes, to_unit
from elakit.world.training.loop import Schedule, train


def build(config: Config) -> Any:
    """An untrained autoencoder of the configuration.

    ``AutoencoderTiny`` has no group norm, which in narrow layers throws an image's overall colors away, and which
    makes crops look unlike whole images.
    """
    settings = config.vae
    widths = (settings.width,) * len(settings.encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=settings.encoder_blocks,
        num_decoder_blocks=settings.decoder_blocks,
        latent_channels=settings.latent_channels,
    )


def train_autoencoder(config: Config, scenes: Scenes, folder: Path, device: torch.device) -> Any:
    """Train on scenes and save to ``folder/vae``; the scaling factor makes latents of unit variance.

    Parameters
    ----------
    config : Config
    scenes : Scenes
    folder : Path
        Checkpoints and sample sheets go here.
    device : torch.device

    Returns
    -------
    AutoencoderTiny
        In eval mode.
    """
    settings = config.vae
    torch.manual_seed(0)
    model: Any = build(config).to(device, memory_format=torch.channels_last)

    schedule = Schedule(settings.samples, settings.batch, settings.learning_rate, average=0.998)

    def loss(step: int) -> torch.Tensor:
        whole = step >= settings.crop_share * schedule.steps
        return _loss(model, _batch(config, scenes, np.random.default_rng((1, step)), whole).to(device), config)

    def sheet(average: Any, step: int) -> None:
        _sheet(average, config, scenes, folder)

    model = train(model, loss, schedule, folder, "vae", on_checkpoint=sheet)
    with torch.no_grad():
        latents = model.encode(scenes.batch(np.arange(min(512, len(scenes)))).to(device)).latents
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    model.save_pretrained(folder / "vae")
    return model


def train_decoder(config: Config, scenes: Scenes, folder: Path, device: torch.device) -> Any:
    """Train the decoder of ``folder/vae`` on, with the encoder as it is: sharper images, the same latents.

    Parameters
    ----------
    config : Config
    scenes : Scenes
    folder : Path
        Must hold the trained autoencoder, ``vae/``, whose decoder is replaced.
    device : torch.device

    Returns
    -------
    AutoencoderTiny
        In eval mode.
    """
    settings = config.vae
    model: Any = AutoencoderTiny.from_pretrained(folder / "vae")
    model = model.to(device, memory_format=torch.channels_last).requires_grad_(False)
    model.decoder.requires_grad_(True)
    schedule = Schedule(settings.polish, settings.batch, settings.learning_rate, average=0.998)

    def loss(step: int) -> torch.Tensor:
        whole = step >= settings.crop_share * schedule.steps
        return _loss(model, _batch(config, scenes, np.random.default_rng((6, step)), whole).to(device), config)

    def sheet(average: Any, step: int) -> None:
        polished = copy.deepcopy(model).eval()
        polished.decoder.load_state_dict(average.state_dict())
        _sheet(polished, config, scenes, folder)

    average = train(model.decoder, loss, schedule, folder, "decoder", on_checkpoint=sheet)
    model.decoder.load_state_dict(average.state_dict())
    model.eval().save_pretrained(folder / "vae")
    return model


def _batch(config: Config, scenes: Scenes, rng: np.random.Generator, whole: bool) -> torch.Tensor:
    """Random images, (batch, 3, side, side) in [-1, 1]: crops around entities, or whole scenes."""
    rows = rng.integers(len(scenes), size=config.vae.batch)
    images = scenes.batch(rows)
    if not whole:
        images = _crops(images, scenes.classes[rows], config.vae.crop, rng)
    return images.contiguous(memory_format=torch.channels_last)


def _loss(model: Any, images: torch.Tensor, config: Config) -> torch.Tensor:
    """Absolute error of pixels and of differences between neighboring pixels, and a pull on the latents."""
    settings = config.vae
    with torch.autocast(images.device.type, torch.bfloat16):
        latents = model.encode(images).latents
        # the decoder bounds latents to -3..3; noise makes neighboring latents mean neighboring images
        rebuilt = model.decode(latents + settings.noise * torch.randn_like(latents)).sample
    rebuilt = rebuilt.float()
    error = F.l1_loss(rebuilt, images)
    edges = sum(F.l1_loss(rebuilt.diff(dim=axis), images.diff(dim=axis)) for axis in (-1, -2))
    return error + settings.edges * edges + settings.pull * latents.float().pow(2).mean()


def _sheet(model: Any, config: Config, scenes: Scenes, folder: Path) -> None:
    """Sixteen scenes and, below them, what is made of them, twice the size."""
    images, size = scenes.batch(np.arange(16)).to(model.device), config.world.size
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images).latents).sample
    pixels = (torch.cat([images, rebuilt]).cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    grid = pixels.reshape(4, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(4 * size, 8 * size, 3)
    sheet = Image.fromarray((grid * 255).round().astype(np.uint8))
    sheet.resize((16 * size, 8 * size), Image.Resampling.NEAREST).save(folder / "vae.png")


def _crops(images: torch.Tensor, classes: np.ndarray, side: int, rng: np.random.Generator) -> torch.Tensor:
    """A square of each image whose center is near a pixel of an entity."""
    cut = []
    for image, truth in zip(images, classes, strict=True):
        rows, columns = np.nonzero(truth)
        i, limit = rng.integers(len(rows)), truth.shape[0] - side
        top, left = (int(np.clip(at[i] - side // 2, 0, limit)) for at in (rows, columns))
        cut.append(image[:, top : top + side, left : left + side])
    return torch.stack(cut)


def psnr(model: Any, scenes: Scenes, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over the first `count` scenes."""
    with torch.no_grad():
        images = scenes.batch(np.arange(count)).to(model.device)
        rebuilt = model.decode(model.encode(images).latents).sample.clamp(-1, 1)
    error = (to_unit(rebuilt) - to_unit(images)).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
