"""Loading of pipelines, from safetensors files only.

Code that comes with a model is never run. Missing weights are an error.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from elakit.errors import ModelError, SettingError
from elakit.models.device import device_named
from elakit.models.dispatch import adapter_for, refuse_index
from elakit.models.embedded import EMBEDDED
from elakit.models.library import import_diffusers
from elakit.models.source import first_line, locate, read_index, unavailable
from elakit.numbering import number_of, plural
from elakit.pipeline import Pipeline

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Buffers that old releases saved and that are computed when a model is built.
_COMPUTED = ("position_ids", "inv_freq", "rotary_emb.inv_freq")
# What a damaged or incomplete model raises in the libraries varies.
_LOADING_ERRORS = (ImportError, OSError, ValueError, RuntimeError, AttributeError, KeyError, TypeError)


def load(
    name: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    variant: str | None = None,
    scheduler: str | None = None,
    lora: str | Path | None = None,
) -> Pipeline:
    """Load a text-to-image pipeline from safetensors files; code that comes with a model is never run.

    Parameters
    ----------
    name : str or pathlib.Path
        Name of a built-in model, such as ``"picture-world"``, which needs no network. Otherwise a folder that
        ``save_pretrained`` wrote, or a hub id ``"organization/model"``.
    device : str or torch.device, optional
        Device of the pipeline. Default: CUDA where it is available, otherwise the CPU.
    dtype : {"float32", "float16", "bfloat16"} or torch.dtype, optional
        Precision of the weights. Default: float32 on the CPU and for built-in models, otherwise float16.
    variant : str, optional
        Variant of the weight files, such as ``"fp16"`` for files named ``model.fp16.safetensors``. Default: files
        without a variant.
    scheduler : str, optional
        Name of a scheduler class of diffusers, such as ``"DDIMScheduler"``. A scheduler of this class replaces the
        model's own scheduler, with the same configuration. Default: the model's own scheduler.
    lora : str or pathlib.Path, optional
        LoRA weights in safetensors: a file, a folder or a hub id. Default: none.

    Returns
    -------
    diffusers.DiffusionPipeline
        A pipeline of a supported family, on ``device``.

    Raises
    ------
    ModelError
        Raised when the model is unknown, cannot be downloaded, contains code, or is of an unsupported family. Also
        raised when weights are missing or do not fit the model's architecture, and when the LoRA weights cannot be
        loaded.
    SettingError
        Raised when ``device``, ``dtype`` or ``variant`` is not a valid name, or when this machine has no such device.
        Also raised when the model cannot use the scheduler.

    Examples
    --------
    The error for an unknown name suggests the built-in model with a similar name:

    >>> load("image-wold")
    Traceback (most recent call last):
    ...
    elakit.errors.ModelError: Unknown model 'image-wold'. Did you mean 'picture-world'? ...
    """
    device = device_named(device)
    if variant is not None and (not isinstance(variant, str) or not variant.replace("_", "").isalnum()):
        raise SettingError(
            f"variant={variant!r}: give None, or letters, digits and underscores only. The variant is a part of the "
            "names of the weight files, such as 'fp16' in model.fp16.safetensors."
        )
    source = locate(name)
    embedded = str(name) in EMBEDDED
    if dtype is None:
        dtype = torch.float32 if embedded or device.type == "cpu" else torch.float16
    elif isinstance(dtype, str):
        if dtype not in _DTYPES:
            raise SettingError(f"dtype={dtype!r}: choose from {', '.join(_DTYPES)}.")
        dtype = _DTYPES[dtype]
    elif not isinstance(dtype, torch.dtype):
        raise SettingError(f"dtype={dtype!r}: choose from {', '.join(_DTYPES)}.")
    index = read_index(source)
    _check_index(str(name), index)
    kind = None if scheduler is None else _scheduler_class(index, scheduler)
    with _quiet(embedded=embedded):
        folder = _downloaded(source, variant)
        _check_weight_files(str(name), folder)
        pipe = _built(str(name), folder, index, dtype, variant)
    if kind is not None:
        pipe.scheduler = kind.from_config(pipe.scheduler.config)
    if lora is not None:
        _load_lora(pipe, str(lora))
    pipe.register_to_config(_name_or_path=source, _variant=variant, _lora=None if lora is None else str(lora))
    adapter_for(pipe)
    loaded: Pipeline = pipe.to(device)
    return loaded


def check_scheduler(name: str | Path, scheduler: str) -> None:
    """Check that a model can use a scheduler, without loading the model's weights.

    Parameters
    ----------
    name : str or pathlib.Path
        A built-in model, a folder or a hub id, as in `load`.
    scheduler : str
        Name of a scheduler class of diffusers.

    Raises
    ------
    SettingError
        Raised when the model cannot use the scheduler. The message lists the schedulers that the model can use.
    ModelError
        Raised when the model is unknown, or when its ``model_index.json`` cannot be read.

    Examples
    --------
    The first scheduler can be used; the second is misspelled:

    >>> check_scheduler("picture-world", "DDIMScheduler")
    >>> check_scheduler("picture-world", "Eular")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: scheduler='Eular': choose from DDIMScheduler, ...
    """
    _scheduler_class(read_index(locate(name)), scheduler)


def _scheduler_class(index: Mapping[str, Any], scheduler: str) -> Any:
    """Scheduler class of diffusers with the name ``scheduler``.

    ``index`` is the content of a model's ``model_index.json``. Raise a `SettingError` if a scheduler of this class
    cannot replace the model's own scheduler.
    """
    own = getattr(import_diffusers(), str((index.get("scheduler") or [None, None])[1]), None)
    kinds = {} if own is None else {kind.__name__: kind for kind in (own, *own._get_compatibles())}
    if not kinds:
        raise SettingError(
            f"scheduler={scheduler!r}: only a scheduler from diffusers can be replaced, and this model has none. "
            "Leave scheduler out."
        )
    if scheduler not in kinds:
        raise SettingError(f"scheduler={scheduler!r}: choose from {', '.join(sorted(kinds))}.")
    return kinds[scheduler]


def _load_lora(pipe: Pipeline, lora: str) -> None:
    if not hasattr(pipe, "load_lora_weights"):
        raise ModelError(f"lora={lora!r}: {type(pipe).__name__} takes no LoRA weights. Leave lora out.")
    try:
        pipe.load_lora_weights(lora, use_safetensors=True)
    except Exception as error:  # peft, diffusers, safetensors and the hub client raise a dozen kinds
        files = "Give a safetensors file, a folder or a hub id with LoRA weights for this model."
        step = "Install peft: `pip install 'elakit[lora]'`." if "peft" in str(error).lower() else files
        raise ModelError(f"The LoRA weights {lora!r} cannot be loaded: {first_line(error)} {step}") from error


def _check_index(name: str, index: dict[str, Any]) -> None:
    kind = index.get("_class_name")
    if not isinstance(kind, str):
        raise ModelError(
            f"The model_index.json of {name!r} has the entry _class_name={kind!r}; it must be the name of a diffusers "
            "pipeline. elakit runs no code from models. Give another model."
        )
    for part, value in index.items():
        library = value[0] if isinstance(value, list) and len(value) == 2 else None
        if library not in (None, "diffusers", "transformers") and not hasattr(
            import_diffusers().pipelines, str(library)
        ):
            raise ModelError(
                f"Model {name!r} takes its {part} from the library {library!r}, but elakit loads only components of "
                "diffusers and transformers. Give another model."
            )
    refuse_index(f"Model {name!r} ({kind})", index)


def _downloaded(source: str, variant: str | None) -> Path:
    """Folder with the files of a pipeline.

    If ``source`` is a hub id, the files are downloaded. The weights are downloaded as safetensors files only, in the
    given ``variant``. If ``source`` is a folder, this folder is returned.
    """
    if Path(source).is_dir():
        return Path(source)
    try:
        return Path(import_diffusers().DiffusionPipeline.download(source, use_safetensors=True, variant=variant))
    except _LOADING_ERRORS as error:
        raise unavailable(source, first_line(error)) from error


def _check_weight_files(name: str, folder: Path) -> None:
    """Raise a `ModelError` if an index of sharded weights names a wrong file.

    A file is wrong if it is not a safetensors file, or not in the same folder as the index. ``folder`` is the folder of
    the pipeline, which contains the folders of its components. ``name`` names the model in the message.
    """
    for path in sorted(folder.glob("*/*.safetensors.index*.json")):
        try:
            files = set(json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(
                f"{path} of model {name!r} cannot be read: {first_line(error)} Download the model again."
            ) from error
        wrong = sorted(file for file in files if Path(file).name != file or not file.endswith(".safetensors"))
        if wrong:
            raise ModelError(
                f"{path.name} in {path.parent.name} of model {name!r} names the file {wrong[0]!r}, but elakit loads "
                "only safetensors files from the same folder. Convert the weights with `pipe.save_pretrained(folder)`."
            )


def _built(name: str, folder: Path, index: Mapping[str, Any], dtype: torch.dtype, variant: str | None) -> Any:
    """Build a pipeline from the components in its folder.

    Raise a `ModelError` if a component cannot be loaded, or if its weights are missing or do not fit its architecture.
    ``index`` is the content of the pipeline's ``model_index.json``. ``name`` names the model in the message.
    """
    diffusers = import_diffusers()
    parts: dict[str, Any] = {}
    tokenizers: dict[str, Any] = {}
    try:
        for part, value in index.items():
            kind = _component_class(value)
            if kind is not None and (folder / part).is_dir():
                parts[part] = _component(name, part, kind, folder, dtype, variant)
            elif (fast := _fast_tokenizer(value, folder / part)) is not None:
                tokenizers[part] = fast
        parts |= dict.fromkeys(tokenizers)  # which the pipeline would not take in place of the class in the index
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            str(folder), use_safetensors=True, variant=variant, **_typed(diffusers.DiffusionPipeline, dtype), **parts
        )
        pipe.register_modules(**tokenizers)
        if "tokenizer" in tokenizers and hasattr(pipe, "tokenizer_max_length"):
            pipe.tokenizer_max_length = pipe.tokenizer.model_max_length
        return pipe
    except _LOADING_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(
            f"Model {name!r} could not be loaded: {first_line(error)} {_variants(folder, variant)}"
            "elakit loads safetensors weights only; convert other weights with `pipe.save_pretrained(folder)`."
        ) from error


def _component_class(value: Any) -> Any:
    """Class of a component with weights, found from the component's entry in ``model_index.json``.

    ``value`` is the entry. For a component without weights, and for any other entry, the result is None.
    """
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(one, str) for one in value)):
        return None
    library, kind_name = value
    module = _library(library)
    kind = getattr(module, kind_name, None)
    # A dummy object stands for a class whose requirements are not installed.
    return kind if inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "from_pretrained") else None


def _fast_tokenizer(value: Any, folder: Path) -> Any:
    """Load a tokenizer from a folder whose only tokenizer file is ``tokenizer.json``.

    With transformers 5 or later, or with another tokenizer file in the folder, the result is None: the pipeline can
    then load the tokenizer itself. Earlier releases of transformers can read ``tokenizer.json`` only with the "Fast"
    variant of the tokenizer's class. ``value`` is the value for the tokenizer in ``model_index.json``.
    """
    import transformers  # slow to import

    old = int(transformers.__version__.partition(".")[0]) < 5
    known = isinstance(value, list) and value[:1] == ["transformers"] and (folder / "tokenizer.json").is_file()
    others = ("vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
    if not (old and known) or any((folder / name).is_file() for name in others):
        return None
    kind = getattr(transformers, f"{str(value[1]).removesuffix('Fast')}Fast", None)
    return None if kind is None else kind.from_pretrained(str(folder))


def _library(name: str) -> Any:
    pipelines = import_diffusers().pipelines
    return getattr(pipelines, name) if hasattr(pipelines, name) else importlib.import_module(name)


def _component(name: str, part: str, kind: Any, folder: Path, dtype: torch.dtype, variant: str | None) -> nn.Module:
    module, info = kind.from_pretrained(
        str(folder / part), use_safetensors=True, variant=variant, output_loading_info=True, **_typed(kind, dtype)
    )
    faults = []
    for what, keys in (
        ("missing", info["missing_keys"]),
        ("not known to this class", info["unexpected_keys"]),
        ("of another shape", [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]),
    ):
        found = sorted(key for key in keys if not key.endswith(_COMPUTED))
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            faults.append(f"{number_of(len(found), 'weight')} {what} ({', '.join(found[:3])}{more})")
    if faults:
        raise ModelError(
            f"The weight files of {part} in model {name!r} do not fit the class {kind.__name__}: {'; '.join(faults)}. "
            "Download or save the model again, or use releases of diffusers and transformers that know these weights."
        )
    loaded: nn.Module = module.eval()
    return loaded


def _typed(kind: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Argument of ``kind.from_pretrained`` that sets the precision, as a dictionary {name: ``dtype``}.

    ``kind`` is the class of a pipeline or of one of its components. The name of the argument is "dtype". In releases of
    diffusers before 0.36, it is "torch_dtype" for the classes of diffusers.
    """
    if kind.__module__.startswith("diffusers."):
        return {_dtype_argument(): dtype}
    return {"dtype": dtype}


