"""Prompts as new users type them: each gives a page that tells something, or an error that says what to do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lab
import pytest
from pages import Page
from tiny import tiny_pipeline

import elakit
from elakit.diagnosis import report
from elakit.errors import PromptError

SCRIPT = "<script>window.hacked = 1; document.title = 'hacked'</script>"

# fmt: off
PAGES = {
    "one word": "cat",
    "forty words": "a very large and extremely old brown bear that is sitting quietly next to a small bright blue "
                   "clock on the top of a wooden table in the middle of a dark green forest under a pale pink sky at "
                   "the end of a warm and rainy day",
    "another language, in brackets": "une [voiture rouge] et un [oiseau bleu]",
    "another script, in brackets": "一只 [猫] 和一只 [青蛙]",
    "emoji": "a [cat 🐱] and a [🐸 frog] 🎉",
    "HTML": "a <b>red</b> [car] & a [bird] <img src=x onerror=\"window.hacked=1\">",
    "a script": f"a [cat] and a [frog] {SCRIPT}",
    "a script in an entity": f"a [{SCRIPT} cat] and a [frog]",
    "breaking out of a script": "a [cat] and a [frog] </script></style></title>--> <svg onload=window.hacked=1>",
    "templates": "a [{{ 7 * 7 }} cat] and a [%{x} frog] ${window.hacked=1} {% raw %}",
    "brackets": "a [red car] and a [blue bird]",
    "the same entity twice": "a [red cat] and a [red cat]",
    "numbers": "two [cats] and 3 [red dogs]",
    "a background": "a [cat] with a [white background]",
    "a negation": "a [cat] and no [dog]",
    "quotes": "a [cat] called \"Tom's\" and a 'blue' [frog]",
    "a new line": "a [cat]\nand a\t[blue   frog]",
    "a very long word": "a [" + "pneumono" * 5 + "] and a [cat]",
    "backslashes and TeX": "a [cat\\] and a [frog] $\\alpha$ \\u003cscript>",
    "many entities": ", ".join(f"a [{noun}]" for noun in ("cat", "dog", "bear", "car", "clock")),
}
# Prompts with characters that mean something in HTML, in scripts or in plotly's texts, and one with many figures.
HOSTILE = (
    "HTML", "a script", "a script in an entity", "breaking out of a script", "templates", "quotes",
    "backslashes and TeX", "many entities",
)
OF_PICTURE_WORLD = {"one word", "brackets", "the same entity twice", "a negation"}
ERRORS = {
    "empty": ("", "empty"),
    "only spaces": ("  \t ", "empty"),
    "no noun": ("under and over", "No entity found.*brackets"),
    "unbalanced brackets": ("a [red car and a [bird]", "opens before the bracket at"),
    "a closing bracket alone": ("a cat] and a frog", "no opening bracket"),
    "empty brackets": ("a [] and a [frog]", "is empty"),
    "too long": ("a cat and a frog " * 40, "tokens, but the text encoder takes.*Shorten"),
}
# fmt: on


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the page of an odd prompt once: of picture-world, or of a tiny model that takes more than 22 tokens."""
    world, roomy, folder = elakit.load("picture-world"), tiny_pipeline(length=400), tmp_path_factory.mktemp("pages")

    @cache
    def write(name: str) -> Path:
        prompt, pipe = PAGES[name], world if name in OF_PICTURE_WORLD else roomy
        remedies = ["swapped", "next-to"] if name in HOSTILE else False
        found = elakit.diagnose(pipe, prompt, seeds=[0], steps=2, remedies=remedies)
        json.dumps(found.to_dict(), allow_nan=False)
        return report.write(found, folder / f"{list(PAGES).index(name)}.html", f"elakit diagnose '{prompt}'")

    return write


@pytest.mark.parametrize("name", PAGES)
def test_it_gives_a_page_that_shows_the_prompt(page_of: Callable[[str], Path], name: str) -> None:
    html = page_of(name).read_text(encoding="utf-8")
    page = Page(html)
    plain = " ".join(PAGES[name].replace("[", "").replace("]", "").split())
    assert plain in page.text
    assert ("Remedies" in page.text) == (name in HOSTILE)
    assert len(page.all("img")) >= 4
    # none of the prompt has become an element or an attribute
    assert {tag for tag, _ in page.elements}.isdisjoint({"object", "iframe", "raw"})
    assert html.count("<svg onload") == html.count("<b>red") == html.count("<img src=x") == 0
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    assert all((image["src"] or "").startswith("data:image/") for image in page.all("img"))
    assert not any(text.startswith("window.hacked") for text in page.scripts)


@pytest.mark.parametrize("name", ERRORS)
def test_or_an_error_that_says_what_to_do(name: str) -> None:
    prompt, said = ERRORS[name]
    with pytest.raises(PromptError, match=f"(?s){said}"):
        elakit.diagnose(elakit.load("picture-world"), prompt, seeds=[0], steps=2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with lab.browse() as browser:
        yield browser


class TestInABrowser:
    pytestmark = lab.MARKS

    @pytest.mark.parametrize("name", HOSTILE)
    def test_nothing_in_a_prompt_runs_in_its_page(
        self, page_of: Callable[[str], Path], browser: Any, name: str
    ) -> None:
        page = browser.new_page()
        page.set_default_timeout(120_000)  # milliseconds, for a busy machine
        said: list[str] = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto(page_of(name).as_uri())
        page.wait_for_function("document.querySelectorAll('.plot .main-svg').length > 3")
        assert page.evaluate("window.hacked") is None
        assert page.title().endswith("· elakit")
        assert not said
        page.close()
