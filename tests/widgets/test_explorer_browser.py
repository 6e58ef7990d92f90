"""In a real browser the explorer scrubs, plays and can be steered by keys, without a word to the network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import pytest
from tiny import tiny_pipeline

import elakit

pytestmark = lab.MARKS
DECODER = "up (decoder): 4 layers"
OVERLAY = "document.querySelector('.elx-stage canvas').toDataURL()"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with lab.browse() as browser:
        yield browser


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, list[str]]]:
    """A page of two runs, and what its console and its network say."""
    pipe = tiny_pipeline()
    runs = [
        elakit.generate(
            pipe,
            "a [red car] and a [blue bird]",
            seed=1,
            steps=6,
            guidance=guidance,
            progress=False,
            predicted=guidance is None,
        )
        for guidance in (None, elakit.ELA())
    ]
    path = elakit.explore(*runs, step=0).to_html(tmp_path_factory.mktemp("explorer") / "page.html")
    page, said = open_page(browser, path)
    yield page, said
    page.close()


@pytest.fixture
def page(opened: tuple[Any, list[str]]) -> Iterator[Any]:
    """The page as it opened: first step, mean of the decoder, the first entity."""
    page, said = opened
    page.locator(".elx-transport input[type=range]").fill("0")
    page.get_by_label("Layers", exact=True).select_option(label=DECODER)
    page.get_by_label("Resolution", exact=True).select_option(label="8×8")
    page.locator(".elx-thumb", has_text="car").first.click()
    page.mouse.move(0, 0)
    settle(page)
    yield page
    assert not said


def open_page(browser: Any, path: Path) -> tuple[Any, list[str]]:
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on(
        "request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None
    )
    page.goto(path.as_uri())
    page.wait_for_selector(".elx-thumbs canvas")
    return page, said


def chosen(select: Any) -> str:
    return select.evaluate("(select) => select.options[select.selectedIndex].label")


def settle(page: Any) -> None:
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_the_slider_moves_attention_and_the_outlines_of_regions(page: Any) -> None:
    outlines = "[...document.querySelectorAll('.elx-stage path')].map((path) => path.getAttribute('d')).join()"
    before = page.evaluate(OVERLAY), page.evaluate(outlines)
    page.locator(".elx-transport input[type=range]").fill("5")
    settle(page)
    after = page.evaluate(OVERLAY), page.evaluate(outlines)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert page.locator(".elx-step").inner_text() == "step 6 of 6"


def test_the_overlay_lies_over_the_predicted_image_of_the_step_or_the_finished_one(page: Any) -> None:
    images, finished = page.locator(".elx-stage img"), page.locator(".elx-thumb img").first.get_attribute("src")
    slider, box = page.locator(".elx-transport input[type=range]"), page.get_by_label("Predicted image")
    assert box.is_checked()
    seen = []
    for step in (0, 5):
        slider.fill(str(step))
        settle(page)
        seen.append(images.first.get_attribute("src"))
    guided = images.last.get_attribute("src")  # this run kept only its finished image
    box.uncheck()
    settle(page)
    seen.append(images.first.get_attribute("src"))
    assert seen[0] != seen[1]
    assert seen[2] == finished
    assert images.last.get_attribute("src") == guided
    box.check()


def test_play_comes_to_the_last_step_and_stops(page: Any) -> None:
    from playwright.sync_api import expect

    before = page.evaluate(OVERLAY)
    page.locator(".elx-play").click()
    expect(page.locator(".elx-play")).to_have_attribute("aria-label", "Pause")
    expect(page.locator(".elx-step")).to_have_text("step 6 of 6", timeout=20_000)
    expect(page.locator(".elx-play")).to_have_attribute("aria-label", "Play", timeout=20_000)
    assert page.evaluate(OVERLAY) != before


def test_layers_words_and_values_are_chosen(page: Any) -> None:
    seen = [page.evaluate(OVERLAY)]
    page.get_by_label("Layers", exact=True).select_option(index=1)
    settle(page)
    seen.append(page.evaluate(OVERLAY))
    page.locator(".elx-chip", has_text="bird").click()
    settle(page)
    seen.append(page.evaluate(OVERLAY))
    page.get_by_label("Values", exact=True).select_option(label="× start-of-text")
    settle(page)
    seen.append(page.evaluate(OVERLAY))
    assert page.locator(".elx-unit").inner_text() == "relative to the start-of-text token"
    page.get_by_label("Values", exact=True).select_option(label="probability")
    page.get_by_label("Color scale", exact=True).select_option(index=1)
    settle(page)
    seen.append(page.evaluate(OVERLAY))
    page.get_by_label("Color scale", exact=True).select_option(index=0)
    assert len(set(seen)) == 5


def test_special_tokens_are_named_in_words(page: Any) -> None:
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("0")
    settle(page)
    assert page.locator(".elx-current").first.get_attribute("title") == "start-of-text: special token"
    assert page.locator(".elx-readout").first.inner_text().startswith("start-of-text, maximum: ")
    assert "start-of-text" in page.locator(".elx-thumbs").first.inner_text()
    assert "<start>" not in page.locator(".elx-stage").first.get_attribute("aria-label")


def test_what_is_drawn_is_what_was_recorded(page: Any) -> None:
    """The readout's highest value is that of `Recording.maps`, through packing, page and drawing."""
    run = elakit.generate(tiny_pipeline(), "a [red car] and a [blue bird]", seed=1, steps=6, progress=False)
    assert run.recording is not None
    maps = run.recording.maps("car", layers="up", size=8, steps=0).values[0, 0]
    text = page.locator(".elx-readout").first.inner_text()
    assert float(text.split(": ")[1].split(" ")[0]) == pytest.approx(float(maps.max()), rel=0.01)


