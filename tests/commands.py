"""The command line, called in the process of a test."""

from __future__ import annotations

import sys

import pytest

from elakit.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of ``elakit WORDS``."""
    monkeypatch.setattr(sys, "argv", ["elakit", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)
