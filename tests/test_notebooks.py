"""Every notebook runs from top to bottom on the built-in model, and its saved outputs are those of its code.

By default only the first notebook runs, with images of a few steps and one seed in its diagnosis: in JupyterLab where
there is a browser (see ``widgets/test_explorer_lab_browser.py``), otherwise here. The code of the others is checked
against the names and arguments of the package.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lab
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient.exceptions import CellExecutionError

from elakit.plot import style
from notebooks import run, static_figures

NOTEBOOKS = sorted(run.HERE.glob("*.ipynb"))
# A whole notebook takes minutes: all of them run if ELAKIT_NOTEBOOKS=1 (a weekly job), the first one always, shortened.
RUN_ALWAYS = {"01_first_look": {"progress=False": "steps=4, progress=False", "seeds=range(8)": "steps=4, seeds=[0]"}}
ALL = bool(int(os.environ.get("ELAKIT_NOTEBOOKS", "0")))

every = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def shortened(path: Path, folder: Path) -> Path:
    """A copy of a notebook with other values in its code."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in RUN_ALWAYS[path.stem].items():
        cells = [cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source]
        assert cells, f"{path.name} has no {old}: change RUN_ALWAYS"
        for cell in cells:
            cell.source = cell.source.replace(old, new)
    nbformat.write(notebook, folder / path.name)
    return folder / path.name


@every
def test_it_runs(path: Path, tmp_path: Path) -> None:
    if not ALL and path.stem not in RUN_ALWAYS:
        pytest.skip("whole notebooks run with ELAKIT_NOTEBOOKS=1")
    if not ALL and lab.CHROMIUM and lab.PLAYWRIGHT:
        pytest.skip("runs in JupyterLab, in widgets/test_explorer_lab_browser.py")
    if not ALL:
        path = shortened(path, tmp_path)
    saved = [bool(cell.outputs) for cell in run.code_cells(nbformat.read(path, as_version=4))]
    shown = [bool(cell.outputs) for cell in run.code_cells(run.execute(path))]
    assert saved == shown, f"outputs are stale: python notebooks/run.py {path.name}"


def test_a_run_keeps_outputs_and_neither_widgets_nor_the_installation(tmp_path: Path) -> None:
    data = {"text/plain": "x", "image/png": "eA==", run.WIDGET_MIME: {}}
    shown = f"display({data}, raw=True)"
    cells = [nbformat.v4.new_markdown_cell("# Why?"), *map(nbformat.v4.new_code_cell, ("1 + 1", shown, "x = 1"))]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), tmp_path / "01.ipynb")
    notebook = run.execute(tmp_path / "01.ipynb")
    outputs = [[set(output["data"]) for output in cell.outputs] for cell in run.code_cells(notebook)]
    assert outputs == [[{"text/plain"}], [{"text/plain", "image/png"}], []]
    (install,) = (cell for cell in notebook.cells if run.is_install(cell))
    assert (install.execution_count, install.outputs) == (None, [])
    assert "widgets" not in notebook.metadata
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")]), tmp_path / "02.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run.execute(tmp_path / "02.ipynb")


def uses(tree: ast.AST) -> Iterator[tuple[Any, list[str]]]:
    """Objects of elakit that code uses, with the keywords of the calls; a name that does not exist is an error."""
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "elakit":
                    importlib.import_module(alias.name)
                    known[alias.asname or "elakit"] = importlib.import_module(alias.name if alias.asname else "elakit")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "elakit":
            for alias in node.names:
                known[alias.asname or alias.name] = getattr(importlib.import_module(node.module), alias.name)

    def found(node: ast.AST) -> Any:
        if isinstance(node, ast.Name):
            return known.get(node.id)
        owner = found(node.value) if isinstance(node, ast.Attribute) else None
        return None if owner is None else getattr(owner, node.attr)

    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := found(node.func)) is not None:
            yield called, [keyword.arg for keyword in node.keywords if keyword.arg]
        elif isinstance(node, ast.Attribute) and (used := found(node)) is not None:
            yield used, []