def test_keys_do_what_the_foot_of_the_page_says(page: Any) -> None:
    from playwright.sync_api import expect

    assert "attention lies over the finished image" in page.locator(".elx-foot").inner_text()
    step, layer = page.locator(".elx-step"), page.get_by_label("Layers", exact=True)
    size = page.get_by_label("Resolution", exact=True)
    page.evaluate("document.activeElement.blur()")  # as when it was opened
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    settle(page)
    assert step.inner_text() == "step 2 of 6"
    before = layer.evaluate("(select) => select.selectedIndex")
    page.keyboard.press("ArrowUp")
    settle(page)
    assert layer.evaluate("(select) => select.selectedIndex") == before - 1
    assert chosen(size) == "4×4"  # the middle has no other
    page.keyboard.press("ArrowDown")
    page.keyboard.press("2")
    settle(page)
    assert chosen(size) == "8×8"
    assert page.locator(".elx-current").inner_text().startswith("bird")
    page.locator(".elx-chip", has_text="car").click()  # a button, which space would click again
    page.keyboard.press("Space")
    expect(step).to_have_text("step 6 of 6", timeout=20_000)
    expect(page.locator(".elx-play")).to_have_attribute("aria-label", "Play", timeout=20_000)
    assert page.locator(".elx-current").inner_text().startswith("car")


def test_the_table_has_room_for_four_runs(browser: Any, tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    runs = [
        elakit.generate(pipe, "a [red car] and a [blue bird]", seed=seed, steps=1, progress=False) for seed in range(4)
    ]
    page, said = open_page(browser, elakit.explore(*runs).to_html(tmp_path / "page.html"))
    table = page.locator(".elx-values")
    assert table.locator("thead th").count() == 5
    assert table.evaluate("(table) => table.scrollWidth - table.clientWidth") <= 0
    assert not said
    page.close()


def test_a_click_into_the_plot_goes_to_its_step(page: Any) -> None:
    box = page.locator(".elx-plot svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 12, box["y"] + 60)
    settle(page)
    assert page.locator(".elx-step").inner_text() == "step 6 of 6"


def test_a_row_of_the_table_picks_its_lines_out_of_the_plot(page: Any) -> None:
    seen = "[...document.querySelectorAll('.elx-line')].map((line) => Number(getComputedStyle(line).opacity))"
    assert page.evaluate(seen) == [1, 1, 1, 1]
    page.locator(".elx-values tbody tr", has_text="bird").hover()
    assert [value == 1 for value in page.evaluate(seen)] == [False, False, True, True]  # car, then bird, in two runs


def test_a_pointer_over_the_image_reads_a_location(page: Any) -> None:
    page.locator(".elx-stage").first.hover(position={"x": 20, "y": 20})
    settle(page)
    text = page.locator(".elx-readout").first.inner_text()
    assert re.fullmatch(r"car: \S+ at y 0, x 0, (outside all regions|in the region of (car|bird))", text)


def test_a_image_is_described_for_those_who_cannot_see_it(page: Any) -> None:
    label = page.locator(".elx-stage").nth(1).get_attribute("aria-label")
    assert "a red car and a blue bird" in label
    assert "attention of car" in label
    unnamed = page.evaluate(
        "[...document.querySelectorAll('.elx :is(button, select, input)')]"
        ".filter((each) => !(each.ariaLabel || each.textContent.trim() || each.closest('label'))).length"
    )
    assert unnamed == 0


def test_prompts_that_look_like_code_are_only_text_and_each_run_shows_its_own_words(
    browser: Any, tmp_path: Path
) -> None:
    evil = "a [</script><script>document.title='hacked'</script><img src=x onerror=document.title='hacked'>]"
    runs = [
        elakit.generate(tiny_pipeline(length=150), text, seed=1, steps=steps, progress=False)
        for text, steps in (("a [car] and a [bird]", 4), (evil, 2))
    ]
    page, said = open_page(browser, elakit.explore(*runs).to_html(tmp_path / "page.html"))
    settle(page)
    assert "hacked" not in page.title().split(" · ")[-1]
    assert page.locator("img[src=x]").count() == 0
    assert page.locator(".elx-prompt").nth(1).text_content().count("<img") == 1
    assert page.locator(".elx-none:not(:empty)").count() == 0
    assert not said
    page.close()
