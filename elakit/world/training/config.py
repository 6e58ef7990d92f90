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

    A share `crop_share` of the steps uses crops of `crop` pixels around an entity, because most of a scene is
    background. The other steps use whole scenes, a quarter as many per step. The learning rate falls to zero from the
    share `decay_from` of the run on. `noise` is the standard deviation of noise on the latents, and `nested` the share
    of images that are decoded from the first half of the channels alone. A share `equivariant` of the steps decodes
    mirrored latents of half the resolution. Weights of the loss are `pull` for the mean square of the latents, `edges`
    for differences between neighboring pixels, `features` for the activations of the built-in judge, and `kept` for
    changes of the latent channels of an earlier model. Afterward the decoder alone is trained on `polish` more samples.
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
    """Settings of the tokenizer and the text encoder."""

    positions: int
    vocabulary: int
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of the U-Net, and of the diffusion training of U-Net and text encoder.

    The training begins with `first_scenes` scenes and ends with `scenes`. `chunk` more are composed whenever each scene
    has been seen `reuse` times on average. The first `close_ups` samples are single things in images of half the side,
    which are several times as fast as whole scenes. The learning rate is constant after `warmup` steps and falls to
    zero from the share `decay_from` of the run on; `average` is the decay of the moving average of the weights.
    `min_snr` bounds the signal-to-noise ratio in the weights of the loss (min-SNR), and `least_weight` is the lowest of
    these weights, for the steps with much noise, which decide what is where. `drop_text` is the share of captions that
    are replaced by the empty text, and `neutral_end` the share whose end-of-text states are replaced by
    those of the empty text. `outlines` is the weight of an auxiliary loss, the prediction of the noun at each location
    from features of the decoder. `compiled` runs the U-Net through ``torch.compile``, which needs a C++ compiler on a
    CPU.
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
    """Settings of the judge, a segmenter of images.

    Shares of the `scenes` show hybrids (`mixtures`), a thing partly behind another (`occluded`), shapes that cannot be
    recognized (`spoiled`), or nothing (`empty`). A share of all scenes is passed through the autoencoder (`rebuilt`),
    and another share through noise and the last steps of the denoiser (`redrawn`), because generated images are less
    exact than composed ones without being hybrids. Further examples are generated: `drawn` images of single things, and
    `unfinished` images that are decoded after the first few steps and are unrecognizable. `labels` names folders in
    the shipped data with generated images that were labeled by eye. Each batch has `labeled` of these images in
    addition to its scenes.
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
        The file is missing or is not TOML, or a setting is missing or unknown.

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
        raise SettingError(f"{path} has the sections {sorted(table)}; it must have exactly {sorted(sections)}.")
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
