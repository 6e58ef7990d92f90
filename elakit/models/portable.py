"""Changes to saved pipelines.

After these changes, all releases of transformers can read a saved pipeline, and its files name no folder of this
machine.
"""

from __future__ import annotations

import json
from pathlib import Path

from elakit.files import write_file

_PREFIX = "text_model."


def write_portable_names(folder: str | Path) -> None:
    """Rename the weights of the CLIP text encoder in a saved pipeline, so that all releases of transformers read them.

    The names of the weights of a ``CLIPTextModel`` used to begin with ``text_model.``. Since release 5.6, transformers
    saves the names without this prefix. Older releases do not find the renamed weights, and fill the whole encoder with
    random numbers. This function adds the prefix where it is missing. Newer releases read names with and without the
    prefix.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder that ``pipe.save_pretrained`` wrote.
    """
    from safetensors.torch import load_file, save

    path = Path(folder) / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    if not any(name.startswith(_PREFIX) for name in weights):
        write_file(path, save({_PREFIX + name: value for name, value in weights.items()}, {"format": "pt"}))


def drop_folders(folder: str | Path) -> None:
    """Remove the key ``_name_or_path`` from the configurations of all components of a saved pipeline.

    The value of this key is a folder on the machine that loaded the component.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder that ``pipe.save_pretrained`` wrote.
    """
    for path in Path(folder).glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_file(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
