"""JavaScript and style sheets of the widgets, read from the package's files."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parent


def source(*paths: Path) -> str:
    """Text of several files, concatenated, because the JavaScript module of a widget cannot import other files."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)
