"""Settings of a training run, read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from elakit.errors import SettingError, clause
from elakit.resources import data_path
from elakit.world.scenes import World


@dataclass(frozen=True)
class VaeSettings:
    """Settings of the autoencoder: architecture, loss weights and length of training (`samples` images).

    `width` is the number of channels at every resolution; `encoder_blocks` and `decoder_blocks` are the numbers of
    residual blocks at each resolution. The training images are sampled from `scenes` scenes. A share `crop_share` of
    the steps uses `batch` crops with a side of `crop` pixels around an entity, because most of a scene is background.
    The other steps use whole scenes, a quarter as many per step. After the share `decay_from` of the steps, the
    learning rate falls to zero. `noise` is the standard deviation of the noise on the latents, `nested` the share of
    the images that are decoded from the first half of the channels alone, and `equivariant` the share of the steps that
    decode mirrored latents of half the resolution. Weights of the loss are `pull` for the mean square of the latents,
    `edges` for differences between neighboring pixels, `features` for the activations of the built-in judge, and `kept`
    for changes of the latent channels of an earlier model. Afterward the decoder alone is trained on `polish` more
    images.
    """

    width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    latent_channels: int
    scenes: int
    samples: int
    crop: int
    crop_share: float
    batch: int
    learning_rate: float
    decay_from: float
    noise: float
    pull: float
    edges: float
    features: float
    nested: float
    equivariant: float
    kept: float
    polish: int


@dataclass(frozen=True)
class TextSettings:
    """Settings of the text encoder, and of its tokenizer (`positions` and `vocabulary`, as in `train_tokenizer`)."""

    positions: int
    vocabulary: int
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of the U-Net, and of the diffusion training of U-Net and text encoder.

    The training uses `samples` images in batches of `batch` per process. Before it, the model is trained on `close_ups`
    images that have half the side of a scene and show a single thing each; training on them is several times as fast.
    The training begins with `first_scenes` different scenes; whenever each of them has been seen `reuse` times on
    average, `chunk` more are composed, up to `scenes`. The learning rate rises for `warmup` steps, is constant until
    the share `decay_from` of the steps is done, and then falls to zero; `average` is the decay of the moving average of
    the weights. `min_snr` is the upper bound of the signal-to-noise ratio in the weights of the loss (min-SNR).
    `least_weight` is the lower bound of these weights at the timesteps with more noise than signal, at which the model
    decides where the things are. `drop_text` is the share of captions that are replaced by the empty text, and
    `neutral_end` the share of captions whose end-of-text states are replaced by those of the empty text. `outlines` is
    the weight of an auxiliary loss, the prediction of the noun at each location from features of the U-Net's decoder.
    `compiled` runs the U-Net through ``torch.compile``, which needs a C++ compiler on a CPU.
    """

    channels: tuple[int, ...]
    heads: int
    scenes: int
    first_scenes: int
    chunk: int
    reuse: int
    close_ups: int
    samples: int
    batch: int
    learning_rate: float
    warmup: int
    decay_from: float
    average: float
    min_snr: float
    least_weight: float
    drop_text: float
    neutral_end: float
    outlines: float
    compiled: bool

    def __post_init__(self) -> None:
        if not 0 <= self.least_weight <= 0.5:
            raise SettingError(
                f"least_weight is {self.least_weight}; give a number from 0 (no lower bound) to 0.5, the weight where "
                "signal and noise are equal."
            )


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judge, a segmenter of images, and of its training.

    The training uses `samples` images in batches of `batch`. They are sampled from `scenes` composed scenes and some
    generated images. `mixtures`, `occluded`, `spoiled` and `empty` are the shares of the composed scenes that show a
    hybrid, a thing partly behind another, an unrecognizable shape, and only a background. Generated images are less
    exact than composed ones, which does not make them hybrids. So that the judge learns this, a share `rebuilt` of the
    composed scenes is passed through the autoencoder. To another share, `redrawn`, noise is added, which the last steps
    of the denoiser remove; scenes with an unrecognizable shape in this share are not changed. There are two kinds of
    generated images. `drawn` is the number of images of single things. `unfinished` is the number of images in which
    nothing can be recognized, because generation was stopped after the first few steps. `labels` names folders in
    elakit's data with generated images that were labeled by eye. Each batch contains `labeled` of these images in
    addition to its `batch` others.
    """

    channels: tuple[int, ...]
    scenes: int
    mixtures: float
    occluded: float
    spoiled: float
    rebuilt: float
    redrawn: float
    empty: float
    drawn: int
    unfinished: int
    labels: tuple[str, ...]
    labeled: int
    samples: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Config:
    """All settings with which picture-world is trained, as `read_config` reads them."""

    world: World
    vae: VaeSettings
    text: TextSettings
    denoiser: DenoiserSettings
    judge: JudgeSettings


def read_config(path: Path | None = None) -> Config:
    """Read a training configuration.

    Parameters
    ----------
    path : Path, optional
        TOML file; by default the one with which the built-in model was trained.

    Returns
    -------
    Config

    Raises
    ------
    SettingError
        The file is missing or is not TOML, or a setting is missing, unknown or outside its range.

    Examples
    --------
    >>> read_config().world.size
    128
    """
    path = path or data_path("picture-world", "training.toml")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingError(
            f"Cannot read the training configuration {path}: {clause(error)}. Correct the file, or give another."
        ) from error
    sections = {f.name: f.type for f in fields(Config)}
    kinds = {
        "world": World,
        "vae": VaeSettings,
        "text": TextSettings,
        "denoiser": DenoiserSettings,
        "judge": JudgeSettings,
    }
    if set(table) != set(sections):
        raise SettingError(
            f"{path} has the sections {sorted(table)}; it must have exactly {sorted(sections)}. Correct the file."
        )
    return Config(**{name: _section(kinds[name], table[name], name, path) for name in kinds})


def _section(kind: type, values: dict[str, Any], name: str, path: Path) -> Any:
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        return kind(**frozen)
    except TypeError as error:
        allowed = [f.name for f in fields(kind) if not f.name.startswith("_")]
        raise SettingError(
            f"Section [{name}] of {path}: {clause(error)}. Its settings are {', '.join(allowed)}."
        ) from error
