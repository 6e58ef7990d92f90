"""Training of the autoencoder (`AutoencoderTiny`), which encodes images as latents and decodes them."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from elakit.judge.segmenter import Segmenter, load_segmenter
from elakit.world.training import linear_runs
from elakit.world.training.config import Config, VaeSettings
from elakit.world.training.data import Scenes, to_unit
from elakit.world.training.loop import Schedule, autocast, train

NEW_CHANNELS = 3.0  # factor on the initial strength of the latent channels that `grow` adds


def build(config: Config) -> Any:
    """Untrained autoencoder with the architecture of a configuration.

    ``AutoencoderTiny`` has no group norm. A group norm would discard the overall color of an image in narrow layers,
    and would make crops differ from whole images.
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


def grow(model: Any, old: Any) -> None:
    """Copy the weights of an autoencoder to a larger one of the same width; new parts have little effect at first.

    New latent channels are appended to the old ones, and the decoder ignores them at first. New residual blocks follow
    the old ones of the same resolution and are the identity at first. The random weights with which the encoder
    computes a new latent channel are multiplied by the factor `NEW_CHANNELS`. The new channel is then about as strong
    as the trained ones; if it were weaker, it would be lost in the noise on the latents.

    Parameters
    ----------
    model, old : AutoencoderTiny
        `model` is the new autoencoder, which is changed in place. It has at least as many blocks at each resolution and
        as many latent channels as `old`.
    """
    for new_half, old_half in ((model.encoder, old.encoder), (model.decoder, old.decoder)):
        for new_run, old_run in zip(_runs(new_half.layers), _runs(old_half.layers), strict=True):
            for i, layer in enumerate(new_run):
                if i < len(old_run):
                    _copy(layer, old_run[i])
                else:
                    nn.init.zeros_(layer.conv[-1].weight)
                    nn.init.zeros_(layer.conv[-1].bias)
    with torch.no_grad():
        for values in model.encoder.layers[-1].parameters():
            values[old.config.latent_channels :] *= NEW_CHANNELS


def _runs(layers: Any) -> list[list[Any]]:
    """Split the layers of an encoder or decoder into lists, each with one layer or with successive residual blocks.

    Each layer that is not a residual block is in a list of its own. Before and after each of these lists there is a
    list of residual blocks, which may be empty. Networks with different numbers of blocks are therefore split into
    equally many lists.
    """
    others = [-1, *(i for i, layer in enumerate(layers) if not hasattr(layer, "conv")), len(layers)]
    runs: list[list[Any]] = []
    for before, after in pairwise(others):
        runs.append(list(layers[before + 1 : after]))
        if after < len(layers):
            runs.append([layers[after]])
    return runs


@torch.no_grad()
def _copy(layer: nn.Module, old: nn.Module) -> None:
    """Copy weights to a layer that may have more inputs, which have no effect, or more outputs, which stay random."""
    for value, source in zip(layer.parameters(), old.parameters(), strict=True):
        if value.ndim > 1 and value.shape[1] > source.shape[1]:
            value.zero_()
        value[tuple(slice(0, n) for n in source.shape)] = source


