"""Diagnosis of a prompt: failures, causes, remedies and their ranking, resuming, and reproduction."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from commands import call
from PIL import Image
from tiny import tiny_pipeline

import elakit
from elakit.causes import Cause, Failure, Findings
from elakit.diagnosis import DEFAULT, Diagnosis, Pair, Remedy, RemedyResult, ranked, report, summary
from elakit.diagnosis.cli import diagnose as diagnose_command
from elakit.diagnosis.commands import code, command, reproduce
from elakit.diagnosis.report import views
from elakit.diagnosis.trials import CANDIDATES, check, side_by_side
from elakit.errors import OutputError, SettingError
from elakit.generation import generate
from elakit.guidance import ELA, AttendAndExcite, SynGen
from elakit.judge import Verdict
from elakit.prediction import FEATURES, OUTCOMES, SHARES, Predictor
from elakit.run import Run

PAIR = "a [red car] and a [blue bird]"
WORLD = "a [bear] and a [blue clock]"


@pytest.fixture(scope="module")
def world() -> Any:
    return elakit.load("picture-world")


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return generate(tiny_pipeline(), PAIR, seed=[0, 1, 2, 3], steps=2, progress=False)


def judged(run: Run, right: bool) -> Run:
    """A copy of a run with a verdict that all entities, or none, are present."""
    labels = tuple(entity.label for entity in run.prompt.entities)
    asked = dict.fromkeys(labels)
    verdict = Verdict(labels, dict.fromkeys(labels, right), asked, asked, np.zeros((len(labels), 4, 4), bool))
    copy = replace(run)
    copy.__dict__["verdict"] = verdict
    return copy


def tried(runs: list[Run], before: str, after: str, cost: float = 1.0, name: str = "ela") -> RemedyResult:
    """A remedy and plain images, of which "y" are right and "n" wrong."""
    plain, own = (
        tuple(judged(run, mark == "y") for run, mark in zip(runs, marks, strict=False)) for marks in (before, after)
    )
    return RemedyResult(Remedy(name, "guidance", "", runs[0].prompt, name), plain, own, cost, cost)


# --- what a remedy is worth ---------------------------------------------------------------------------------


def test_a_remedy_is_compared_with_the_plain_images(runs: list[Run]) -> None:
    found = tried(runs, "nnyy", "ynny")
    assert (found.right, found.rate, found.fixed, found.broken, found.broken_rate) == (2, 0.5, (0,), (2,), 0.5)
    low, high = found.interval
    # Wilson's interval solves (p - share)^2 = z^2 p (1 - p) / n
    for end in (low, high):
        assert (end - 0.5) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 4, rel=1e-5)
    assert not found.helps  # as many broken as fixed
    assert tried(runs, "nnyy", "ynyy").helps


def test_remedies_are_ranked_by_images_right_then_broken_then_time(runs: list[Run]) -> None:
    slow, harmful, fast, better = (
        tried(runs, "nnyy", "ynyn", 1, "harmful"),
        tried(runs, "nnyy", "nnyy", 3, "slow"),
        tried(runs, "nnyy", "nnyy", 2, "fast"),
        tried(runs, "nnyy", "ynyy", 9, "better"),
    )
    failed = replace(fast, runs=(), status="failed", why="it broke")
    skipped = replace(fast, runs=(), status="not tried")
    order = ranked([skipped, failed, slow, harmful, fast, better])
    assert order == (better, fast, harmful, slow, failed, skipped)
    assert math.isnan(failed.rate)
    assert failed.interval == (0, 1)


def test_without_a_judge_remedies_are_ranked_by_bleeding(runs: list[Run]) -> None:
    guided = generate(tiny_pipeline(), PAIR, seed=[0, 1, 2, 3], steps=2, guidance=ELA(), progress=False)
    ela = RemedyResult(Remedy("ela", "guidance", "", runs[0].prompt, "ela"), tuple(runs), tuple(guided), 1, 1)
    none = RemedyResult(Remedy("swapped", "wording", "", runs[0].prompt), tuple(runs), tuple(runs), 1, 1)
    order = ranked([none, ela])
    assert order == tuple(sorted((none, ela), key=lambda one: one.bleed))
    pairs = tuple(Pair(a, b) for a, b in zip(runs, guided, strict=True))
    said = " ".join(summary(Diagnosis(runs[0].prompt, "ela", {}, pairs, 1.0, None, order)))
    assert "not judged" in said
    assert "ranked by bleeding" in said
    assert "does not imply a right image" in said
    assert ela.rate != ela.rate  # not a number


def test_the_best_remedy_is_named_with_numbers_and_failed_ones_are_reported(runs: list[Run]) -> None:
    best = tried(runs, "nnyy", "ynyy", 1.5)
    other = replace(tried(runs, "nnyy", "nnyy", 1, "syngen"), runs=(), status="failed", why="no memory")
    found = diagnosis_of(best, [best, other])
    assert found.best is best
    fix = found.to_dict()["statements"]["remedy"]
    assert fix[0] == (
        "The only remedy that could be tried is ELA: 3 of 4 images are right (95% interval 30% to 95%) instead of 2 of "
        "4, at 1.5 times the generation time."
    )
    assert fix[1] == "SynGen failed: no memory"


def diagnosis_of(best: RemedyResult, remedies: list[RemedyResult], findings: Findings | None = None) -> Diagnosis:
    pairs = tuple(Pair(a, b, a.verdict, b.verdict) for a, b in zip(best.plain, best.runs, strict=True))
    return Diagnosis(best.remedy.prompt, "ela", {}, pairs, 1.0, findings, ranked(remedies))


def test_a_prompt_without_failures_needs_no_remedy(runs: list[Run]) -> None:
    found = diagnosis_of(tried(runs, "yyyy", "yyyy"), [tried(runs, "yyyy", "yyyy")])
    assert found.best is None
    assert any("All images are right without guidance" in sentence for sentence in summary(found))


def test_failures_and_causes_are_stated(runs: list[Run]) -> None:
    findings = Findings(
        runs[0].prompt, (0, 1, 2, 3), True,
        (Failure("missing", "bird", "car", "car", (0, 1), of=4, step=1, layers=("up_blocks.1.attentions.0.attn2",)),),
        (Cause("captured", "bird", "car", sentence="The car takes the bird's place.", explains=("missing",)),),
    )  # fmt: skip
    best = tried(runs, "nnyy", "ynyy")
    found_dict = diagnosis_of(best, [best], findings).to_dict()["statements"]
    assert found_dict["failures"] == [
        'In 2 of 4 images, the bird is missing, and the attention in its region goes to "car" '
        "(95% interval 15% to 85%; first visible in the attention at step 2 of 2; earliest in up block 1, "
        "attention 0)."
    ]
    assert found_dict["causes"] == ["The car takes the bird's place."]


def test_the_help_names_the_remedies_that_all_stands_for() -> None:
    (option,) = get_type_hints(diagnose_command, include_extras=True)["remedies"].__metadata__
    assert len(DEFAULT) == 6
    listed = option.help.partition("all stands for six: ")[2].partition(". ")[0]
    assert all(name in listed for name in DEFAULT)


def test_a_cause_in_the_attention_is_not_located_in_the_text_encoder(runs: list[Run]) -> None:
    # "captured" is visible at no step for long enough, "token ignored" comes from the norm of the text embedding
    found = (
        Cause("captured", "bird", "car", "car", explains=("missing",)),
        Cause("token ignored", "bird", token="bird", explains=("missing",), evidence={"length": 0.1}),
    )
    failures = (Failure("missing", "bird", seeds=(0, 1), of=4),)
    best = tried(runs, "nnyy", "ynyy")
    shown = diagnosis_of(best, [best], Findings(runs[0].prompt, (0, 1, 2, 3), True, failures, found))
    assert ["in the text encoder" in reason.facts for reason in views.causes(shown)] == [False, True]


# --- what is tried ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(world: Any) -> tuple[Diagnosis, list[tuple[int, int, str]]]:
    """A diagnosis with all remedies, and its progress; two steps generate nothing that is right."""
    calls: list[tuple[int, int, str]] = []
    found = elakit.diagnose(
        world, WORLD, seeds=[0], steps=2, remedies=True, on_progress=lambda *progress: calls.append(progress)
    )
    return found, calls


def test_all_remedies_are_tried_if_an_image_is_wrong(everything: tuple[Diagnosis, list[tuple[int, int, str]]]) -> None:
    found, calls = everything
    assert {one.remedy.name for one in found.remedies} == {"ela", *DEFAULT}
    assert all(one.status == "tried" and len(one.runs) == 1 for one in found.remedies)
    by_name = {one.remedy.name: one for one in found.remedies}
    assert by_name["next-to"].remedy.prompt.text == "a bear next to a blue clock"
    assert by_name["regions"].runs[0].guidance is not None
    assert by_name["regions"].remedy.options["regions"] == side_by_side(2)
    # progress never goes back, and ends where it said it would
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert calls[-1][:2] == (1 + len(by_name) + CANDIDATES, 1 + len(by_name) + CANDIDATES)
    assert list(found.remedies_frame().index) == [one.remedy.name for one in found.remedies]
    json.dumps(found.to_dict(), allow_nan=False)


def test_remedies_for_several_entities_are_not_tried_for_one(world: Any) -> None:
    found = elakit.diagnose(world, "a [bear]", seeds=[0], steps=2, remedies=["swapped", "next-to", "regions"])
    states = {one.remedy.name: (one.status, one.why) for one in found.remedies if one.remedy.name != "ela"}
    assert set(states.values()) <= {("not tried", "the prompt names only one entity.")}


def test_a_remedy_that_raises_does_not_stop_the_others(world: Any) -> None:
    class Broken(ELA):
        name = "broken"

        def loss(self, *_: Any) -> Any:
            raise RuntimeError("out of memory")

    found = elakit.diagnose(world, WORLD, seeds=[0], steps=2, remedies=[Broken(), "swapped"])
    by_name = {one.remedy.name: one for one in found.remedies}
    assert (by_name["broken"].status, by_name["broken"].why) == ("failed", "RuntimeError: out of memory")
    assert by_name["swapped"].status == "tried"
    assert "broken failed: RuntimeError: out of memory" in summary(found)


def test_stored_images_of_a_remedy_become_images_of_the_method_only_with_all_words(world: Any, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"seeds": [0], "steps": 2, "folder": tmp_path / "kept"}
    before = elakit.diagnose(world, WORLD, remedies=["regional-attention"], **settings)
    found = elakit.diagnose(world, WORLD, method="regional-attention", **settings)
    (remedy,) = (one for one in before.remedies if one.remedy.name == "regional-attention")
    assert "and" not in remedy.runs[0].recording.tokens
    plain, guided = found.pairs[0].plain, found.pairs[0].guided
    assert guided.recording.tokens == plain.recording.tokens
    np.testing.assert_array_equal(np.asarray(guided.image), np.asarray(remedy.runs[0].image))


@pytest.mark.parametrize("wrong", [3, elakit.ELA])
def test_what_is_no_method_is_refused_before_anything_is_generated(world: Any, wrong: Any) -> None:
    with pytest.raises(SettingError, match=r"method=.* is not a guidance method; pass an instance"):
        elakit.diagnose(world, WORLD, method=wrong)
    with pytest.raises(SettingError, match=r"remedy=.* is not a guidance method; pass an instance"):
        elakit.diagnose(world, WORLD, remedies=[wrong])


def test_a_failing_search_for_causes_is_reported_and_affects_nothing_else(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("no text encoder")

    monkeypatch.setattr("elakit.causes.find", broken)
    found = elakit.diagnose(world, WORLD, seeds=[0], steps=2)
    assert found.findings is None
    assert found.problems == ("The search for causes failed: ValueError: no text encoder",)


def test_another_seed_is_the_one_least_likely_to_fail(world: Any) -> None:
    weights = np.zeros((len(SHARES), len(OUTCOMES), len(FEATURES)))
    weights[:, 0, FEATURES.index("bleed_last")] = 30  # the more an entity bleeds, the likelier the failure
    predictor = Predictor(weights, np.full(weights.shape[:2], -15.0), about={"model": ["picture-world"]})
    found = elakit.diagnose(world, WORLD, seeds=[5, 7], steps=4, remedies=["another-seed"], predictor=predictor)
    other = next(one for one in found.remedies if one.remedy.name == "another-seed")
    assert other.chosen_by == "predicted probability of failure"
    assert [one["seed"] for one in other.candidates] == list(range(8, 8 + 2 * CANDIDATES))
    for group, run in zip((other.candidates[:CANDIDATES], other.candidates[CANDIDATES:]), other.runs, strict=True):
        assert run.seed == min(group, key=lambda one: one["score"])["seed"]
        assert "stopped" not in run.settings
    # the score is what the predictor says of the run after 30% of its steps
    first = elakit.generate(world, WORLD, seed=8, steps=4, progress=False)
    expected = float(predictor.predict(first).loc[0.3, "failure"])
    assert other.candidates[0]["score"] == pytest.approx(expected, abs=1e-3)
    assert set(found.predicted) == {5, 7}


def test_a_predictor_of_another_model_is_not_trusted(world: Any) -> None:
    weights = np.zeros((len(SHARES), len(OUTCOMES), len(FEATURES)))
    predictor = Predictor(weights, np.zeros(weights.shape[:2]), about={"model": ["another"]})
    found = elakit.diagnose(world, WORLD, seeds=[0], steps=2, remedies=["another-seed"], predictor=predictor)
    other = next(one for one in found.remedies if one.remedy.name == "another-seed")
    assert other.chosen_by == "bleeding"
    assert found.predicted == {}


@pytest.mark.parametrize(
    ("remedies", "said"), [(["magic"], "no remedy 'magic'.*swapped"), (["boxdiff"], "boxdiff needs regions")]
)
def test_unknown_remedies_are_refused_before_any_work(world: Any, remedies: list[str], said: str) -> None:
    calls: list[Any] = []
    with pytest.raises(SettingError, match=said):
        elakit.diagnose(world, WORLD, remedies=remedies, on_progress=lambda *progress: calls.append(progress))
    assert not calls


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 12])
def test_boxes_of_entities_are_disjoint(count: int) -> None:
    boxes = side_by_side(count)
    assert len(set(boxes)) == count
    cells = np.zeros((840, 840), int)
    for left, top, right, bottom in boxes:
        cells[round(top * 840) : round(bottom * 840), round(left * 840) : round(right * 840)] += 1
    assert cells.max() == 1


# --- what is kept -------------------------------------------------------------------------------------------


def counting(monkeypatch: pytest.MonkeyPatch, fail_after: int = 10**6) -> list[int]:
    """Seeds that are generated; an interrupt follows after `fail_after` of them."""
    seen: list[int] = []
    original: Callable[..., Any] = generate

    def count(pipe: Any, prompt: Any, *, seed: list[int], **options: Any) -> Any:
        if len(seen) + len(seed) > fail_after:
            raise KeyboardInterrupt
        seen.extend(seed)
        return original(pipe, prompt, seed=seed, **options)

    monkeypatch.setattr("elakit.diagnosis.generation.generate", count)
    return seen


def test_an_interrupted_diagnosis_reuses_its_runs(
    world: Any,
    everything: tuple[Diagnosis, list[tuple[int, int, str]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {"seeds": [0], "steps": 2, "remedies": ["swapped", "regions"]}
    whole, _ = everything
    with monkeypatch.context() as patch:
        first = counting(patch, fail_after=2)
        with pytest.raises(KeyboardInterrupt):
            elakit.diagnose(world, WORLD, folder=tmp_path / "kept", **settings)
    assert len(first) == 2
    with pytest.raises(OutputError, match="contains no finished diagnosis"):
        elakit.open_diagnosis(tmp_path / "kept")
    with monkeypatch.context() as patch:
        second = counting(patch)
        found = elakit.diagnose(world, WORLD, folder=tmp_path / "kept", **settings)
    assert len(second) == 2  # swapped and regions; plain and ELA were there
    for one, other in ((whole, found), (whole, elakit.open_diagnosis(tmp_path / "kept"))):
        for pair, kept in zip(one.pairs, other.pairs, strict=True):
            np.testing.assert_array_equal(np.asarray(pair.guided.image), np.asarray(kept.guided.image))
        assert one.findings == other.findings
    with monkeypatch.context() as patch:
        third = counting(patch)
        elakit.diagnose(world, WORLD, folder=tmp_path / "kept", **settings)
    assert not third


def test_a_diagnosis_can_be_opened_again(
    everything: tuple[Diagnosis, list[tuple[int, int, str]]], tmp_path: Path
) -> None:
    found, _ = everything
    again = elakit.open_diagnosis(found.save(tmp_path / "kept"))
    assert again.to_dict() == found.to_dict()
    assert report.render(again) == report.render(found)
    table = json.loads((tmp_path / "kept" / "diagnosis.json").read_text())
    assert table["prompt"]["text"] == "a bear and a blue clock"


def test_a_kind_of_failure_with_an_earlier_name_is_read(runs: list[Run], tmp_path: Path) -> None:
    prompt, best = runs[0].prompt, tried(runs, "nnnn", "yyyy")
    findings = Findings(
        prompt, (0, 1, 2, 3), True, (Failure("duplicated", "car", seeds=(0,), of=4),),
        (Cause("captured", "car", "bird", explains=("missing", "duplicated")),),
    )  # fmt: skip
    folder = diagnosis_of(best, [best], findings).save(tmp_path / "kept")
    path = folder / "diagnosis.json"
    path.write_text(path.read_text().replace('"duplicated"', '"spill"'))
    assert elakit.open_diagnosis(folder).findings == findings


def test_a_folder_with_other_files_is_refused(world: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="files that do not belong to a diagnosis"):
        elakit.diagnose(world, WORLD, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- how to do it again -------------------------------------------------------------------------------------


def test_the_code_and_the_command_reproduce_the_image(world: Any, tmp_path: Path, monkeypatch: Any) -> None:
    found = elakit.diagnose(world, WORLD, seeds=[3], steps=2, remedies=["regions", "swapped", "attend-and-excite"])
    monkeypatch.chdir(tmp_path)
    for one in found.remedies:
        found_dict = reproduce(one)
        exec(compile(found_dict["code"], "code", "exec"), {})
        words = found_dict["command"].split("--out")[0]
        assert call(monkeypatch, *shlex.split(words)[1:], "--out", one.remedy.name) == 0
        image = np.asarray(one.runs[0].image)
        np.testing.assert_array_equal(np.asarray(Image.open("image.png")), image)
        np.testing.assert_array_equal(np.asarray(elakit.open_run(one.remedy.name).image), image)


def test_a_diagnosis_contains_the_code_and_command_that_reproduce_it(world: Any) -> None:
    found = elakit.diagnose(world, WORLD, seeds=range(2), steps=1, remedies=["swapped"])
    assert command(found) == ("elakit diagnose 'a [bear] and a [blue clock]' --seeds 0,1 --remedies swapped --steps 1")
    assert "remedies=['swapped']" in code(found)
    assert "--seeds 2,5 " in command(elakit.diagnose(world, WORLD, seeds=[2, 5], steps=1))
    assert check(True) == DEFAULT


def test_remedies_with_options_are_reproduced_with_them(world: Any) -> None:
    class Own(SynGen):
        name = "own"

    remedies = ["swapped", AttendAndExcite(step_size=3.0), SynGen(), Own()]
    found = elakit.diagnose(world, WORLD, seeds=[0], steps=2, remedies=remedies)
    lines = [line.strip() for line in code(found).splitlines()]
    start = lines.index("remedies=[")
    assert sorted(lines[start + 1 : lines.index("],")]) == [
        "'swapped',",
        "'syngen',",
        "...,  # replace ... by your own method 'own'",
        "elakit.guidance.AttendAndExcite(step_size=3.0),",
    ]
    assert command(found) == ""  # the command line names remedies, without options


def test_code_says_where_to_put_a_pipeline_and_a_method_of_your_own(runs: list[Run]) -> None:
    best = tried(runs, "nnyy", "ynyy")
    own, loaded = (
        [
            replace(pair, plain=replace(pair.plain, settings=pair.plain.settings | {"model": model}))
            for pair in diagnosis_of(best, [best]).pairs
        ]
        for model in ("MyPipeline", "picture-world")
    )
    text = code(replace(diagnosis_of(best, [best]), method="my-method", options={}, pairs=own))
    compile(text, "code", "exec")
    assert "pipe = ...  # replace ... by your own pipeline (MyPipeline), which elakit.load cannot load" in text
    assert "    method=...,  # replace ... by your own method 'my-method'\n" in text
    assert command(replace(diagnosis_of(best, [best]), pairs=loaded))
    assert command(replace(diagnosis_of(best, [best]), pairs=own)) == ""


def test_the_command_writes_a_page_json_and_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["diagnose", WORLD, "--seeds", "0", "--steps", "2", "--remedies", "swapped"]
    assert call(monkeypatch, *words, "--json", "found.json", "--keep", "kept") == 0
    printed = capsys.readouterr().out
    assert printed.strip().endswith(f"Report: {tmp_path / 'report.html'}")
    found_dict = json.loads((tmp_path / "found.json").read_text())
    assert found_dict["statements"]["remedy"][0] in printed
    assert json.loads(json.dumps(elakit.open_diagnosis("kept").to_dict())) == found_dict
    assert "swapped" in [one["name"] for one in found_dict["remedies"]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["diagnose"], "No prompt is given. Give either one prompt"),
        (["diagnose", WORLD, "--prompts", "none.txt"], "A prompt and --prompts are both given."),
        (["diagnose", "--prompts", "none.txt", "--keep", "kept"], "--keep applies to one prompt only"),
        (["diagnose", WORLD, "--method", "boxdiff"], "--method boxdiff needs regions"),
        (["diagnose", "--prompts", "none.txt", "--json", "found.json"], "--json applies to one prompt only"),
        (["diagnose", WORLD, "--workers", "2"], "--workers 2 applies only to a file of prompts"),
        (["diagnose", WORLD, "--remedies", "magic"], "no remedy 'magic'"),
        (["diagnose", WORLD, "--json", "no/such/found.json"], "there is no folder"),
        (["diagnose", WORLD, "--predictor", "none.json"], "none.json cannot be read"),
        (["diagnose", "--prompts", "none.txt"], "none.txt cannot be read"),
        (["run", WORLD, "--out", "run", "--regions", "0,0,1,1"], "plain generation has no regions"),
        (["run", WORLD, "--out", "run", "--method", "syngen", "--regions", "0,0,1,1"], "syngen takes no regions"),
        (["run", WORLD, "--out", "run", "--method", "ela", "--regions", "left"], "write left,top,right,bottom"),
    ],
)
def test_wrong_options_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