@cache
def _dtype_argument() -> str:
    code = inspect.getsource(import_diffusers().DiffusionPipeline.from_pretrained)
    return "dtype" if 'kwargs.pop("dtype"' in code else "torch_dtype"


def _variants(folder: Path, variant: str | None) -> str:
    """Part of an error message that lists the variants of the weight files in a pipeline's ``folder``.

    The result is empty if ``variant`` is in the list, or if no weight file has a variant.
    """
    names = [path.name.removesuffix(".safetensors").split(".") for path in folder.glob("*/*.safetensors")]
    known = sorted({parts[1].split("-")[0] for parts in names if len(parts) > 1})
    if known and variant not in known:
        example = ", for example" if len(known) > 1 else ""
        return (
            f"The model has weight files of the {plural('variant', len(known))} {', '.join(known)}: pass "
            f"variant={known[0]!r}{example}. "
        )
    return ""


@contextmanager
def _quiet(embedded: bool) -> Iterator[None]:
    """Silence progress bars and needless warnings inside the ``with`` block, in which a pipeline is loaded.

    The libraries log these warnings at every load, although nothing is wrong. transformers warns about image processors
    that elakit does not use. diffusers warns about ``AutoencoderTiny``, the autoencoder of built-in models.
    ``embedded`` is True if a built-in model is loaded; only then are warnings of diffusers silenced. Missing weights
    still raise an error in `_component`.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    barred = [one for one in (diffusers_logging, transformers_logging) if one.is_progress_bar_enabled()]
    for one in barred:
        one.disable_progress_bar()
    loggers = [transformers_logging, *([diffusers_logging] if embedded else [])]
    before = [logger.get_verbosity() for logger in loggers]
    for logger in loggers:
        logger.set_verbosity_error()
    try:
        yield
    finally:
        for one in barred:
            one.enable_progress_bar()
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