@every
def test_it_uses_names_and_arguments_that_exist(path: Path) -> None:
    cells = [cell.source for cell in run.code_cells(nbformat.read(path, as_version=4))]
    code = "\n".join(line for cell in cells for line in cell.splitlines() if not line.lstrip().startswith(("%", "!")))
    called = list(uses(ast.parse(code)))
    assert called
    for used, keywords in called:
        if keywords:
            accepted = inspect.signature(used).parameters
            free = any(one.kind is one.VAR_KEYWORD for one in accepted.values())
            assert free or set(keywords) <= set(accepted), f"{used} takes no {set(keywords) - set(accepted)}"


@every
def test_its_outputs_are_those_of_its_code(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not run.is_stale(notebook), f"its code has changed since it was run: python notebooks/run.py {path.name}"
    code = run.code_cells(notebook)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "cells were run out of order"
    # the check sees a change of code, and none of prose
    notebook.cells[0].source += "\n\nMore."
    assert not run.is_stale(notebook)
    code[-1].source += "\n1"
    assert run.is_stale(notebook)


@every
def test_it_is_small_and_holds_no_error(path: Path) -> None:
    assert path.stat().st_size < run.MOST_BYTES
    notebook = nbformat.read(path, as_version=4)
    assert notebook.cells[0].source.startswith("# ")
    assert notebook.cells[0].source.splitlines()[0].endswith("?")
    assert "/site-packages/" not in (text := path.read_text(encoding="utf-8"))
    assert str(Path.home()) not in text
    assert str(run.HERE.parent) not in text
    kinds = {output.output_type for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs}
    assert "error" not in kinds


@every
def test_its_first_code_cell_installs_elakit_where_it_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(path, as_version=4)
    (number,) = (i for i, cell in enumerate(notebook.cells) if run.is_install(cell))
    cell = notebook.cells[number]
    assert number == 1
    assert cell.source == run.INSTALL, "python notebooks/run.py --install"
    assert (cell.execution_count, cell.outputs) == (None, [])
    title = notebook.cells[0].source
    (repository,) = set(re.findall(r"colab\.research\.google\.com/github/([\w-]+/[\w-]+)/", title))
    assert f'git+https://github.com/{repository}"' in cell.source
    assert "next code cell" in title
    # as IPython runs it
    magics: list[tuple[str, str]] = []
    shell = SimpleNamespace(run_line_magic=lambda name, line: magics.append((name, line)))
    code = TransformerManager().transform_cell(cell.source)
    exec(code, {"get_ipython": lambda: shell})
    assert magics == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(code, {"get_ipython": lambda: shell})
    assert [(name, line.split()[0]) for name, line in magics] == [("pip", "install")]


def test_a_notebook_is_found_by_its_name_or_path() -> None:
    found = run.HERE / "01_first_look.ipynb"
    assert [run.find(name) for name in ("01_first_look", "01_first_look.ipynb", str(found))] == [found] * 3
    with pytest.raises(argparse.ArgumentTypeError, match=r"'first_look' is not a notebook.*01_first_look"):
        run.find("first_look")


def test_an_install_cell_is_added_once_and_changes_no_digest() -> None:
    cells = [nbformat.v4.new_markdown_cell("# Why?"), nbformat.v4.new_code_cell("1 + 1")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    before = run.digest(notebook)
    for _ in range(2):
        run.add_install(notebook)
        assert [run.is_install(cell) for cell in notebook.cells] == [False, True, False]
    assert run.digest(notebook) == before
    nbformat.validate(notebook)


@every
def test_every_figure_has_a_static_image(path: Path) -> None:
    missing = static_figures.without_images(nbformat.read(path, as_version=4))
    assert not missing, f"cells {missing} have figures without a PNG: python notebooks/run.py --images {path}"


@every
def test_no_saved_widget_waits_for_a_kernel(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            kinds = set(output.get("data", {}))
            assert run.WIDGET_MIME not in kinds or static_figures.PNG_MIME not in kinds, "JupyterLab shows an error"


@every
def test_no_figure_is_wider_than_the_page_beside_an_open_sidebar(path: Path) -> None:
    for i, cell in enumerate(nbformat.read(path, as_version=4).cells):
        for output in cell.get("outputs", []):
            layout = output.get("data", {}).get("application/vnd.plotly.v1+json", {}).get("layout", {})
            assert layout.get("width", 0) <= style.WIDTH, f"cell {i}"
