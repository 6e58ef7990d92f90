"""JavaScript and style sheets of the widgets, read from the package's files."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parent


def source(*paths: Path) -> str:
    """The contents of several files, one after the other; widgets have no module loader of their own."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)
