"""In a real JupyterLab the panel runs, is steered with the mouse and the keyboard, and can be stopped."""

from __future__ import annotations

import os
import re
import time
from ast import literal_eval
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import nbformat
import pytest

pytestmark = lab.MARKS
PATIENCE = 60  # seconds; only a machine that is very busy takes more than one
STEPS = 12
CELLS = (
    "from tiny import tiny_pipeline\nimport elakit\nfrom elakit.guidance import ELA, LatentStep",
    "method = ELA(anchor=LatentStep(guided=1, start=0))\n"
    f"panel = elakit.live(tiny_pipeline(), 'a [red car] and a [bird]', seed=1, steps={STEPS}, guidance=method)\npanel",
)
# of the last run: where the first entity's region begins and ends at each step, (left, top, right, bottom) in locations
ENDS = """from elakit.measures.masks import bounding_box
[bounding_box(step[0]) for step in panel.run.guidance.regions.values]"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[lab.Lab, lab.Notebook]]:
    """JupyterLab with a panel that draws with a tiny pipeline."""
    from playwright.sync_api import expect

    folder = tmp_path_factory.mktemp("live")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in CELLS])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "live.ipynb")
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tests, tests.parent)))  # the kernel imports the package of this checkout
    with lab.open_lab(folder, {"PYTHONPATH": paths}) as running:
        shown = running.open("live.ipynb", height=1400)
        shown.run(timeout=180)
        assert shown.errors() == []
        expect.set_options(timeout=1000 * PATIENCE)
        yield running, shown
        expect.set_options()


@pytest.fixture
def notebook(opened: tuple[lab.Lab, lab.Notebook]) -> Iterator[lab.Notebook]:
    """The notebook, its panel in view, without regions and without a run that goes on."""
    running, notebook = opened
    kernel(notebook, f"panel.cancel(); panel.wait(); panel.clear(); panel.steps = {STEPS}; panel.state")
    yield notebook
    assert running.complaints() == []
    assert notebook.errors() == []


def kernel(notebook: lab.Notebook, source: str) -> Any:
    """Value of an expression in the kernel; afterwards the panel is in view again."""
    cell = notebook.run_cell(source)
    notebook.page.evaluate("document.querySelector('.ell-panel').scrollIntoView()")
    said = next(output for output in cell["outputs"] if "data" in output)  # after remarks of libraries, if any
    return literal_eval(said["data"]["text/plain"])


def comes_to(notebook: lab.Notebook, source: str, wanted: Any) -> None:
    """Wait until an expression is true in the kernel: actions on the page reach it after a short delay."""
    end = time.monotonic() + PATIENCE
    while (found := kernel(notebook, source)) != wanted and time.monotonic() < end:
        notebook.page.wait_for_timeout(200)
    assert found == wanted


def button(notebook: lab.Notebook, name: str) -> Any:
    return notebook.page.locator(".ell-run").get_by_role("button", name=name)


def says(notebook: lab.Notebook, text: str) -> None:
    from playwright.sync_api import expect

    expect(notebook.page.locator(".ell-status")).to_contain_text(text)


def drag(notebook: lab.Notebook, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Drag the mouse over the image, between places in shares of it."""
    area, mouse = notebook.page.locator(".ell-stage").bounding_box(), notebook.page.mouse
    places = [(area["x"] + x * area["width"], area["y"] + y * area["height"]) for x, y in (start, end)]
    mouse.move(*places[0])
    mouse.down()
    mouse.move(*places[1], steps=5)
    mouse.up()


def test_a_run_is_drawn_step_by_step_while_the_kernel_answers(notebook: lab.Notebook) -> None:
    from playwright.sync_api import expect

    page = notebook.page
    button(notebook, "Step").click()
    says(notebook, "Paused")
    expect(page.locator(".ell-stage > img")).to_have_attribute("src", re.compile("^data:image/png"))
    first = page.locator(".ell-stage > img").get_attribute("src")
    assert kernel(notebook, "6 * 7") == 42
    expect(page.locator(".ell-when")).to_contain_text(f"step 1 of {STEPS}")
    assert page.locator(".ell-made").count() == 1
    button(notebook, "Resume").click()
    says(notebook, "Done.")
    expect(page.locator(".ell-when")).to_contain_text(f"step {STEPS} of {STEPS}")
    assert page.locator(".ell-stage > img").get_attribute("src") != first
    assert page.locator(".ell-stage .elx-edge").count() == 2
    assert [each.strip() for each in page.locator(".elx-thumb").all_inner_texts()] == ["image", "car", "bird", "red"]
    assert page.locator(".ell-plot path").get_attribute("d").count("L") == STEPS - 1
    page.locator(".elx-thumb", has_text="bird").click()
    expect(page.locator(".ell-stage > canvas")).to_be_visible()
    assert kernel(notebook, "panel.state, panel.error") == ("done", None)


