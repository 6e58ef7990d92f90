"""Statements of reports and surveys that were once wrong, and files that once ended a survey."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab
import numpy as np
import pandas as pd
import pytest
from commands import surveys_in_this_process
from pages import Page
from PIL import Image
from tiny_diagnosis import diagnosis, judged_run, tiny_runs

import elakit
from elakit.causes import Cause, Failure, Findings
from elakit.diagnosis import Diagnosis, Pair, report, statements
from elakit.diagnosis.report import views
from elakit.diagnosis.report.figures import describe_regions
from elakit.diagnosis.report.page import acting_options
from elakit.diagnosis.survey import diagnose_many, plan_cases, write
from elakit.diagnosis.survey.cases import case_file
from elakit.errors import OutputError, SettingError
from elakit.guidance import Trace

# --- what the report says -----------------------------------------------------------------------------------


def trace(masks: list[list[int]], moved: list[float], **options: Any) -> Trace:
    """A trace of one entity on two locations: its region and the movement of the latent at each step."""
    found = Trace("ela", options, ("car",))
    for step, (mask, distance) in enumerate(zip(masks, moved, strict=True), start=2):
        found.add({"step": step, "moved": distance, "skipped": False}, np.array([[mask]], bool))
    return found


@pytest.mark.parametrize(
    ("masks", "moved", "options", "said"),
    [
        (
            [[1, 0]] * 3,
            [0, 0, 0],
            {},
            "determined once and are the same in all 3 steps that used them. Attention was",
        ),
        (
            [[1, 0]] * 3,
            [0.1] * 3,
            {"regions": [(0, 0, 1, 1)]},
            "given by hand. The latent was moved down the gradient",
        ),
        ([[1, 0], [0, 1], [1, 1]], [0.1] * 3, {}, "localized again in each step that used them. The latent was moved"),
        ([[1, 0], [0, 1], [0, 1]], [0.1, 0, 0.1], {}, "before step 4, and did not change from then on. The latent was"),
        ([[1, 0], [0, 1], [0, 1]], [0.1, 0, 0.1], {}, "in 2 of these 3 steps"),
    ],
)
def test_the_description_of_the_method_is_read_from_what_it_did(
    masks: list[list[int]], moved: list[float], options: dict[str, Any], said: str
) -> None:
    assert said in describe_regions(trace(masks, moved, **options))


def test_regions_of_a_step_that_needed_no_guidance_are_not_said_to_be_used() -> None:
    used = trace([[1, 0], [0, 1]], [0.1, 0.1])
    used.add({"step": 4, "moved": 0, "skipped": False, "guided": False}, np.array([[[1, 1]]], bool))
    said = describe_regions(used)
    assert "each of these 2 steps" in said
    assert said.endswith("At step 5, the image needed no more guidance; the regions shown there had no effect.")


def test_steps_that_separate_are_not_said_to_use_regions() -> None:
    used = trace([[1, 0]], [0.1])  # step 3 of 3
    for step in (0, 1):
        used.rows.insert(step, {"step": step, "moved": 0.05, "skipped": False, "guided": True, "contrast": 1.1})
    assert describe_regions(used).startswith(
        "In the first 2 steps, the entities' maps were moved apart, without regions."
    )
    used.rows[-1] |= {"guided": False, "moved": 0}
    assert describe_regions(used).endswith("need no further guidance, so these regions had no effect.")


def test_screen_readers_are_told_which_remedy_made_an_image() -> None:
    run = judged_run(tiny_runs()[0], right=False)
    shown = views.image(run, run.verdict, name="seed 0", size=32, what="CONFORM")
    assert shown.alt.startswith(f"Image of “{run.prompt.text}”, seed {run.seed}, CONFORM.")


def test_the_report_describes_the_run_and_not_another_method() -> None:
    found = diagnosis(seeds=1, judged="ny")
    text = Page(report.render(found)).text
    used = found.pairs[0].guided.guidance
    assert used is not None
    assert used.regions is not None
    assert describe_regions(used) in text
    moved = any(row["moved"] > 0 for row in used.rows)
    assert ("The latent was moved" in text) == moved


def test_only_options_that_acted_are_listed() -> None:
    found = diagnosis("a [red car]", judged="yy")  # ELA does nothing for a single entity
    assert acting_options(found) == []
    assert "ELA: " not in Page(report.render(found)).text
    guided = diagnosis(seeds=1)
    listed = dict(acting_options(guided))
    assert listed
    assert not {"None", "0", "0.0", "False"} & set(listed.values())
    text = Page(report.render(guided)).text
    assert all(f"ELA: {name}" in text for name in listed)


def test_changed_options_are_listed_and_those_without_effect_are_not() -> None:
    names = dict(acting_options(diagnosis()))
    assert {"separate.step_size", "separate.temperature", "anchor.step_size"} <= set(names)
    off = dict(acting_options(diagnosis(**{"separate.step_size": 0.0})))
    assert off["separate.step_size"] == "0.0"
    assert "separate.temperature" not in off
    given = dict(acting_options(diagnosis(regions=[(0, 0, 0.5, 1), (0.5, 0, 1, 1)])))
    assert "regions" in given
    assert not any(name.startswith(("localize", "separate", "anchor.needed", "anchor.enough")) for name in given)


def explained(*causes: Cause, failures: tuple[Failure, ...]) -> Diagnosis:
    runs = tiny_runs()
    findings = Findings(runs[0].prompt, (0, 1), True, failures, causes)
    pairs = tuple(
        Pair(plain=run, guided=run, plain_verdict=run.verdict, guided_verdict=run.verdict)
        for run in (judged_run(run, False) for run in runs)
    )
    return Diagnosis(prompt=runs[0].prompt, method="ela", options={}, pairs=pairs, seconds=1.0, findings=findings)


MISSING = Failure("missing", "bird", seeds=(0, 1), of=2)
LOST = Failure("lost attribute", "car", token="red", seeds=(1,), of=2)


def test_causes_that_are_shown_explain_a_failure_that_is_shown() -> None:
    fitting = Cause("captured", "bird", "car", "car", sentence="The car takes the bird's place.", explains=("missing",))
    other = Cause("text states alike", "car", "bird", sentence="Alike.", explains=("duplicated",))
    found = explained(other, fitting, failures=(MISSING, LOST))
    assert found.causes == (fitting,)
    said = statements(found)["causes"]
    unexplained = "In 1 of 2 images, the car is not red; no cause was found."
    assert said == ["The car takes the bird's place.", unexplained]
    text = Page(report.render(found)).text
    assert "Alike." not in text
    assert "The car takes the bird's place." in text
    assert unexplained in text
    assert "No cause was found" not in text


def test_a_failure_without_a_cause_says_so() -> None:
    other = Cause("text states alike", "car", "bird", sentence="Alike.", explains=("duplicated",))
    found = explained(other, failures=(MISSING,))
    assert statements(found)["causes"] == ["No cause was found."]
    text = Page(report.render(found)).text
    assert "No cause was found." in text
    assert "Alike." not in text


def test_images_that_were_not_judged_have_no_missing_entities() -> None:
    runs = tiny_runs()
    suspicion = Failure("missing", "bird", seeds=(0, 1), of=2, judged=False)
    sign = Cause("token ignored", "bird", sentence="The attention to “bird” is low.", explains=("missing",))
    findings = Findings(runs[0].prompt, (0, 1), False, (suspicion,), (sign,))
    pairs = tuple(Pair(plain=run, guided=run) for run in runs)
    found = Diagnosis(prompt=runs[0].prompt, method="ela", options={}, pairs=pairs, seconds=1.0, findings=findings)
    assert statements(found)["failures"] == []
    text = Page(report.render(found)).text
    assert "missing" not in text
    assert "Signs of bleeding in the attention" in text
    assert "The attention to “bird” is low." in text
    assert "not judged" in text


def test_images_of_the_safety_checker_are_not_judged() -> None:
    found = diagnosis(seeds=1)
    found.pairs[0].plain.nsfw = True
    said = " ".join(statements(found)["images"])
    assert "safety checker replaced 1 of 2 images" in said
    assert "picture-world" not in said


def test_a_black_image_is_named_as_the_reason_why_nothing_was_judged() -> None:
    found = diagnosis(seeds=1)
    found.pairs[0].plain.image = Image.new("RGB", found.pairs[0].plain.image.size)
    assert statements(found)["images"][0].startswith("1 of 2 images is entirely black, so the images were not judged.")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with lab.browse() as browser:
        yield browser


class TestInABrowser:
    pytestmark = lab.MARKS

    def test_the_table_of_measures_fits_a_printed_page(self, browser: Any, tmp_path: Path) -> None:
        path = tmp_path / "report.html"
        html = report.render(diagnosis(seeds=2, judged="nyyn"))
        path.write_text(
            re.sub(r"(?s)<script.*?</script>", "", html), encoding="utf-8"
        )  # figures are of no interest here
        page = browser.new_page(viewport={"width": 718, "height": 1000})  # A4 with margins of 1 cm at 96 dpi
        page.emulate_media(media="print")
        page.goto(path.as_uri())
        right = page.eval_on_selector(".measures", "table => table.getBoundingClientRect().right")
        assert right <= 718
        page.close()


# --- surveys ------------------------------------------------------------------------------------------------

PROMPTS = ["a [bear] and a [blue clock]", "a [cat] and a [frog]"]
SETTINGS: dict[str, Any] = {"seeds": [0], "steps": 1, "remedies": False}


@pytest.fixture(scope="module")
def in_process() -> Iterator[None]:
    """Surveys are generated in this process."""
    with surveys_in_this_process():
        yield


@pytest.fixture(scope="module")
def finished(in_process: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished survey."""
    folder = tmp_path_factory.mktemp("survey") / "out"
    assert diagnose_many(PROMPTS, folder, **SETTINGS).diagnosed == 2
    return folder


