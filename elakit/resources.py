"""Paths of the data and the notebooks that are shipped with elakit.

An installed package has the data in ``elakit/_data`` and the notebooks in ``elakit/_notebooks``. A checkout of the
repository has the folders ``data`` and ``notebooks`` at its root.
"""

from __future__ import annotations

from pathlib import Path


def data_path(*parts: str) -> Path:
    """Path of a file or folder in the ``data`` folder that is shipped with elakit.

    `parts` are the components of the path below ``data``. Without `parts`, the path of ``data`` is returned.
    """
    return _shipped("data").joinpath(*parts)


def notebooks_path() -> Path:
    """Path of the folder with the notebooks that are shipped with elakit.

    The path is returned even if the folder does not exist.
    """
    return _shipped("notebooks")


def _shipped(name: str) -> Path:
    package = Path(__file__).parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name
