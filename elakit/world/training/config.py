"""Settings of a training run, read from a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from elakit.errors import SettingError, clause
from elakit.numbering import plural
from elakit.resources import data_path
from elakit.world.scenes import World


@dataclass(frozen=True)
class VaeSettings:
    """Settings of the autoencoder: architecture, loss and training.

    Attributes
    ----------
    width : int
        Number of channels at every resolution.
    encoder_blocks, decoder_blocks : tuple of int
        Number of residual blocks at each resolution, in the order of the layers.
    latent_channels : int
        Number of channels of the latents.
    scenes : int
        Number of different scenes from which the training images are sampled.
    samples : int
        Length of the training: ``samples / batch`` steps.
    crop : int
        Side of a crop in pixels.
    crop_share : float
        Share of the steps that use crops around an entity, because most of a scene is background. The other steps use
        whole scenes.
    batch : int
        Number of crops per step. In a step with whole scenes, the number of scenes is a quarter of `batch`.
    learning_rate : float
        Learning rate after a warm-up of 200 steps.
    decay_from : float
        Share of the training after which the learning rate begins to fall to zero.
    noise : float
        Standard deviation of the noise that is added to the latents before decoding.
    pull : float
        Weight of the mean square of the latents in the loss.
    edges : float
        Weight of the errors of edges in the loss. Edges are differences between neighboring pixels.
    features : float
        Weight of the errors of the built-in judge's activations in the loss.
    nested : float
        Share of the images that are decoded from the first half of the latent channels alone.
    equivariant : float
        Share of the steps in which the latents are mirrored and reduced to half the resolution before decoding.
    kept : float
        Weight of the penalty on changes of the latent channels of an earlier autoencoder. Without an earlier
        autoencoder, this weight has no effect.
    polish : int
        Length of the further training of the decoder alone: ``polish / batch`` steps.
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
    """Settings of the text encoder and its tokenizer.

    Attributes
    ----------
    positions : int
        Largest number of tokens of an encoded prompt, including start-of-text and end-of-text.
    vocabulary : int
        Largest number of tokens in the vocabulary.
    width : int
        Number of channels of a text state.
    layers : int
        Number of transformer layers.
    heads : int
        Number of attention heads per layer.
    """

    positions: int
    vocabulary: int
    width: int
    layers: int
    heads: int