def test_a_box_drawn_with_the_mouse_changes_the_region_of_the_next_step(notebook: lab.Notebook) -> None:
    kernel(notebook, "panel.step(3); panel.wait(); panel.state")
    notebook.page.locator(".ell-entity", has_text="car").click()
    drag(notebook, (0.02, 0.02), (0.48, 0.97))
    comes_to(notebook, "list(panel.regions)", ["car"])
    left, top, right, bottom = kernel(notebook, "panel.regions['car']")
    assert (left, top, right, bottom) == pytest.approx((0.02, 0.02, 0.48, 0.97), abs=0.01)
    button(notebook, "Step").click()
    kernel(notebook, "panel.wait(); panel.state")
    drag(notebook, (0.25, 0.5), (0.75, 0.5))  # the box's inside: it is moved
    comes_to(notebook, f"panel.regions['car'][0] > {left} + 0.49", True)
    assert kernel(notebook, "panel.regions['car']") == pytest.approx((left + 0.5, top, right + 0.5, bottom), abs=0.01)
    button(notebook, "Resume").click()
    says(notebook, "Done.")
    ends = kernel(notebook, ENDS)
    assert len(ends) == STEPS
    # the moves for steps 0 to 2 were made before the first pause was over; the box counts from step 3 on
    assert ends[3] == (0, 0, 2, 4)  # ELA reads maps of 4 x 4 locations here
    assert ends[2] != ends[3]
    assert ends[4:] == [(2, 0, 4, 4)] * (STEPS - 4)


def test_a_box_is_placed_moved_sized_and_taken_away_with_the_keyboard(notebook: lab.Notebook) -> None:
    page = notebook.page
    page.get_by_role("button", name="Place the region of bird").focus()
    page.keyboard.press("Enter")
    comes_to(notebook, "panel.regions", {"bird": (0.5, 0.25, 1.0, 0.75)})
    page.locator(".ell-box").focus()
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Shift+ArrowDown")
    comes_to(notebook, "panel.regions", {"bird": (0.4688, 0.2188, 0.9688, 0.75)})
    assert "x 47–97%" in page.locator(".ell-box").get_attribute("aria-label")
    page.locator(".ell-box").focus()
    page.keyboard.press("Delete")
    comes_to(notebook, "panel.regions", {})
    assert page.locator(".ell-box").count() == 0


def test_cancel_ends_the_run_within_one_step(notebook: lab.Notebook) -> None:
    from playwright.sync_api import expect

    watch = """panel.steps = 400
asked, cancel = [], panel._session.cancel
panel._session.cancel = lambda: (asked.append(panel._session.made), cancel())
panel.state"""
    kernel(notebook, watch)
    button(notebook, "Run").click()
    expect(notebook.page.locator(".ell-when")).to_contain_text("of 400")  # the first preview is shown
    button(notebook, "Cancel").click()
    says(notebook, "Canceled")
    made, stopped = kernel(notebook, "panel._session.cancel = cancel\nasked[0], panel.run.settings['stopped']")
    assert made <= stopped <= made + 2  # one may have ended while we looked, one after
    assert kernel(notebook, "len(panel.run.recording.steps)") == stopped


def test_words_are_marked_by_clicks_and_errors_are_shown(notebook: lab.Notebook) -> None:
    from playwright.sync_api import expect

    page = notebook.page
    page.locator(".ell-words").get_by_role("button", name="red: attribute of car").click()
    expect(page.locator(".ell-words").get_by_role("button", name="red: plain word")).to_be_focused()
    assert kernel(notebook, "[entity.attributes for entity in panel.prompt.entities]") == [(), ()]
    page.get_by_label("Prompt", exact=True).fill("a [red car] and a [bird")
    expect(page.locator(".ell-error")).to_contain_text("never closed")
    expect(button(notebook, "Run")).to_be_disabled()
    page.get_by_label("Prompt", exact=True).fill("a [red car] and a [bird]")
    expect(page.locator(".ell-error")).to_have_count(0)
    expect(page.locator(".ell-words").get_by_role("button", name="red: attribute of car")).to_be_visible()


def test_the_verdict_is_written_below_the_image(notebook: lab.Notebook) -> None:
    """The tiny pipeline has no judge, so the verdict is set by hand."""
    from playwright.sync_api import expect

    kernel(notebook, "panel.steps = 1; panel.start(); panel.wait(); panel.state")
    expect(notebook.page.locator(".ell-verdict")).to_be_hidden()
    judged = """stage = panel._view.stage
stage._frame = {**stage._frame, "about": {**stage._frame["about"], "verdict": "car: blue instead of red"}}
panel.state"""
    kernel(notebook, judged)
    expect(notebook.page.locator(".ell-verdict")).to_have_text("Judge: car: blue instead of red.")


def test_lists_of_choices_have_an_arrow(notebook: lab.Notebook) -> None:
    """Without one they look like text fields."""
    found = notebook.page.evaluate(
        "[...document.querySelectorAll('.ell-panel select')].map((select) => getComputedStyle(select))"
        ".map((style) => style.appearance !== 'none' || style.backgroundImage !== 'none')"
    )
    assert found
    assert all(found)


def test_everything_has_a_name(notebook: lab.Notebook) -> None:
    unnamed = notebook.page.evaluate(
        "[...document.querySelectorAll('.ell-panel :is(button, select, input, textarea)')]"
        ".filter((each) => !(each.ariaLabel || each.textContent.trim() || each.labels?.length)).length"
    )
    assert unnamed == 0
