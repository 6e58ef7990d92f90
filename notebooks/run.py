"""Run notebooks and save them with their outputs: ``python notebooks/run.py`` for all, or with names of some.

Each saved notebook has a digest of the code that produced its outputs, so that a test can detect later changes of the
code. A PNG is stored beside each plotly figure, for viewers without JavaScript (see ``static_figures.py``). The first
code cell installs elakit where it is missing (Colab); it is alike in all notebooks, and neither executed here nor part
of the digest. ``--check`` lists the notebooks with changed code, ``--images`` adds missing PNGs to saved outputs, and
``--install`` adds or updates the code cell that installs elakit; none of them runs a notebook.
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
if str(HERE) not in sys.path:  # run.py is a script and a module of the tests
    sys.path.insert(0, str(HERE))
from static_figures import PNG_MIME, add_images, without_images

CELL_SECONDS = 600
MOST_BYTES = 3_000_000
WIDGET_MIME = "application/vnd.jupyter.widget-view+json"
INSTALL_TAG = "install-elakit"
INSTALL = """\
# For Colab: install elakit, then restart the session. Where elakit is installed, this does nothing.
import importlib.util

if importlib.util.find_spec("elakit") is None:
    %pip install -q "elakit[full] @ git+https://github.com/elakit/elakit\""""


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """Return the code cells without the one that installs elakit."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and not is_install(cell)]


def is_install(cell: nbformat.NotebookNode) -> bool:
    """Return True for the code cell that installs elakit."""
    return INSTALL_TAG in cell.metadata.get("tags", [])


def add_install(notebook: nbformat.NotebookNode) -> None:
    """Insert the code cell that installs elakit after the first text; one that is there already is replaced."""
    notebook.cells = [cell for cell in notebook.cells if not is_install(cell)]
    cell = nbformat.v4.new_code_cell(INSTALL, id=INSTALL_TAG, metadata={"tags": [INSTALL_TAG]})
    notebook.cells.insert(1, cell)


def digest(notebook: nbformat.NotebookNode) -> str:
    """Return the SHA-256 of the code, in the order of the notebook; prose and the installation are not included."""
    code = [cell.source for cell in code_cells(notebook)]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def is_stale(notebook: nbformat.NotebookNode) -> bool:
    """Return True if the outputs were produced by other code than the notebook has."""
    return bool(notebook.metadata.get("elakit", {}).get("code") != digest(notebook))


def execute(path: Path) -> nbformat.NotebookNode:
    """Run a notebook and return it with its outputs.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A notebook cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)  # state of the previous run
    add_install(notebook)
    where = {"metadata": {"path": str(path.parent)}}
    # without execution times, which change with every run, and without the state of widgets, which are shown by images
    NotebookClient(
        notebook,
        timeout=CELL_SECONDS,
        kernel_name="python3",
        resources=where,
        record_timing=False,
        store_widget_state=False,
        skip_cells_with_tag=INSTALL_TAG,
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            if output.output_type == "stream":  # warnings state the files of this machine
                output.text = output.text.replace(f"{HERE.parent}/", "")
            data = output.get("data", {})
            if PNG_MIME in data:  # JupyterLab would prefer a widget whose state is not saved, and show an error
                data.pop(WIDGET_MIME, None)
    return notebook


def save(notebook: nbformat.NotebookNode, path: Path) -> None:
    """Write a notebook with the digest of its code, whole or not at all."""
    notebook.metadata["elakit"] = {"code": digest(notebook)}
    write_file(path, f"{nbformat.writes(notebook)}\n".encode())


def find(name: str) -> Path:
    """Path of a notebook that is given by its path or by its name, with or without ``.ipynb``."""
    for path in (Path(name), HERE / name, HERE / f"{name}.ipynb"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in HERE.glob("*.ipynb")))
    raise argparse.ArgumentTypeError(f"{name!r} is not a notebook; give a path, or one of {known}.")


def main() -> int:
    """Run the requested notebooks; return 1 if one is stale, or too large to be committed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=find, help="names or paths of notebooks; by default all")
    parser.add_argument(
        "--check", action="store_true", help="only list the notebooks whose code has changed since they were run"
    )
    parser.add_argument("--images", action="store_true", help="only add missing images of figures to saved outputs")
    parser.add_argument("--install", action="store_true", help="only add or update the code cell that installs elakit")
    asked = parser.parse_args()
    wrong = 0
    for path in asked.notebooks or sorted(HERE.glob("*.ipynb")):
        if asked.check:
            if is_stale(nbformat.read(path, as_version=4)):
                wrong = 1
                print(f"{path.name}: its code has changed; run: python notebooks/run.py {path}")
            continue
        begun = time.perf_counter()
        if asked.images or asked.install:
            notebook = nbformat.read(path, as_version=4)
            before = nbformat.writes(notebook)
            if asked.install:
                add_install(notebook)
            if asked.images and without_images(notebook):
                add_images(notebook)
            if (after := nbformat.writes(notebook)) != before:
                write_file(path, f"{after}\n".encode())
        else:
            notebook = execute(path)
            add_images(notebook)
            save(notebook, path)
        size = path.stat().st_size
        wrong |= size > MOST_BYTES
        note = f" (more than {MOST_BYTES / 1e6:g} MB: reduce the outputs)" if size > MOST_BYTES else ""
        print(f"{path.name}: {time.perf_counter() - begun:.0f} s, {size / 1e6:.2f} MB{note}", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
