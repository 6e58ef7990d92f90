"""Train the judge: a segmenter of composed scenes, a third of them seen through the autoencoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from elakit.judge.segmenter import Segmenter
from elakit.world.training.config import Config
from elakit.world.training.data import Scenes, compose_scenes
from elakit.world.training.loop import Schedule, train


def train_judge(config: Config, folder: Path, device: torch.device) -> Segmenter:
    """Train on new scenes and save to ``folder/judge/model.safetensors`` (fp16).

    Parameters
    ----------
    config : Config
    folder : Path
        Must hold the trained autoencoder, ``vae/``.
    device : torch.device
    """
    settings = config.judge
    scenes = compose_scenes(config.world, settings.scenes, seed=3)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device).eval()
    rebuilt = rebuild(scenes, vae, settings.scenes // 3, device)
    torch.manual_seed(1)
    model = Segmenter(settings.channels).to(device)
    rng = np.random.default_rng(4)

    def loss(step: int) -> Tensor:
        rows = rng.integers(len(scenes), size=settings.batch)
        pictures = scenes.batch(rows)
        # every third picture as the autoencoder gives it back: what the judge will see is decoded, not composed
        decoded = rows % 3 == 0
        pictures[torch.from_numpy(decoded)] = (
            torch.from_numpy(rebuilt[rows[decoded] // 3]).permute(0, 3, 1, 2) / 127.5 - 1
        )
        target = torch.from_numpy(scenes.classes[rows]).long().to(device)
        with torch.autocast(device.type, torch.bfloat16):
            scores = model(_disturb(pictures).to(device))
        return F.cross_entropy(scores.float(), target)

    schedule = Schedule(settings.samples, settings.batch, settings.learning_rate, average=0.998)
    model = train(model, loss, schedule, folder, "judge")
    (folder / "judge").mkdir(exist_ok=True)
    save_file(
        {name: value.half().contiguous() for name, value in model.state_dict().items()},
        folder / "judge" / "model.safetensors",
    )
    return model


def rebuild(scenes: Scenes, vae: Any, count: int, device: torch.device) -> np.ndarray:
    """Every third scene encoded and decoded, uint8 (count, size, size, 3)."""
    pictures = []
    for start in range(0, count, 64):
        batch = scenes.batch(3 * np.arange(start, min(start + 64, count))).to(device)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            decoded = vae.decode(vae.encode(batch).latent_dist.sample()).sample
        pictures.append(((decoded.float().clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).cpu().numpy())
    return np.concatenate(pictures)


def _disturb(pictures: Tensor) -> Tensor:
    """Noise, blur, contrast and brightness, a little of each, differing per picture."""
    n = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="reflect"), 3, 1)
    amount = torch.rand(n, 1, 1, 1) * (torch.rand(n, 1, 1, 1) < 0.5)
    pictures = torch.lerp(pictures, blurred, amount)
    pictures = pictures * (1 + 0.15 * torch.randn(n, 1, 1, 1)) + 0.08 * torch.randn(n, 3, 1, 1)
    return pictures + 0.05 * torch.rand(n, 1, 1, 1) * torch.randn_like(pictures)
