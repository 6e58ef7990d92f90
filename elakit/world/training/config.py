"""The settings of a training run, read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from elakit.errors import SettingError
from elakit.resources import data_path
from elakit.world.scenes import World


@dataclass(frozen=True)
class VaeSettings:
    """The autoencoder: architecture, loss weights and length of training (`samples` images).

    A share of the steps, `crop_share`, takes squares of `crop` pixels around an entity: most of a scene is background,
    and crops teach more per second. The others take whole scenes, a quarter as many per step. The learning rate falls
    to zero from `decay_from` of the run on. `noise` is added to the latents, `pull` is the weight of their mean square,
    `edges` that of the loss on differences between neighboring pixels, `features` that of the loss on the shipped
    judge's activations, and `nested` the share of images decoded from the first half of the channels alone. `kept` is
    the weight of the loss that keeps the latent channels of an earlier edition as they were. Afterward the decoder
    alone learns from `polish` more samples.
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
    kept: float
    polish: int


@dataclass(frozen=True)
class TextSettings:
    """The tokenizer and the text encoder."""

    positions: int
    vocabulary: int
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class DenoiserSettings:
    """The UNet and the diffusion training of UNet and text encoder.

    The training begins with `first_scenes` scenes and ends with `scenes`; `chunk` of them are composed at a time,
    when each has been seen `reuse` times on average. The learning rate is constant after `warmup` steps and falls to
    zero from `decay_from` of the run on; `average` is the decay of the moving average of the weights. `outlines` is the
    weight of an auxiliary loss: the noun at each location, read from the decoder's features. `compiled` runs the UNet
    through ``torch.compile``, which needs a C++ compiler on a CPU.
    """

    channels: tuple[int, ...]
    heads: int
    scenes: int
    first_scenes: int
    chunk: int
    reuse: int
    samples: int
    batch: int
    learning_rate: float
    warmup: int
    decay_from: float
    average: float
    min_snr: float
    drop_text: float
    neutral_end: float
    outlines: float
    compiled: bool


@dataclass(frozen=True)
class JudgeSettings:
    """The segmenter that says what is in an image.

    Of the `scenes`, a share shows hybrids (`mixtures`), one a thing partly behind another (`occluded`), one shapes that
    cannot be recognized (`spoiled`) and one nothing at all (`empty`); a share of all is seen through the autoencoder
    (`rebuilt`), as generated images are, and one redrawn by the denoiser from some noise (`redrawn`): its images are a
    little askew without being hybrids. Further examples are generated: `drawn` whole images of single things, and
    `unfinished` ones decoded after the first few steps, which are unrecognizable.
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
    samples: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Config:
    """All settings of a training run."""

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
        A TOML file; by default the one that the shipped model was trained with.

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
        raise SettingError(f"Cannot read the training configuration {path}: {error}.") from error
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
        raise SettingError(f"Section [{name}] of {path}: {error}. Its settings are {', '.join(allowed)}.") from error
