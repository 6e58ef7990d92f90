"""Steps count from 1 in what people read, and from 0 in arrays: sentences, figures and widgets agree."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_pipeline

import elakit
from elakit import plot
from elakit.causes import Failure
from elakit.diagnosis.sentences import failure_sentence
from elakit.numbering import step_name
from elakit.run import Run
from elakit.widgets.live.frames import frame

STEPS = 3


@pytest.fixture(scope="module")
def run() -> Run:
    pipe = tiny_pipeline()
    return elakit.generate(pipe, "a [red car] and a [blue bird]", seed=1, steps=STEPS, progress=False)


def test_the_first_coordinate_is_step_1(run: Run) -> None:
    assert run.recording.steps[0] == 0
    assert step_name(0, STEPS) == "step 1 of 3"
    # calls of a scheduler that makes two per step outnumber the steps: their number is not given
    assert step_name(STEPS, STEPS) == "step 4"


def test_the_report_and_the_findings_count_from_1() -> None:
    failure = Failure("missing", "car", seeds=(1,), of=2, step=0)
    assert "at step 1 of 3" in failure_sentence(failure, STEPS)
    assert "from step 1" in str(failure)


@pytest.mark.parametrize("figure", [plot.token_maps, plot.region_evolution, plot.bleeding_over_steps])
def test_figures_count_from_1(run: Run, figure: Any) -> None:
    made = figure(run)
    words = [note.text for note in made.layout.annotations]
    named = [int(word.rpartition("step ")[2]) for word in words if word and "step " in word]
    named += [int(x) for trace in made.data if trace.type == "scatter" and trace.mode == "lines" for x in trace.x]
    assert set(named) == {1, 2, 3}


def test_a_figure_of_one_step_takes_its_coordinate_and_shows_its_number(run: Run) -> None:
    made = plot.leakage(run, step=0)
    assert any("Step 1." in (note.text or "") for note in made.layout.annotations)


def test_the_live_panel_counts_from_1(run: Run) -> None:
    assert "after 1 of 3 steps" in frame(run, 0, STEPS).about["alt"]
