"""The report: its content, that it loads nothing from the network, and that prompts are escaped."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page
from PIL import Image
from tiny import tiny_pipeline
from tiny_diagnosis import diagnosis

import elakit
from elakit.causes.findings import FAILURE_KINDS
from elakit.diagnosis import Diagnosis, report
from elakit.diagnosis.report import views
from elakit.diagnosis.report.page import _settings
from elakit.errors import OutputError
from elakit.judge.things import Thing
from elakit.prompt import parse

COMMAND = 'elakit diagnose "a [red car] and a [blue bird]" --seeds 0-3'
EVIL = "a [<script>alert(1)</script> car] & a [blue bird] </script><img src=http://evil.example/a.png onerror=alert(2)>"


@pytest.fixture(scope="module")
def found() -> Diagnosis:
    """One seed fixed, one broken, one right and one wrong."""
    return diagnosis(seeds=4, judged="nyynyynn")


@pytest.fixture(scope="module")
def page(found: Diagnosis) -> str:
    return report.render(found, COMMAND)


# --- content -------------------------------------------------------------------------------------------


def test_every_number_that_supports_a_cause_has_a_name_in_the_report() -> None:
    # a key such as "start_held" means nothing to a reader of the page
    causes = Path(elakit.causes.__file__).parent
    source = "".join((causes / name).read_text(encoding="utf-8") for name in ("indicators.py", "ranking.py"))
    found = set(re.findall(r'measure="(\w+)"', source))
    found |= {
        name
        for part in re.findall(r"(?:about|both|evidence|series) ?=\s*\{([^}]*)\}", source)
        for name in re.findall(r'"(\w+)":', part)
    }
    found |= set(re.findall(r'series\["(\w+)"\] =', source))
    assert len(found) > 12
    assert found <= set(views.EVIDENCE), found - set(views.EVIDENCE)


def test_every_kind_of_failure_that_a_cause_explains_has_a_name_in_the_report() -> None:
    assert set(views.EXPLAINED) == set(FAILURE_KINDS)


def test_the_summary_is_on_the_page(found: Diagnosis, page: str) -> None:
    said = report.summary(found)
    assert said[0] == "Without guidance, 2 of 4 images show everything the prompt asks for. With ELA, 2 of 4 do."
    assert said[1] == "ELA fixed 1 image (seed 0) and broke 1 image (seed 1)."
    text = Page(page).text
    assert all(sentence in text for sentence in said)
    assert "without guidance lies between 15% and 85% (95% interval)" in text
    assert "car: green instead of red" in text
    assert "bird: missing" in text


def test_all_images_are_on_the_page(found: Diagnosis, page: str) -> None:
    images = Page(page).all("img")
    assert len(images) == 2 * len(found.pairs) + 2
    assert all(image["alt"] and "a red car and a blue bird" in image["alt"] for image in images)
    generated = [run.image for pair in found.pairs for run in (pair.plain, pair.guided)]
    for element, expected in zip(images, generated, strict=False):
        shown = Image.open(io.BytesIO(base64.b64decode((element["src"] or "").split(",")[1])))
        np.testing.assert_array_equal(np.asarray(shown), np.asarray(expected.convert("RGB")))


def test_extra_copies_are_stated_and_do_not_make_an_image_wrong(found: Diagnosis) -> None:
    mask = np.zeros((4, 4), bool)
    things = tuple(Thing(noun=noun, mask=mask, score=1.0, color=None) for noun in ("car", "car", "car", "bird", "frog"))
    run, plain = found.pairs[2].plain, found.pairs[2].plain_verdict
    assert plain is not None
    verdict = replace(plain, things=things, nouns={"car": "car", "bird": "bird"})
    shown = views.image(run, verdict, "plain", 64)
    assert shown.findings[-1] == ("car: 2 extra copies", True)  # a frog is not an entity
    assert shown.success == verdict.success
    assert "car: 2 extra copies." in shown.alt


def test_the_table_holds_the_measures(found: Diagnosis, page: str) -> None:
    table = report.measure_table(found)
    run = found.pairs[2].guided
    frame = run.bleeding.overall()
    assert table["bleed", "guided"][2] == pytest.approx(frame[frame["measure"] == "bleed"]["value"].mean())
    text = Page(page).text
    assert all(f"{value:.3f}" in text for value in table.to_numpy().ravel())
    assert all(meaning in text for name, meaning in report.MEANINGS.items() if name in ("bleed", "attribute_margin"))


def test_every_measure_has_a_meaning(found: Diagnosis) -> None:
    assert set(found.pairs[0].plain.bleeding.to_frame()["measure"]) <= set(report.MEANINGS)


def test_the_page_contains_the_code_and_command_that_reproduce_it(found: Diagnosis, page: str) -> None:
    code = next(text for text in re.findall(r"<pre[^>]*>(.*?)</pre>", page, re.S) if "import elakit" in text)
    assert "seeds=[0, 1, 2, 3]" in code
    assert "steps=4" in code
    assert "method=&#39;ela&#39;" in code
    compile(code.replace("&#39;", "'").replace("&#34;", '"'), "report", "exec")
    again = re.search(r"&#39;(.*bird.*)&#39;", code)
    assert again is not None
    assert parse(again.group(1), tiny_pipeline()) == found.prompt
    assert COMMAND.replace('"', "&#34;") in page


def test_the_page_says_where_options_are_described(page: str) -> None:
    assert "In Python, help(elakit.guidance.ELA) describes the options of ELA." in Page(page).text


def test_options_of_the_method_are_in_the_code_and_the_settings() -> None:
    html = report.render(diagnosis(**{"anchor.step_size": 0.01}))
    assert "method=elakit.guidance.ELA(anchor=elakit.guidance.LatentStep(step_size=0.01))" in html
    assert "elakit diagnose" not in Page(html).text


def test_unjudged_images_are_not_called_right() -> None:
    found = diagnosis()
    assert "not judged" in report.summary(found)[0]
    text = Page(report.render(found)).text
    assert "✓" not in text
    assert "fixed" not in text


def test_a_single_entity_is_not_guided() -> None:
    found = diagnosis("a [red car]", judged="yy")
    assert any("ELA did not act in any step" in said for said in report.summary(found))
    assert "Regions with ELA" not in Page(report.render(found)).text


def test_images_that_need_no_guidance_are_named_as_the_reason() -> None:
    found = diagnosis("a [red car] and a [bird]", judged="yy", **{"anchor.needed": 2.0, "separate.step_size": 0.0})
    assert any(
        "ELA did not act in any step, because it found that the images need no guidance" in said
        for said in report.summary(found)
    )
    page = Page(report.render(found))
    assert "Regions found by ELA" not in page.text


def test_method_and_judge_are_introduced(page: str) -> None:
    text = Page(page).text
    assert text.index("ELA (Entity Localization and Anchoring)") < text.index("Without guidance, 2 of 4 images")
    assert text.count("The judge, a network that decides what each finished image shows,") == 1
    assert "The judge" not in Page(report.render(diagnosis())).text


def test_cards_say_where_the_method_did_not_act() -> None:
    found = diagnosis(seeds=2, judged="nnnn")
    idle = replace(found.pairs[1], guided=found.pairs[1].plain)
    mixed = replace(found, pairs=(found.pairs[0], idle))
    assert [views.card(mixed, pair).label for pair in mixed.pairs] == ["both wrong", "both wrong: ELA did not act"]
    assert any(said.startswith("ELA acted for 1 of 2 seeds;") for said in report.summary(mixed))
    assert not any("ELA acted for" in said for said in report.summary(found))
    assert "both wrong: ELA did not act" in Page(report.render(mixed)).text


def test_the_table_of_all_measures_names_the_owner_of_an_attribute(page: str) -> None:
    text = Page(page).text
    assert "red (of car)" in text
    assert "red (of car) · bird" in text
    assert "red · car" not in text


def test_a_step_that_needed_no_more_guidance_is_not_counted_as_guided() -> None:
    found = diagnosis()
    trace = found.pairs[0].guided.guidance
    assert trace is not None
    rows = [{"step": step, "moved": 0.1 * (step < 3), "guided": step < 3, "skipped": False} for step in (1, 2, 3)]
    trace.rows[:] = rows
    settings = dict(_settings(found))
    assert settings["steps in which ELA moved the latent"] == "2 to 3 (2 per image)"
    trace.rows[1]["moved"] = 0
    assert "steps in which ELA acted" in dict(_settings(found))


# --- isolation ---------------------------------------------------------------------------------


def test_nothing_is_fetched(page: str) -> None:
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "srcset", "poster", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    assert not parsed.all("link")
    assert not parsed.all("iframe")
    styles = "".join(re.findall(r"<style>(.*?)</style>", page, re.S))
    assert "url(" not in styles
    assert "@import" not in styles
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_figures_are_embedded_as_data(page: str) -> None:
    parsed = Page(page)
    figures = [a["data-figure"] for a in parsed.all("script") if "data-figure" in a]
    assert figures == [
        "attention", "regions-plain", "regions-guided", "anchors", "leakage", "tokens-plain", "tokens-guided", "steps",
    ]  # fmt: skip
    held = [json.loads(text) for text in parsed.scripts if text.startswith('{"data"')]
    assert len(held) == len(figures)
    assert sum(text.count("plotly.js v") for text in parsed.scripts) == 1


def test_a_prompt_cannot_break_out_of_its_page() -> None:
    html = report.render(diagnosis(EVIL, length=120), f"elakit diagnose '{EVIL}'")
    harmless = Page(report.render(diagnosis("a [car] and a [blue bird]", length=120), "elakit diagnose"))
    parsed = Page(html)
    assert [tag for tag, _ in parsed.elements if tag in ("script", "img")] == [
        tag for tag, _ in harmless.elements if tag in ("script", "img")
    ]
    assert not any("onerror" in attributes for _, attributes in parsed.elements)
    assert "<script>alert" not in html
    assert "<script>alert(1)</script>" in parsed.text  # as text, readable


# --- the file -----------------------------------------------------------------------------------------------


def test_the_file_is_written_whole(found: Diagnosis, page: str, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    assert report.write(found, target, COMMAND) == target
    assert target.read_text(encoding="utf-8") == page
    assert target.stat().st_size < 8e6
    assert list(tmp_path.iterdir()) == [target]


def test_a_failed_write_leaves_what_was_there(
    found: Diagnosis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match=r"report\.html cannot be written: No space left"):
        report.write(found, target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_paths_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"missing.*mkdir -p"):
        report.check_path(tmp_path / "missing" / "report.html")
    with pytest.raises(OutputError, match=r"it is a folder.*report\.html"):
        report.check_path(tmp_path)
    with pytest.raises(OutputError, match="path of the report is empty"):
        report.check_path("")
    assert report.check_path(tmp_path / "report.html") == tmp_path / "report.html"
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(OutputError, match="is not writable"):
        report.check_path(tmp_path / "report.html")