@dataclass(frozen=True)
class DenoiserSettings:
    """Settings of the U-Net, and of the training of the U-Net together with the text encoder.

    The training has two parts. The first part uses close-ups, which are images with half the side of a scene. Each
    close-up shows a single thing. The second part uses scenes, and takes several times as long per image.

    Attributes
    ----------
    channels : tuple of int
        Number of channels at each resolution of the U-Net, from the highest to the lowest resolution.
    heads : int
        Number of attention heads.
    scenes : int
        Largest number of different scenes.
    first_scenes : int
        Number of different scenes at the beginning.
    chunk : int
        Number of scenes that are composed at a time.
    reuse : int
        Average number of times that a scene is seen before the next chunk of scenes is composed.
    close_ups : int
        Number of training images in the first part. If `close_ups` is 0, the first part is skipped.
    samples : int
        Number of training images in the second part, summed over all processes.
    batch : int
        Number of scenes per step and process. For close-ups, the number of images is twice as large.
    learning_rate : float
        Learning rate after the warm-up.
    warmup : int
        Number of steps in which the learning rate rises from zero.
    decay_from : float
        Share of the second part after which the learning rate begins to fall to zero.
    average : float
        Decay of the exponential moving average of the weights.
    min_snr : float
        Upper bound of the signal-to-noise ratio in the weights of the loss (min-SNR).
    least_weight : float
        Lower bound of the weights of the loss at timesteps with more noise than signal, from 0 to 0.5. At these
        timesteps, the model decides where the things are.
    drop_text : float
        Share of the captions that are replaced by the empty prompt.
    neutral_end : float
        Share of the captions in which end-of-text and padding get the text states of the empty prompt.
    outlines : float
        Weight of an auxiliary loss: the noun at each location is predicted from features of the U-Net's decoder.
    compiled : bool
        True to run the U-Net through ``torch.compile``, which needs a C++ compiler on a CPU.
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
                f"least_weight is {self.least_weight}; give a number from 0 to 0.5. With 0, the loss weights have no "
                "lower bound. 0.5 is the weight of a timestep with equal signal and noise."
            )


@dataclass(frozen=True)
class JudgeSettings:
    """Settings of the judge, a segmenter of images, and of its training.

    The judge is trained on composed scenes and on generated images. Things in generated images are less exact than in
    composed scenes, and the judge must not take inexact things for hybrids. Some composed scenes are therefore passed
    through the autoencoder or the denoiser.

    Attributes
    ----------
    channels : tuple of int
        Number of channels at each resolution of the judge, from the highest to the lowest resolution.
    scenes : int
        Number of composed scenes.
    mixtures : float
        Share of the composed scenes that show a hybrid.
    occluded : float
        Share of the composed scenes that show a thing partly behind another thing.
    spoiled : float
        Share of the composed scenes that show an unrecognizable shape.
    rebuilt : float
        Share of the composed scenes that are passed through the autoencoder.
    redrawn : float
        Share of the composed scenes that are passed through the denoiser: noise is added, and the last denoising steps
        remove the noise. Scenes with an unrecognizable shape stay unchanged.
    empty : float
        Share of the composed scenes that show only a background.
    drawn : int
        Number of generated images of single things.
    unfinished : int
        Number of generated images in which nothing can be recognized, because generation was stopped after the first
        few steps.
    labels : tuple of str
        Folders in elakit's data with generated images that were labeled by eye.
    labeled : int
        Number of labeled images per step, in addition to `batch`.
    samples : int
        Number of training images, not counting the labeled images.
    batch : int
        Number of images per step, not counting the labeled images.
    learning_rate : float
        Learning rate after a warm-up of 200 steps.
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
    """All settings with which picture-world is trained, with one attribute per section of the TOML file."""

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
        TOML file of settings. The default is the file with which the built-in model was trained.

    Returns
    -------
    Config

    Raises
    ------
    SettingError
        The file is missing or is not TOML, or a setting is missing, unknown or outside its range.

    Examples
    --------
    The training scenes of the built-in model have a side of 128 pixels:

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


# Types that a setting may have in the file, by its annotation, and their names in error messages.
_KINDS: dict[str, tuple[Any, str]] = {
    "int": (int, "a whole number"),
    "float": ((int, float), "a number"),
    "bool": (bool, "true or false"),
    "str": (str, "text in quotation marks"),
}


def _section(kind: type, values: dict[str, Any], name: str, path: Path) -> Any:
    settings = {f.name: f for f in fields(kind) if f.init}
    needed = [key for key, f in settings.items() if f.default is MISSING and f.default_factory is MISSING]
    unknown, missing = sorted(set(values) - set(settings)), [key for key in needed if key not in values]
    if unknown or missing:
        wrong = [f"unknown {plural('setting', len(unknown))} {', '.join(unknown)}"] if unknown else []
        wrong += [f"missing {plural('setting', len(missing))} {', '.join(missing)}"] if missing else []
        known = f" The settings of this section are {', '.join(settings)}." if unknown else " Add what is missing."
        raise SettingError(f"Section [{name}] of {path}: {'; '.join(wrong)}.{known}")
    for key, value in values.items():
        allowed, what = _KINDS.get(str(settings[key].type), (object, ""))
        if not isinstance(value, allowed) or (isinstance(value, bool) and allowed is not bool and what):
            raise SettingError(f"Section [{name}] of {path}: {key} is {value!r}; give {what}.")
    try:
        return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    except SettingError as error:
        raise SettingError(f"Section [{name}] of {path}: {error}") from error
    except TypeError as error:  # such as text in a list of numbers
        raise SettingError(f"Section [{name}] of {path}: {clause(error)}. Correct the file.") from error
