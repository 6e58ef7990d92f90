"""Pipelines to work on: loading them, and one adapter file a family of architectures.

A family is added by one file with a class like `StableDiffusion` and one entry in ``FAMILIES``: see
docs/developing/adding-a-family.md.
"""

from __future__ import annotations

import difflib
import inspect
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from transformers.utils import logging as transformers_logging

from elakit.errors import ModelError, SettingError
from elakit.models.adapter import Adapter, AttentionLayer, Call, Conditioning, OtherKind
from elakit.models.flux import Flux
from elakit.models.pixart import PixArt
from elakit.models.sd3 import StableDiffusion3
from elakit.models.sdxl import StableDiffusionXL
from elakit.models.stable_diffusion import StableDiffusion
from elakit.resources import data_path

__all__ = [
    "EMBEDDED",
    "FAMILIES",
    "Adapter",
    "AttentionLayer",
    "Call",
    "Conditioning",
    "DrawingSettings",
    "EmbeddedModel",
    "Flux",
    "PixArt",
    "StableDiffusion",
    "StableDiffusion3",
    "StableDiffusionXL",
    "adapter_for",
    "default_settings",
    "load",
    "name_of",
]

FAMILIES: tuple[type[Adapter], ...] = (StableDiffusion, StableDiffusionXL, PixArt, StableDiffusion3, Flux)

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class EmbeddedModel:
    """A model that is shipped with elakit and needs no network.

    Attributes
    ----------
    name : str
        What `load` is given.
    folder : str
        Folder below the shipped ``data``.
    summary : str
        One line for ``elakit models``.
    steps : int
        Denoising steps it draws well with.
    guidance_scale : float
        Classifier-free guidance it draws well with.
    """

    name: str
    folder: str
    summary: str
    steps: int
    guidance_scale: float


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in (
        EmbeddedModel(
            "picture-world",
            "picture-world",
            "small Stable Diffusion pipeline trained on composed scenes of 24 nouns and 11 colors",
            steps=25,
            guidance_scale=4.0,
        ),
    )
}


@dataclass(frozen=True)
class DrawingSettings:
    """How an image is drawn when the user does not say.

    Attributes
    ----------
    steps : int
    guidance_scale : float
    """

    steps: int
    guidance_scale: float


def default_settings(pipe: Any) -> DrawingSettings:
    """An embedded model's own settings; for any other pipeline the defaults of its ``__call__``.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """
    if (model := EMBEDDED.get(name_of(pipe))) is not None:
        return DrawingSettings(model.steps, model.guidance_scale)
    parameters = inspect.signature(type(pipe).__call__).parameters
    return DrawingSettings(parameters["num_inference_steps"].default, parameters["guidance_scale"].default)


def name_of(pipe: Any) -> str:
    """What to give `load` to have this pipeline again: an embedded model's name, a hub id or a folder; else its class.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    """
    source = str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)
    embedded = [model.name for model in EMBEDDED.values() if Path(source) == data_path(model.folder)]
    return embedded[0] if embedded else source


def adapter_for(pipe: Any) -> Adapter:
    """The adapter that knows where a pipeline attends to its text.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline

    Raises
    ------
    ModelError
        When no supported family fits; the message names the families and what is missing.

    Examples
    --------
    >>> adapter_for("a string")
    Traceback (most recent call last):
    ...
    elakit.errors.ModelError: str is not supported: it has no UNet; it has no transformer. Supported: Stable...
    """
    reasons = []
    for family in FAMILIES:
        reason = family.refusal(pipe)
        if reason is None:
            return family(pipe)
        reasons.append(reason)
    raise _unsupported(type(pipe).__name__, reasons)


def load(name: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None) -> Any:
    """Load a text-to-image pipeline; safetensors only, and no code that comes with a model is ever run.

    Parameters
    ----------
    name : str or pathlib.Path
        An embedded model (``"picture-world"``, no network), a folder that ``save_pretrained`` wrote, or a hub id
        ``"organization/model"``.
    device : str or torch.device, optional
        Default: CUDA where there is one, else the CPU.
    dtype : {"float32", "float16", "bfloat16"} or torch.dtype, optional
        Default: float32 on the CPU and for embedded models, float16 for others on CUDA.

    Returns
    -------
    diffusers.DiffusionPipeline
        Of a supported family, on ``device``.

    Raises
    ------
    ModelError
        When the model is unknown, cannot be had, would run code, or is of an unsupported family.
    SettingError
        When the device or dtype does not exist.

    Examples
    --------
    >>> load("image-wold")
    Traceback (most recent call last):
    ...
    elakit.errors.ModelError: Unknown model 'image-wold'. Did you mean 'picture-world'? ...
    """
    device = device_named(device)
    source = _source(name)
    if dtype is None:
        plain = device.type == "cpu" or str(name) in EMBEDDED
        dtype = torch.float32 if plain else torch.float16
    elif isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise SettingError(f"dtype is {dtype!r}; allowed are {', '.join(_DTYPES)}.")
        dtype = _DTYPES[dtype]
    _check_index(str(name), _read_index(source))
    try:
        with _no_remarks(embedded=str(name) in EMBEDDED):
            pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError) as error:
        # What a damaged or incomplete model raises varies; the cause stays attached.
        raise ModelError(
            f"Model {str(name)!r} could not be loaded: {first_line(error)} "
            "elakit loads safetensors weights only; convert others with `pipe.save_pretrained(folder)`."
        ) from error
    adapter_for(pipe)
    return pipe.to(device)


