"""Importing elakit and asking for help load nothing heavy; type checkers and tab completion still see every name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import elakit

HEAVY = {"torch", "diffusers", "transformers", "plotly", "spacy", "pandas", "xarray", "zarr", "scipy", "skimage", "PIL"}


def loaded_by(script: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after a script."""
    script += "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_import_loads_nothing_heavy() -> None:
    assert not loaded_by("import elakit") & (HEAVY | {"numpy", "typer"})


@pytest.mark.parametrize("words", [[], ["run"], ["diagnose"], ["sweep"], ["sweep", "run"], ["predict", "fit"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    script = f"""
import contextlib, sys
from elakit.cli import main
sys.argv = ["elakit", *{words}, "--help"]
with contextlib.suppress(SystemExit):
    main()
"""
    assert not loaded_by(script) & HEAVY


def test_listing_methods_loads_no_method() -> None:
    assert not loaded_by("from elakit.guidance import METHODS\nlist(METHODS)") & HEAVY


def test_a_method_is_known_by_its_own_name() -> None:
    from elakit.guidance import METHODS

    assert {name: kind.name for name, kind in METHODS.items()} == {name: name for name in METHODS}


def test_completion_lists_every_public_name_and_each_is_there() -> None:
    assert {"generate", "ELA", "open_run", "plot", "judge", "guidance"} <= set(dir(elakit))
    for name in elakit.__all__:
        assert getattr(elakit, name) is not None
    with pytest.raises(AttributeError):
        _ = elakit.no_such_name


def test_the_package_is_typed() -> None:
    package = Path(elakit.__file__).parent
    assert (package / "py.typed").is_file()
    assert (package / "__init__.pyi").is_file()
