"""JavaScript and style sheets of the widgets, read from the package's files."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parent


def source(*paths: Path) -> str:
    """Concatenated text of several files.

    A widget needs all its JavaScript in one text, because its JavaScript module cannot import other files.
    """
    return "".join(path.read_text(encoding="utf-8") for path in paths)