@contextmanager
def _no_remarks(embedded: bool) -> Iterator[None]:
    """Keep libraries from remarking, at every load, on what is as it should be.

    transformers does on image processors that nobody uses here and that want torchvision; diffusers on embedded models,
    whose autoencoder is an ``AutoencoderTiny``.
    """
    loggers = [transformers_logging, *([diffusers_logging] if embedded else [])]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)


def device_named(device: str | torch.device | None) -> torch.device:
    """The device of a name, by default CUDA where there is one; `SettingError` for one that is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise SettingError(f"device is {device!r}; give 'cpu', 'cuda' or 'cuda:1', for example.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise SettingError(f"device is {str(chosen)!r}, but this machine has no usable CUDA device; use 'cpu'.")
    return chosen


def _source(name: str | Path) -> str:
    """A folder or a hub id; refuses at once, without asking the network, what can be neither."""
    text = str(name)
    if text in EMBEDDED:
        folder = data_path(EMBEDDED[text].folder)
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"The embedded model {text!r} is missing from this installation; install elakit again from a whole "
                "checkout (its weights lie in the repository's data folder)."
            )
        return str(folder)
    path = Path(text).expanduser()
    expected = (
        f"Expected an embedded model ({', '.join(EMBEDDED)}), a folder that `pipe.save_pretrained` wrote, or a hub id "
        "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
    )
    if text and path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"Folder {text!r} holds no pipeline (no model_index.json in it). {expected}")
        return str(path)
    if text and path.exists():
        raise ModelError(f"Model {text!r} is a single file. {expected}")
    if isinstance(name, str) and HUB_ID.fullmatch(text):
        return text
    close = difflib.get_close_matches(text.lower(), EMBEDDED, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ModelError(f"Unknown model {text!r}.{hint} {expected}")


def _read_index(source: str) -> dict[str, Any]:
    """The pipeline's ``model_index.json``: small, so a wrong model is refused before its weights are fetched."""
    path = Path(source) / "model_index.json"
    if not path.is_file():
        path = Path(_download_index(source))
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"The model_index.json of {source!r} cannot be read: {first_line(error)}") from error
    if not isinstance(index, dict):
        raise ModelError(f"The model_index.json of {source!r} is not a table of components.")
    return index


def _download_index(hub_id: str) -> str:
    try:
        return hf_hub_download(hub_id, "model_index.json")
    except GatedRepoError as error:
        why = "its license must be accepted on its page first, and you must be logged in (`hf auth login`)."
        cause: Exception = error
    except RepositoryNotFoundError as error:
        why = "no such model is on the hub (or it is private), and no folder of that name is here."
        cause = error
    except LocalEntryNotFoundError as error:
        why = "the hub cannot be reached and the model is not in the local cache, and no folder of that name is here."
        cause = error
    except EntryNotFoundError as error:
        why = "it is not a diffusers pipeline (no model_index.json)."
        cause = error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = first_line(error)
        cause = error
    raise ModelError(
        f"Model {hub_id!r} cannot be had: {why} Give an embedded model ({', '.join(EMBEDDED)}: no network needed), "
        "a folder or another hub id."
    ) from cause


def _check_index(name: str, index: dict[str, Any]) -> None:
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ModelError(f"Model {name!r} brings a pipeline class of its own; elakit runs no code from models.")
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and len(value) == 2 else None
        known = library in (None, "diffusers", "transformers") or hasattr(diffusers.pipelines, str(library))
        if not known:
            raise ModelError(
                f"Model {name!r} takes its {part} from {library!r}; elakit runs no code from models and knows only "
                "diffusers and transformers."
            )
    reasons = [family.refusal_of_index(index) for family in FAMILIES]
    if None not in reasons:
        raise _unsupported(f"Model {name!r} ({kind})", [reason for reason in reasons if reason is not None])


def _unsupported(what: str, reasons: Sequence[str]) -> ModelError:
    """An error with the reasons of the families that come near, or of all when none does."""
    near = [reason for reason in reasons if not isinstance(reason, OtherKind)]
    families = "; ".join(family.family for family in FAMILIES)
    return ModelError(
        f"{what} is not supported: {'; '.join(dict.fromkeys(near or reasons))}. Supported: {families}. Load one of "
        f"these, or add its family, one file: docs/developing/adding-a-family.md in the repository tells how."
    )


def first_line(error: BaseException) -> str:
    """An error's first line as a sentence; a library's further lines are advice on its own API."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
