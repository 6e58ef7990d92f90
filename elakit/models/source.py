"""Sources of models: built-in models, folders and the hub.

This module finds the source of a model, and reads ``model_index.json``, the index of the model's components.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from elakit.errors import ModelError
from elakit.models.embedded import EMBEDDED

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def locate(name: str | Path) -> str:
    """Find the folder or the hub id of a model; nothing is downloaded.

    Parameters
    ----------
    name : str or pathlib.Path
        A built-in model, a folder or a hub id, as in `load`.

    Returns
    -------
    str
        Path of the model's folder, if the model is built-in or a folder. Otherwise the hub id.

    Raises
    ------
    ModelError
        Raised when the name is neither a built-in model, nor the folder of a pipeline, nor a possible hub id.
    """
    text = str(name)
    if text in EMBEDDED:
        folder = EMBEDDED[text].path
        if not (folder / "model_index.json").is_file():
            raise ModelError(
                f"The built-in model {text!r} is missing from this installation; install elakit again from a complete "
                "checkout (the weights are in the repository's data folder)."
            )
        return str(folder)
    path = Path(text).expanduser()
    expected = (
        f"Give a built-in model ({', '.join(EMBEDDED)}), a folder that `pipe.save_pretrained` wrote, or a hub id "
        "such as 'stable-diffusion-v1-5/stable-diffusion-v1-5'."
    )
    if text and path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ModelError(f"Folder {text!r} contains no pipeline (no model_index.json in it). {expected}")
        return str(path)
    if text and path.exists():
        raise ModelError(f"Model {text!r} is a single file. {expected}")
    if isinstance(name, str) and HUB_ID.fullmatch(text):
        return text
    close = difflib.get_close_matches(text.lower(), EMBEDDED, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ModelError(f"Unknown model {text!r}.{hint} {expected}")


def read_index(source: str) -> dict[str, Any]:
    """Read the ``model_index.json`` of a pipeline.

    This file is enough to refuse an unsupported model before its weights are downloaded.

    Parameters
    ----------
    source : str
        Folder or hub id, as `locate` returns it.

    Returns
    -------
    dict
        Content of the file: the class of the pipeline, and the library and class of each component.

    Raises
    ------
    ModelError
        Raised when the file cannot be downloaded or read.
    """
    path = Path(source) / "model_index.json"
    if not path.is_file():
        path = Path(_download_index(source))
    try:
        index = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"The model_index.json of {source!r} cannot be read: {first_line(error)} Download the model again."
        ) from error
    if not isinstance(index, dict):
        raise ModelError(
            f"The model_index.json of {source!r} is not a JSON object that names the pipeline's components. Download "
            "the model again, or write the folder again with `pipe.save_pretrained`."
        )
    return index


def _download_index(hub_id: str) -> str:
    try:
        return hf_hub_download(hub_id, "model_index.json")
    except GatedRepoError as error:
        why = "its license must be accepted on its page first, and you must be logged in (`hf auth login`)."
        cause: Exception = error
    except RepositoryNotFoundError as error:
        why = "there is no such model on the hub (or it is private), and no folder of that name."
        cause = error
    except LocalEntryNotFoundError as error:
        why = "the hub cannot be reached, the model is not in the local cache, and there is no folder of that name."
        cause = error
    except EntryNotFoundError as error:
        why = "it is not a diffusers pipeline (no model_index.json)."
        cause = error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        why = first_line(error)
        cause = error
    raise unavailable(hub_id, why) from cause


def unavailable(hub_id: str, why: str) -> ModelError:
    """Create the error for a model of the hub that cannot be downloaded.

    ``why`` states the reason and ends with a period.
    """
    return ModelError(
        f"Model {hub_id!r} cannot be downloaded: {why} Give a built-in model ({', '.join(EMBEDDED)}: no network "
        "needed), a folder or another hub id."
    )


def first_line(error: BaseException) -> str:
    """First line of an error's message, ending with a period.

    The other lines of a library's message often recommend calls of that library. Users of elakit do not make these
    calls.

    Parameters
    ----------
    error : BaseException
        Error of any kind. If the error has no message, the name of its class is used.

    Returns
    -------
    str
        The first line, ending with a period.

    Examples
    --------
    >>> first_line(OSError("The file is missing\\nCall reload() again"))
    'The file is missing.'
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
