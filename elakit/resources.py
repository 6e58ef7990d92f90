"""Where the shipped data lies: inside an installed package, or beside it in a checkout."""

from __future__ import annotations

from pathlib import Path


def data_path(*parts: str) -> Path:
    """Path below the shipped ``data`` folder."""
    package = Path(__file__).parent
    packaged = package / "_data"
    return (packaged if packaged.is_dir() else package.parent / "data").joinpath(*parts)
