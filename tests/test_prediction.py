"""What is foretold of a picture rests on the steps that are there, and on the entity that fares worst."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import tiny_pipeline

from elakit.errors import RecordingError, SettingError
from elakit.generate import Run, generate
from elakit.prediction import FEATURES, SHARES, features

PAIR = "a [red car] and a [blue bird]"


@pytest.fixture(scope="module")
def run() -> Run:
    return generate(tiny_pipeline(), PAIR, seed=3, steps=10, progress=False)


def test_steps_that_are_still_to_come_are_not_looked_at(run: Run) -> None:
    assert run.recording is not None
    first_half = replace(run, recording=run.recording.isel(step=slice(0, 5)))
    assert np.allclose(features(run).loc[0.5], features(first_half).loc[1.0])
    assert not np.allclose(features(run).loc[0.5], features(run).loc[1.0])


def test_the_worst_entity_pair_and_attribute_count(run: Run) -> None:
    table, frame = features(run), run.measure().to_frame()
    last = frame[frame["step"] == 9]
    for name, worst in (("bleed", max), ("attribute_margin", min), ("ruzicka", max)):
        assert table.loc[1.0, f"{name}_last"] == pytest.approx(worst(last.loc[last["measure"] == name, "value"]))
    peaks = run.entity_maps().isel(step=2).max(("y", "x"))  # a share of .3 ends with the third of ten steps
    assert table.loc[0.3, "peak_last"] == pytest.approx(float(peaks.min()))
    assert table.loc[0.3, "peak_ratio_last"] == pytest.approx(float(peaks.min() / peaks.max()))
    spills = frame.query("measure == 'spill' and step < 3").groupby("step")["value"].mean()
    assert table.loc[0.3, "spill_mean_mean"] == pytest.approx(spills.mean())


def test_a_prompt_without_pairs_or_attributes_has_nothing_amiss_there() -> None:
    run = generate(tiny_pipeline(), "a [cat]", seed=1, steps=3, progress=False)
    table = features(run)
    assert table.shape == (len(SHARES), len(FEATURES))
    assert np.isfinite(table.to_numpy()).all()
    assert (table["ruzicka_last"] == 0).all()
    assert (table["hellinger_last"] == 1).all()
    assert (table["attribute_margin_mean"] == 1).all()


def test_what_cannot_be_foretold_says_why(run: Run) -> None:
    with pytest.raises(RecordingError, match="record=True"):
        features(replace(run, recording=None))
    with pytest.raises(SettingError, match="brackets"):
        features(replace(run, prompt=replace(run.prompt, entities=())))
