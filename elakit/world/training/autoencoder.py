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

    The class is ``AutoencoderTiny``, which has no group norm. In narrow layers, a group norm would discard the overall
    color of an image. A group norm would also encode a crop differently from the same part of the whole image.
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
    """Copy the weights of a trained autoencoder to a larger autoencoder of the same width.

    New latent channels follow the old channels, and the decoder ignores the new channels at first. New residual blocks
    follow the old blocks of the same resolution. At first, a new residual block is the identity.

    The encoder computes new latent channels with random weights, which are multiplied by the factor `NEW_CHANNELS`. The
    new channels are then about as strong as the old channels. Weaker channels would be lost in the noise on the
    latents.

    Parameters
    ----------
    model : AutoencoderTiny
        Larger autoencoder, which is changed in place. It has at least as many latent channels as `old`, and at least as
        many residual blocks at each resolution.
    old : AutoencoderTiny
        Trained autoencoder.
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
    """Split the layers of an encoder or decoder into lists of layers.

    The lists alternate: residual blocks, one other layer, residual blocks, one other layer, and so on, up to a last
    list of residual blocks. A list of residual blocks may be empty. Networks with different numbers of residual blocks
    are therefore split into equally many lists.
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
    """Copy the weights of the layer `old` to a layer that may have more inputs or more outputs.

    The weights of additional inputs are set to zero. The weights of additional outputs stay random.
    """
    for value, source in zip(layer.parameters(), old.parameters(), strict=True):
        if value.ndim > 1 and value.shape[1] > source.shape[1]:
            value.zero_()
        value[tuple(slice(0, n) for n in source.shape)] = source


def train_autoencoder(
    config: Config, scenes: Scenes, folder: Path, device: torch.device, start: Path | None = None
) -> Any:
    """Train the autoencoder on scenes, and save it to ``folder/vae``.

    The scaling factor of the autoencoder gives latents unit variance. If `start` is given, the scaling factor of the
    earlier autoencoder is kept instead.

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
    """Train the decoder of the autoencoder in ``folder/vae`` further, with a frozen encoder.

    After this training, the same latents give sharper images.

    Parameters
    ----------
    config : Config
    scenes : Scenes
    folder : Path
        Folder that contains the trained autoencoder in ``vae/``. The decoder of this autoencoder is replaced.
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
    """Random batch of training images, and True if the images are whole scenes.

    The images are either crops around entities or whole scenes: (n, 3, side, side) in [-1, 1]. For crops, n is the
    batch size. For whole scenes, n is a quarter of the batch size.
    """
    whole = bool(rng.random() >= config.vae.crop_share)
    rows = rng.integers(len(scenes), size=max(1, config.vae.batch // 4) if whole else config.vae.batch)
    images = scenes.batch(rows)
    if not whole:
        images = _crops(images, scenes.classes[rows], config.vae.crop, rng)
    return images.contiguous(memory_format=torch.channels_last), whole


def _features(settings: VaeSettings, device: torch.device) -> Segmenter | None:
    """Built-in judge as a frozen feature extractor; None if the weight `settings.features` is 0."""
    return copy.deepcopy(load_segmenter()).requires_grad_(False).to(device) if settings.features else None


def _loss(
    model: Any, images: Tensor, exact: bool, settings: VaeSettings, judge: Segmenter | None, old: Any = None
) -> Tensor:
    """Loss of the autoencoder for a batch of images: error of the reconstruction, and penalty on the latents.

    The error compares pixels and edges, and activations of `judge` if the judge is given. Edges are differences between
    neighboring pixels, at three scales. The penalty is the mean square of the latents. The decoder bounds the latents
    to [-3, 3].

    Noise is added to the latents before decoding, so that similar latents decode to similar images. Some images are
    decoded from the first half of the latent channels alone. The first half of the channels therefore learns the
    shapes, and the second half learns the details.

    In a share of the steps, the latents are reduced to half the resolution and mirrored. The decoded image is then
    compared with the original image, which is halved and mirrored in the same way. This training makes a shape look
    alike in the latents at any size, and such latents are easier to denoise (EQ-VAE, arXiv 2502.09509).

    If `exact` is True, the layers are computed one by one. This is slower, but also exact at the border of the image.
    `old` is the autoencoder from which the training started, or None. Changes of the latent channels of `old` are
    penalized. A denoiser that was trained on the old channels can then be trained further.
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
    """Activations of the judge at 1/2, 1/4 and 1/8 of the resolution of the images: three tensors, (n, c, h, w)."""
    x = judge.stem(images)
    found = [x]
    for down in judge.down[:2]:
        x = down(x)
        found.append(x)
    return found


def _sheet(model: Any, config: Config, scenes: Scenes, folder: Path) -> None:
    """Save a sheet with eight scenes and their reconstructions to ``folder/vae.png``.

    The upper row shows the scenes, and the lower row shows the reconstructions. All images are enlarged to twice their
    size.
    """
    images, size = scenes.batch(np.arange(8)).to(model.device), config.world.size
    with torch.no_grad():
        rebuilt = model.decode(model.encode(images).latents).sample
    pixels = (torch.cat([images, rebuilt]).cpu() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    grid = pixels.reshape(2, 8, size, size, 3).transpose(0, 2, 1, 3, 4).reshape(2 * size, 8 * size, 3)
    sheet = Image.fromarray((grid * 255).round().astype(np.uint8))
    sheet.resize((16 * size, 4 * size), Image.Resampling.NEAREST).save(folder / "vae.png")


def _crops(images: Tensor, classes: np.ndarray, side: int, rng: np.random.Generator) -> Tensor:
    """Crop a square with a side of `side` pixels from each image, around a random pixel of an entity.

    The random pixel is the center of the square. If the square would cross the border of the image, the square is moved
    inside. `classes` is the class of each pixel, (n, size, size), with 0 for the background.
    """
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