def train_autoencoder(
    config: Config, scenes: Scenes, folder: Path, device: torch.device, start: Path | None = None
) -> Any:
    """Train the autoencoder on scenes, and save it to ``folder/vae``.

    Its scaling factor gives latents unit variance; with `start`, that of the earlier autoencoder is kept.

    Parameters
    ----------
    config : Config
    scenes : Scenes
    folder : Path
        Folder for checkpoints, sample sheets and the result.
    device : torch.device
    start : Path, optional
        Folder of an earlier autoencoder, from whose weights the training starts (see `grow`).

    Returns
    -------
    AutoencoderTiny
        Trained autoencoder in eval mode.
    """
    settings = config.vae
    torch.manual_seed(0)
    model: Any = build(config)
    old: Any = None
    if start is not None:
        old = AutoencoderTiny.from_pretrained(start).to(device, memory_format=torch.channels_last)
        old.requires_grad_(False)
        grow(model, old)
    model = model.to(device, memory_format=torch.channels_last)
    schedule = Schedule(
        settings.samples, settings.batch, settings.learning_rate, decay_from=settings.decay_from, average=0.998
    )
    judge = _features(settings, device)

    def loss(step: int) -> Tensor:
        images, whole = _batch(config, scenes, np.random.default_rng((1, step)))
        with autocast(device):
            return _loss(model, images.to(device), whole, settings, judge, old)

    def sheet(average: Any, step: int) -> None:
        _sheet(average, config, scenes, folder)

    model = train(model, loss, schedule, folder, "vae", checkpoint_seconds=300, on_checkpoint=sheet)
    with torch.no_grad():
        latents = model.encode(scenes.batch(np.arange(min(256, len(scenes)))).to(device)).latents
    # the denoiser of an earlier edition fits its channels at their own scale
    scaling = float(1 / latents.std()) if old is None else old.config.scaling_factor
    model.register_to_config(scaling_factor=scaling)
    model.save_pretrained(folder / "vae")
    return model


def train_decoder(config: Config, scenes: Scenes, folder: Path, device: torch.device) -> Any:
    """Train the decoder of ``folder/vae`` further with a fixed encoder, for sharper images from the same latents.

    Parameters
    ----------
    config : Config
    scenes : Scenes
    folder : Path
        Folder with the trained autoencoder, ``vae/``, whose decoder is replaced.
    device : torch.device

    Returns
    -------
    AutoencoderTiny
        Trained autoencoder in eval mode.
    """
    settings = config.vae
    model: Any = AutoencoderTiny.from_pretrained(folder / "vae")
    model = model.to(device, memory_format=torch.channels_last).requires_grad_(False)
    model.decoder.requires_grad_(True)
    schedule = Schedule(settings.polish, settings.batch, settings.learning_rate, average=0.998)
    judge = _features(settings, device)

    def loss(step: int) -> Tensor:
        images, whole = _batch(config, scenes, np.random.default_rng((6, step)))
        with autocast(device):
            return _loss(model, images.to(device), whole, settings, judge)

    def sheet(average: Any, step: int) -> None:
        polished = copy.deepcopy(model).eval()
        polished.decoder.load_state_dict(average.state_dict())
        _sheet(polished, config, scenes, folder)

    average = train(model.decoder, loss, schedule, folder, "decoder", checkpoint_seconds=300, on_checkpoint=sheet)
    model.decoder.load_state_dict(average.state_dict())
    model.eval().save_pretrained(folder / "vae")
    return model


