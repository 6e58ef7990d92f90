"""JavaScript and style sheets of the widgets, read from the package's files."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).parent


def source(*paths: Path) -> str:
    """Contents of several files, one after the other, because widgets cannot import further modules."""
    return "".join(path.read_text(encoding="utf-8") for path in paths)
