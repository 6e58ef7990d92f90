"""In a real browser the explorer scrubs, plays and can be steered by keys, without a word to the network."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_pipeline

import elakit

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]
OVERLAY = "document.querySelector('.elx-stage canvas').toDataURL()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    pipe = tiny_pipeline()
    runs = [
        elakit.generate(pipe, "a [red car] and a [blue bird]", seed=1, steps=6, guidance=guidance, progress=False)
        for guidance in (None, elakit.ELA())
    ]
    path = elakit.explore(*runs, step=0).to_html(tmp_path / "page.html")
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.goto(path.as_uri())
    page.wait_for_selector(".elx-stage canvas")
    yield page
    page.close()
    assert not said


def settle(page: Any) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_the_slider_moves_the_attention(page: Any) -> None:
    before = page.evaluate(OVERLAY)
    page.locator(".elx-transport input[type=range]").fill("5")
    settle(page)
    assert page.evaluate(OVERLAY) != before
    assert "step 5 / 5" in page.locator(".elx-step").inner_text()


def test_play_comes_to_the_last_step_and_stops(page: Any) -> None:
    from playwright.sync_api import expect

    page.locator(".elx-play").click()
    expect(page.locator(".elx-step")).to_have_text("step 5 / 5", timeout=20_000)
    expect(page.locator(".elx-play")).to_have_attribute("aria-label", "Play", timeout=20_000)


def test_layers_words_and_values_are_chosen(page: Any) -> None:
    seen = {page.evaluate(OVERLAY)}
    page.get_by_label("Layers").first.select_option(index=1)
    settle(page)
    seen.add(page.evaluate(OVERLAY))
    page.locator(".elx-chip", has_text="bird").click()
    settle(page)
    seen.add(page.evaluate(OVERLAY))
    page.get_by_label("Colour scale").first.select_option(index=1)
    settle(page)
    seen.add(page.evaluate(OVERLAY))
    assert len(seen) == 4


def test_keys_do_what_the_foot_of_the_page_says(page: Any) -> None:
    page.locator(".elx").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    settle(page)
    assert "step 2 / 5" in page.locator(".elx-step").inner_text()
    page.keyboard.press("2")
    settle(page)
    assert page.locator(".elx-current").inner_text().startswith("bird")


def test_a_pointer_over_the_picture_reads_a_cell(page: Any) -> None:
    page.locator(".elx-stage").first.hover(position={"x": 20, "y": 20})
    settle(page)
    assert " at y " in page.locator(".elx-readout").first.inner_text()
    assert "highest" not in page.locator(".elx-readout").first.inner_text()


def test_a_picture_is_described_for_those_who_cannot_see_it(page: Any) -> None:
    label = page.locator(".elx-stage").nth(1).get_attribute("aria-label")
    assert "a red car and a blue bird" in label
    assert "attention of car" in label