def _batch(config: Config, scenes: Scenes, rng: np.random.Generator) -> tuple[Tensor, bool]:
    """Random images, (n, 3, side, side) in [-1, 1]: crops around entities, or whole scenes.

    n is the batch size for crops and a quarter of it for whole scenes. The second value is true for whole scenes.
    """
    whole = bool(rng.random() >= config.vae.crop_share)
    rows = rng.integers(len(scenes), size=max(1, config.vae.batch // 4) if whole else config.vae.batch)
    images = scenes.batch(rows)
    if not whole:
        images = _crops(images, scenes.classes[rows], config.vae.crop, rng)
    return images.contiguous(memory_format=torch.channels_last), whole


def _features(settings: VaeSettings, device: torch.device) -> Segmenter | None:
    """The built-in judge as a fixed feature extractor; None if the loss does not compare features."""
    return copy.deepcopy(load_segmenter()).requires_grad_(False).to(device) if settings.features else None


def _loss(
    model: Any, images: Tensor, exact: bool, settings: VaeSettings, judge: Segmenter | None, old: Any = None
) -> Tensor:
    """Loss of the autoencoder: errors of pixels, edges and features of the reconstruction, and a penalty on latents.

    Edges are differences between neighboring pixels at three scales; the penalty is the mean square of the latents, and
    the decoder bounds them to -3..3. Noise is added to the latents before decoding, so that similar latents decode to
    similar images. Some images are decoded from the first half of the channels alone; these channels learn the shapes,
    and the others the details. In a share of the steps, mirrored latents of half the resolution are decoded and
    compared with the mirrored image of half the size, so that shapes look alike in the latents at any size (EQ-VAE,
    arXiv 2502.09509); such latents are easier to denoise.

    `exact` computes layer by layer, which is slower but also right at the border of the image. `old` is the autoencoder
    from which the training started, if there is one: changes of its latent channels are penalized, so that a denoiser
    that was trained on them can be trained further.
    """
    latents = model.encode(images).latents if exact else linear_runs.encode(model, images)
    drift = torch.zeros((), device=images.device)
    if old is not None and settings.kept:
        with torch.no_grad():
            kept_latents = old.encode(images).latents if exact else linear_runs.encode(old, images)
        drift = F.mse_loss(latents[:, : kept_latents.shape[1]], kept_latents)
    if torch.rand(()) < settings.equivariant:
        latents, images = _transformed(latents, images)
    noisy = latents + settings.noise * torch.randn_like(latents)
    half = noisy.shape[1] // 2
    kept = torch.rand(len(noisy), 1, 1, 1, device=noisy.device) >= settings.nested
    noisy = torch.cat([noisy[:, :half], noisy[:, half:] * kept], 1)
    rebuilt = model.decode(noisy).sample if exact else linear_runs.decode(model, noisy)
    total = F.l1_loss(rebuilt, images) + settings.pull * latents.pow(2).mean() + settings.kept * drift
    a, b = rebuilt, images
    for scale in range(3):
        edges = sum(F.l1_loss(a.diff(dim=axis), b.diff(dim=axis)) for axis in (-1, -2))
        total = total + settings.edges * 0.5**scale * edges
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    if judge is not None:
        for seen, wanted in zip(features(judge, rebuilt), features(judge, images), strict=True):
            total = total + settings.features * F.l1_loss(seen, wanted) / wanted.abs().mean()
    return total


def _transformed(latents: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and images of half the resolution, both mirrored in the same random way."""
    axes = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
    return F.avg_pool2d(latents, 2).flip(axes), F.avg_pool2d(images, 2).flip(axes)


def features(judge: Segmenter, images: Tensor) -> list[Tensor]:
    """Activations of the judge at 1/2, 1/4 and 1/8 of the image's side, each (n, c, h, w)."""
    x = judge.stem(images)
    found = [x]
    for down in judge.down[:2]:
        x = down(x)
        found.append(x)
    return found


def _sheet(model: Any, config: Config, scenes: Scenes, folder: Path) -> None:
    """Save an image of eight scenes and, below them, their reconstructions, enlarged to twice their size."""
    images, size = scenes.batch(np.arange(8)).to(model.device), config.world.size
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images).latents).sample
    pixels = (torch.cat([images, rebuilt]).cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    grid = pixels.reshape(2, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(2 * size, 8 * size, 3)
    sheet = Image.fromarray((grid * 255).round().astype(np.uint8))
    sheet.resize((16 * size, 4 * size), Image.Resampling.NEAREST).save(folder / "vae.png")


def _crops(images: Tensor, classes: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    """Square of `side` pixels from each image, centered on a random pixel of an entity as far as the border allows."""
    cut = []
    for image, truth in zip(images, classes, strict=True):
        rows, columns = np.nonzero(truth)
        i, limit = rng.integers(len(rows)), truth.shape[0] - side
        top, left = (int(np.clip(at[i] - side // 2, 0, limit)) for at in (rows, columns))
        cut.append(image[:, top : top + side, left : left + side])
    return torch.stack(cut)


def psnr(model: Any, scenes: Scenes, count: int = 256) -> float:
    """Mean peak signal-to-noise ratio of reconstructions, in dB, over the first `count` scenes."""
    found = []
    for start in range(0, count, 32):
        images = scenes.batch(np.arange(start, min(start + 32, count))).to(model.device)
        with torch.no_grad():
            rebuilt = model.decode(model.encode(images).latents).sample.clamp(-1, 1)
        error = (to_unit(rebuilt) - to_unit(images)).pow(2).mean((1, 2, 3))
        found.append(-10 * error.log10())
    return float(torch.cat(found).mean())
