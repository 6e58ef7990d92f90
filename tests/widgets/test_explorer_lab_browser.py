"""In a real JupyterLab the first notebook runs, and its explorer scrubs, without an error or a word to the network.

Saved and opened again, its widgets are images.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import nbformat
import pytest

from notebooks import run

pytestmark = lab.MARKS
FIRST = Path(__file__).parents[2] / "notebooks" / "01_first_look.ipynb"
STEPS = 4
# state in the kernel of the explorer that a notebook cell shows
EXPLORER = "next(shown for shown in Out.values() if isinstance(shown, elakit.Explorer))"
OVERLAY = "document.querySelector('.elx-stage canvas').toDataURL()"


def shortened(path: Path) -> nbformat.NotebookNode:
    """The notebook with images of a few steps and one seed, and no outputs."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace("progress=False", f"steps={STEPS}, progress=False")
            cell.source = cell.source.replace("seeds=range(8)", f"steps={STEPS}, seeds=[0]")
            cell.outputs, cell.execution_count = [], None
    return notebook


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[lab.Lab, lab.Notebook]]:
    """JupyterLab with the notebook after all its notebook cells have run."""
    folder = tmp_path_factory.mktemp("notebooks")
    nbformat.write(shortened(FIRST), folder / FIRST.name)
    with lab.open_lab(folder) as running:
        notebook = running.open(FIRST.name)
        notebook.run(timeout=240)
        yield running, notebook


@pytest.fixture
def page(opened: tuple[lab.Lab, lab.Notebook]) -> Iterator[Any]:
    """The page, scrolled to the explorer at its first step."""
    running, notebook = opened
    page = notebook.page
    page.locator(".elx").scroll_into_view_if_needed()
    page.locator(".elx-transport input[type=range]").fill("0")
    settle(page)
    yield page
    assert running.complaints() == []


def settle(page: Any) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def overlay_other_than(page: Any, *seen: str) -> str:
    """The overlay, as soon as it differs from those that were seen; after ten seconds, whatever it is."""
    for _ in range(100):
        found = page.evaluate(OVERLAY)
        if found not in seen:
            break
        page.wait_for_timeout(100)
    return str(found)


def test_every_cell_runs_and_every_figure_shows(opened: tuple[lab.Lab, lab.Notebook], page: Any) -> None:
    _, notebook = opened
    assert notebook.errors() == []
    code = [cell for cell in notebook.cells() if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    saved = [bool(cell.outputs) for cell in run.code_cells(nbformat.read(FIRST, as_version=4))]
    shown = [bool(cell["outputs"]) for cell in code if run.INSTALL_TAG not in cell["metadata"].get("tags", [])]
    assert saved == shown, f"outputs are stale: python notebooks/run.py {FIRST.name}"
    kinds = [kind for cell in code for output in cell["outputs"] for kind in output.get("data", {})]
    assert page.locator(".js-plotly-plot .main-svg").count() >= kinds.count("application/vnd.plotly.v1+json") > 0
    assert page.locator(".elx-stage").count() == 2


def test_the_slider_and_play_move_the_overlay(page: Any) -> None:
    from playwright.sync_api import expect

    step, first = page.locator(".elx-step"), page.evaluate(OVERLAY)
    page.locator(".elx-transport input[type=range]").fill("1")
    expect(step).to_have_text(f"step 2 of {STEPS}")
    second = overlay_other_than(page, first)
    page.locator(".elx-play").click()
    expect(step).to_have_text(f"step {STEPS} of {STEPS}", timeout=20_000)
    expect(page.locator(".elx-play")).to_have_attribute("aria-label", "Play", timeout=20_000)
    assert len({first, second, overlay_other_than(page, first, second)}) == 3


def test_words_and_layers_are_chosen_and_the_kernel_knows(opened: tuple[lab.Lab, lab.Notebook], page: Any) -> None:
    _, notebook = opened
    first = page.evaluate(OVERLAY)
    page.locator(".elx-thumb", has_text="car").first.click()
    second = overlay_other_than(page, first)
    page.get_by_label("Layers", exact=True).select_option(index=1)
    assert len({first, second, overlay_other_than(page, first, second)}) == 3
    seen = None
    for _ in range(20):  # on a busy machine a notebook cell may overtake messages from the page
        cell = notebook.run_cell(f"explorer = {EXPLORER}\nexplorer.token, explorer.step")
        seen = cell["outputs"][0]["data"]["text/plain"]
        if seen == "('car', 0)":
            break
        page.wait_for_timeout(500)
    assert seen == "('car', 0)"


def test_the_explorer_follows_what_python_sets(opened: tuple[lab.Lab, lab.Notebook], page: Any) -> None:
    from playwright.sync_api import expect

    _, notebook = opened
    notebook.run_cell(f"{EXPLORER}.step = 3")
    expect(page.locator(".elx-step").first).to_have_text(f"step 4 of {STEPS}")


def test_a_notebook_that_is_reopened_shows_images_of_widgets(opened: tuple[lab.Lab, lab.Notebook], page: Any) -> None:
    running, notebook = opened
    notebook.run_cell("elakit.live(pipe, 'a [red car]')")
    page.locator(".ell-panel").first.wait_for(timeout=60_000)
    widgets = page.locator(".elx-stage").count()
    notebook.save()
    assert page.locator(".elx-stage").count() == widgets > 0  # the open page keeps its widgets
    saved = nbformat.read(running.folder / FIRST.name, as_version=4)
    saved.cells = [cell for cell in saved.cells if cell.source.startswith(("elakit.explore(", "elakit.live("))]
    assert len(saved.cells) == 2
    nbformat.write(saved, running.folder / "again.ipynb")
    again = running.open("again.ipynb", timeout=300)
    images = again.page.locator(".jp-OutputArea-output img[src^='data:image/png']")
    images.nth(1).wait_for(timeout=60_000)
    assert images.count() == 2
    assert "Error displaying widget" not in again.page.content()
    again.close()