@pytest.fixture
def survey(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished survey, which a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_damaged_or_deleted_case_is_named_and_diagnosed_again(survey: Path) -> None:
    first, second = (case_file(survey, case.key) for case in plan_cases(PROMPTS, [0], steps=1, remedies=False))
    content = first.read_text()
    first.write_text(content[:200])
    page = Page(write(survey, PROMPTS).read_text())
    assert f"cases/{first.name}" in page.text
    assert "Files that cannot be read" in page.text
    second.unlink()
    again = diagnose_many(PROMPTS, survey, **SETTINGS)
    assert (again.earlier, again.diagnosed, again.failed) == (0, 2, {})
    page = Page((survey / "index.html").read_text())
    assert "Not diagnosed yet" not in page.text
    assert "Files that cannot be read" not in page.text
    assert diagnose_many(PROMPTS, survey, **SETTINGS).earlier == 2
    # valid JSON of something else
    first.write_text(json.dumps(["not", "a", "case"]))
    (survey / "failed").mkdir(exist_ok=True)
    (survey / "failed" / "note.json").write_text("{")
    page = Page(write(survey, PROMPTS).read_text())
    assert f"cases/{first.name}" in page.text
    assert "failed/note.json" in page.text
    assert diagnose_many(PROMPTS, survey, **SETTINGS).diagnosed == 1


def test_an_edited_case_cannot_put_scripts_into_the_summary(survey: Path) -> None:
    for case, page in zip(
        plan_cases(PROMPTS, [0], steps=1, remedies=False), ("javascript:alert(1)", "../x"), strict=True
    ):
        path = case_file(survey, case.key)
        edited = json.loads(path.read_text()) | {"page": page}
        edited["images"] = {"plain": "javascript:alert(2)", "best": "http://evil.example/a.png"}
        path.write_text(json.dumps(edited))
    page = Page(write(survey, PROMPTS).read_text())
    assert page.all("a") == []
    assert page.all("img") == []
    assert all(
        prompt.replace("[", "").replace("]", "") in page.text.replace("[", "").replace("]", "") for prompt in PROMPTS
    )


def test_no_cell_of_the_summary_is_a_formula(survey: Path) -> None:
    for case, given in zip(plan_cases(PROMPTS, [0], steps=1, remedies=False), ("=HYPERLINK(1)", "@sum"), strict=True):
        path = case_file(survey, case.key)
        path.write_text(json.dumps(json.loads(path.read_text()) | {"given": given}))
    write(survey, PROMPTS)
    for name in ("summary.csv", "remedies.csv"):
        assert set(pd.read_csv(survey / name)["prompt"]) == {"'=HYPERLINK(1)", "'@sum"}
    assert set(pd.read_parquet(survey / "summary.parquet")["prompt"]) == {"=HYPERLINK(1)", "@sum"}


def test_a_single_string_and_a_bad_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="single string"):
        diagnose_many("a [cat]", tmp_path / "out")
    with pytest.raises(SettingError, match="seeds"):
        plan_cases(["a [cat]"], [10**20])
    for seeds in (2.5, "12"):
        with pytest.raises(SettingError, match=r"seeds=.*must be a list of seeds"):
            plan_cases(["a [cat]"], seeds)
    for folder in ("x" * 300, "\udcff"):
        with pytest.raises(OutputError, match="cannot be used"):
            diagnose_many(["a [cat]"], folder)
    with pytest.raises(SettingError, match="seeds"):
        elakit.diagnose(elakit.load("picture-world"), "a [cat]", seeds=[2**64])
