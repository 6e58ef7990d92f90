"""Every notebook runs from top to bottom on the embedded model, and its saved outputs are those of its code."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    saved = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    shown = [bool(cell.outputs) for cell in notebook.cells if cell.cell_type == "code"]
    assert saved == shown, "outputs are stale: run the notebook and save it"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_small_and_holds_no_error(path: Path) -> None:
    assert path.stat().st_size < 3_000_000
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    kinds = {output.output_type for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs}
    assert "error" not in kinds
