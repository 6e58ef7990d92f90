"""Paths of the shipped data and notebooks.

An installed package contains them in ``elakit/_data`` and ``elakit/_notebooks``. A checkout of the repository has the
folders ``data`` and ``notebooks`` at its root.
"""

from __future__ import annotations

from pathlib import Path


def data_path(*parts: str) -> Path:
    """Path of a file or folder in the shipped ``data`` folder."""
    return _shipped("data").joinpath(*parts)


def notebooks_path() -> Path:
    """Folder of the shipped notebooks; it may not exist."""
    return _shipped("notebooks")


def _shipped(name: str) -> Path:
    package = Path(__file__).parent
    packaged = package / f"_{name}"
    return packaged if packaged.is_dir() else package.parent / name
