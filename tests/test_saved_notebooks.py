"""Notebooks that users run and save themselves keep their figures where no kernel runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from elakit.saved_notebooks import IMAGE, WIDGET, keep_images

RUN = """import sys
sys.path.insert(0, {tests!r})
from tiny import tiny_pipeline
import elakit
run = elakit.generate(tiny_pipeline(), "a [red car] and a [blue bird]", steps=2, progress=False)"""
PAGE = Path(__file__).parents[1] / "docs" / "howto" / "export-figures.md"


def written(folder: Path, *cells: str) -> Path:
    """A notebook that generates a run, and then runs this code."""
    code = [RUN.format(tests=str(Path(__file__).parent)), *cells]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in code], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, folder / "mine.ipynb")
    return folder / "mine.ipynb"


def test_only_widgets_with_an_image_lose_their_view() -> None:
    outputs: list[dict[str, Any]] = [
        {"output_type": "stream", "text": "42"},
        {"output_type": "execute_result", "data": {WIDGET: {"model_id": "a"}, IMAGE: "x", "text/plain": "Explorer"}},
        {"output_type": "execute_result", "data": {WIDGET: {"model_id": "b"}, "text/plain": "IntSlider"}},
    ]
    cells = [{"cell_type": "markdown", "source": "?"}, {"cell_type": "code", "outputs": outputs}]
    keep_images({"type": "notebook", "content": {"cells": cells}}, path="mine.ipynb", contents_manager=None)
    assert [list(output.get("data", ())) for output in outputs] == [[], [IMAGE, "text/plain"], [WIDGET, "text/plain"]]
    for other in ({"type": "file", "content": "text"}, {"type": "notebook", "content": None}, {"type": "directory"}):
        before = dict(other)
        keep_images(other)
        assert other == before


@pytest.mark.integration
def test_an_export_to_html_shows_widgets_and_figures(tmp_path: Path) -> None:
    from nbclient import NotebookClient

    nbconvert = pytest.importorskip("nbconvert")
    renderer = re.search(r"pio\.renderers\.default = .+", PAGE.read_text(encoding="utf-8"))
    assert renderer, "the page does not say how"
    setting = f"import plotly.io as pio\n{renderer[0]}"
    path = written(tmp_path, setting, "elakit.plot.leakage(run)", "elakit.explore(run)", "elakit.live(tiny_pipeline())")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    notebook.metadata.pop("widgets", None)  # JupyterLab saves no state of widgets unless it is asked to
    html, _ = nbconvert.HTMLExporter(template_name="lab").from_notebook_node(notebook)
    assert len(re.findall(r'<img[^>]+src="data:image/png;base64,', html)) == 2
    assert "Plotly.newPlot(" in html
    assert "widget-view+json" not in html
