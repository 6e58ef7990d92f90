"""Saved pipelines that all releases of transformers can read, and that name no folder of this machine."""

from __future__ import annotations

import json
from pathlib import Path

from elakit.files import write_file

_PREFIX = "text_model."


def write_portable_names(folder: str | Path) -> None:
    """Rename the weights of the CLIP text encoder in a saved pipeline, so that all releases of transformers read them.

    From release 5.6 on, transformers saves a ``CLIPTextModel`` without the prefix ``text_model.`` in the names. Older
    releases do not know these names and fill the whole encoder with random numbers; newer ones read both forms.

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

    Its value is a folder on the machine that loaded the component.

    Parameters
    ----------
    folder : str or pathlib.Path
        Folder that ``pipe.save_pretrained`` wrote.
    """
    for path in Path(folder).glob("*/*config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            write_file(path, (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
