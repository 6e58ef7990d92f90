"""Run notebooks and save them with their outputs: ``python notebooks/run.py`` for all, or with the names of some.

Each saved notebook keeps a digest of the code that made its outputs, so that a test can tell when the code has changed
since. ``--check`` names the notebooks of which that is so, and runs nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from elakit.files import write_file

HERE = Path(__file__).parent
CELL_SECONDS = 600
MOST_BYTES = 3_000_000


def digest(notebook: nbformat.NotebookNode) -> str:
    """SHA-256 of the code cells, in their order; prose does not count."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def is_stale(notebook: nbformat.NotebookNode) -> bool:
    """Whether its outputs were made by other code than it has."""
    return bool(notebook.metadata.get("elakit", {}).get("code") != digest(notebook))


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs that its code gives now.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)  # of the run before
    where = {"metadata": {"path": str(path.parent)}}
    # without times of execution, which would change with every run
    NotebookClient(
        notebook, timeout=CELL_SECONDS, kernel_name="python3", resources=where, record_timing=False
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    return notebook


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write the notebook with the digest of its code, whole or not at all."""
    notebook.metadata["elakit"] = {"code": digest(notebook)}
    write_file(path, f"{nbformat.writes(notebook)}\n".encode())


def main() -> int:
    """Run what is asked for; 1 where a notebook is stale, or too large to be committed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all")
    parser.add_argument("--check", action="store_true", help="only say whose code has changed since it was run")
    asked = parser.parse_args()
    wrong = 0
    for path in asked.notebooks or sorted(HERE.glob("*.ipynb")):
        if asked.check:
            if is_stale(nbformat.read(path, as_version=4)):
                wrong = 1
                print(f"{path.name}: its code has changed; python notebooks/run.py {path}")
            continue
        begun = time.perf_counter()
        save(execute(path), path)
        size = path.stat().st_size
        wrong |= size > MOST_BYTES
        note = f" (more than {MOST_BYTES / 1e6:g} MB: show less)" if size > MOST_BYTES else ""
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s, {size / 1e6:.2f} MB{note}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
