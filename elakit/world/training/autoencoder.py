"""Train the autoencoder (AutoencoderKL): pictures to latents and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F

from elakit.world.training.config import Config
from elakit.world.training.data import Scenes, to_unit
from elakit.world.training.loop import Schedule, train


def build(config: Config) -> Any:
    """An untrained autoencoder of the configuration."""
    stages = len(config.vae.channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * stages,
        up_block_types=("UpDecoderBlock2D",) * stages,
        block_out_channels=config.vae.channels,
        latent_channels=config.vae.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=config.world.size,
        scaling_factor=1.0,
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
    AutoencoderKL
        In eval mode.
    """
    settings = config.vae
    model: Any = build(config).to(device)
    rng = np.random.default_rng(1)

    def loss(step: int) -> torch.Tensor:
        pictures = scenes.batch(rng.integers(len(scenes), size=settings.batch)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            noise = torch.randn_like(posterior.mean)
            rebuilt = model.decode(posterior.mean + posterior.std * noise).sample
        rebuilt = rebuilt.float()
        error = F.l1_loss(rebuilt, pictures)
        edges = sum(F.l1_loss(rebuilt.diff(dim=axis), pictures.diff(dim=axis)) for axis in (-1, -2))
        return error + settings.edges * edges + settings.kl * posterior.kl().float().mean()

    def sheet(average: Any, step: int) -> None:
        pictures = scenes.batch(np.arange(16)).to(device)
        with torch.no_grad():
            rebuilt = average.decode(average.encode(pictures).latent_dist.mode()).sample
        pixels = (torch.cat([pictures, rebuilt]).cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        size = config.world.size
        grid = pixels.reshape(4, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(4 * size, 8 * size, 3)
        Image.fromarray((grid * 255).round().astype(np.uint8)).resize(
            (16 * size, 8 * size), Image.Resampling.NEAREST
        ).save(folder / "vae.png")

    schedule = Schedule(settings.samples, settings.batch, settings.learning_rate, average=0.998)
    model = train(model, loss, schedule, folder, "vae", on_checkpoint=sheet)
    with torch.no_grad():
        latents = model.encode(scenes.batch(np.arange(min(512, len(scenes)))).to(device)).latent_dist.sample()
    model.register_to_config(scaling_factor=float(1 / latents.std()))
    model.save_pretrained(folder / "vae")
    return model


def psnr(model: Any, scenes: Scenes, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over the first `count` scenes."""
    with torch.no_grad():
        pictures = scenes.batch(np.arange(count)).to(model.device)
        rebuilt = model.decode(model.encode(pictures).latent_dist.mode()).sample.clamp(-1, 1)
    error = (to_unit(rebuilt) - to_unit(pictures)).pow(2).mean((1, 2, 3))
    return float((-10 * error.log10()).mean())
