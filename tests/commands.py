"""The command line and surveys in the process of a test, which has imported torch already."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from elakit.cli import main


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Exit code of ``elakit WORDS``."""
    monkeypatch.setattr(sys, "argv", ["elakit", *words])
    with pytest.raises(SystemExit) as leaving:
        main()
    return int(leaving.value.code or 0)


@contextmanager
def surveys_in_this_process() -> Iterator[None]:
    """Surveys generate in a thread of this process in place of worker processes."""
    from elakit.sweep.sweep import run

    def without_workers(cases: Any, folder: Any, **options: Any) -> Any:
        with ThreadPoolExecutor(1) as pool:
            return run(cases, folder, pool, **{**options, "workers": None})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("elakit.diagnosis.survey.run.run", without_workers)
        yield
