"""What is predicted of an image rests on the steps that are there, and on the entity that fares worst."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_pipeline

from elakit.errors import OutputError, RecordingError, SettingError
from elakit.generation import Run, generate
from elakit.prediction import FEATURES, OUTCOMES, SHARES, Predictor, features, load_predictor
from elakit.prediction.contest import CONTEST, contest
from elakit.prediction.fit import fit
from elakit.world.vocabulary import NOUNS

PAIR = "a [red car] and a [blue bird]"


@pytest.fixture(scope="module")
def run() -> Run:
    return generate(tiny_pipeline(), PAIR, seed=3, steps=10, progress=False)


def test_steps_that_are_still_to_come_are_not_looked_at(run: Run) -> None:
    assert run.recording is not None
    first_half = replace(run, recording=run.recording.isel(step=slice(0, 5)))
    early, late = features(first_half), features(run)
    assert early.index.tolist() == [0.1, 0.2, 0.3, 0.5]
    assert late.index.tolist() == list(SHARES)
    assert np.allclose(early, late.loc[:0.5])
    assert not np.allclose(late.loc[0.5], late.loc[1.0])


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


def test_what_cannot_be_predicted_says_why(run: Run) -> None:
    with pytest.raises(RecordingError, match="record=True"):
        features(replace(run, recording=None))
    with pytest.raises(SettingError, match="brackets"):
        features(replace(run, prompt=replace(run.prompt, entities=())))


# --- the predictor ------------------------------------------------------------------------------------------


def sweep(images: int = 600) -> pd.DataFrame:
    """A made-up sweep in which the worst bleed, late in the run, decides how likely an image is to fail."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(images, len(SHARES), len(FEATURES)))
    cause = 2 * values[:, -1, FEATURES.index("bleed_last")] - 1
    failed = rng.random(images) < 1 / (1 + np.exp(-cause))
    return pd.DataFrame(
        {
            "prompt": [f"a {NOUNS[i % 20]} and a {NOUNS[i % 20 + 1]}" for i in range(images)],
            "suite": "made-up", "method": "plain", "model": "picture-world", "steps": 25, "guidance_scale": 4.0,
            "success": ~failed, "neglect": failed, "mixture": False, "wrong_color": False,
            "features": list(values.astype(np.float32).reshape(images, -1)),
        }
    )  # fmt: skip


def test_a_cause_is_found_and_its_probability_is_right() -> None:
    table = sweep()
    predictor, quality, _ = fit(table)
    own = quality[quality["by"] == "predictor"].set_index(["outcome", "share"])
    assert own.loc[("failure", 1.0), "auroc"] > 0.75
    assert own.loc[("failure", 1.0), "ece"] < 0.06
    assert 0.4 < own.loc[("failure", 0.1), "auroc"] < 0.6  # nothing is to be seen that early
    weights = predictor.weights[-1, 0]
    assert int(np.abs(weights).argmax()) == FEATURES.index("bleed_last")
    # made from logit = 2 bleed - 1; some of it goes to features that happen to go with it, of so many
    assert 0.5 < weights.max() < 2.5
    assert predictor.intercepts[-1, 0] == pytest.approx(-1, abs=0.5)


def test_an_outcome_that_never_came_is_predicted_as_rare() -> None:
    predictor, *_ = fit(sweep())
    table = pd.DataFrame(np.zeros((len(SHARES), len(FEATURES))), index=list(SHARES), columns=list(FEATURES))
    assert (predictor.predict(table)["mixture"] < 0.01).all()


def test_a_predictor_is_saved_and_opened_as_it_was(tmp_path: Path, run: Run) -> None:
    predictor, *_ = fit(sweep(100))
    again = load_predictor(predictor.save(tmp_path / "predictor.json"))
    assert again.predict(run).equals(predictor.predict(run))
    assert again.about == predictor.about
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OutputError, match="elakit predict fit"):
        load_predictor(tmp_path / "other.json")


@pytest.mark.parametrize(("intercept", "stopped"), [(5.0, 3), (-5.0, None)])
def test_a_run_that_is_likely_to_fail_is_ended_where_it_is_asked(intercept: float, stopped: int | None) -> None:
    shape = (len(SHARES), len(OUTCOMES))
    predictor = Predictor(np.zeros((*shape, len(FEATURES))), np.full(shape, intercept))
    run = generate(tiny_pipeline(), PAIR, steps=10, stop_if=predictor.stop_if(above=0.9), progress=False)
    assert run.settings.get("stopped") == stopped


@pytest.mark.parametrize(
    ("options", "part"), [({"outcome": "rain"}, "neglect"), ({"after": 0.25}, "0.3"), ({"above": 2}, "probability")]
)
def test_wrong_conditions_are_refused(options: dict[str, object], part: str) -> None:
    shape = (len(SHARES), len(OUTCOMES))
    with pytest.raises(SettingError, match=part):
        Predictor(np.zeros((*shape, len(FEATURES))), np.zeros(shape)).stop_if(**options)  # type: ignore[arg-type]


def test_a_sweep_that_cannot_be_learnt_from_says_why() -> None:
    with pytest.raises(SettingError, match="20 judged images"):
        fit(sweep(20))
    with pytest.raises(SettingError, match="new folder"):
        fit(sweep(100).assign(features=None))


# --- how maps stand to each other ---------------------------------------------------------------------------


def told(
    *entities: np.ndarray, attributes: tuple[np.ndarray, ...] = (), owners: tuple[int, ...] = ()
) -> dict[str, float]:
    rest = np.full((4, 4), 0.1)
    return dict(
        zip(CONTEST, contest(np.stack(entities), rest, np.array(attributes).reshape(-1, 4, 4), owners), strict=True)
    )


def test_an_entity_that_wins_no_cell_is_told_from_one_that_has_a_place() -> None:
    strong, weak, apart = np.zeros((3, 4, 4))
    strong[:2], weak[:2], apart[3] = 0.6, 0.2, 0.2
    neglected, present = told(strong, weak), told(strong, apart)
    assert neglected["won_least"] == neglected["won_last"] == 0
    assert present["won_least"] == pytest.approx(1)
    assert neglected["won_first"] == pytest.approx(1)
    assert neglected["peak_won_last"] == 0
    assert present["peak_won_last"] == pytest.approx(0.2)
    assert neglected["lead_last"] == pytest.approx(0, abs=1e-6)  # its best cells are those where neither has anything
    assert present["lead_last"] == pytest.approx(0.2)
    assert neglected["common"] == pytest.approx(1)  # the same place, scaled
    assert present["common"] == pytest.approx(0, abs=1e-6)
    assert neglected["distance"] == pytest.approx(0, abs=1e-6)
    assert present["distance"] == pytest.approx(0.75 - 0.125)
    assert (neglected["joint_blobs"], present["joint_blobs"]) == (1, 1)


def test_an_attribute_on_the_wrong_thing_is_bound_below_zero() -> None:
    left, right = np.zeros((2, 4, 4))
    left[:, 0], right[:, 3] = 1, 1
    assert told(left, right, attributes=(left,), owners=(0,))["bound"] == pytest.approx(1)
    wrong = told(left, right, attributes=(left, left), owners=(0, 1))
    assert wrong["bound"] == pytest.approx(-1)
    assert wrong["misbound"] == pytest.approx(1)
    alone = told(left)
    assert (alone["bound"], alone["misbound"], alone["won_least"], alone["common"]) == (1, 0, pytest.approx(1), 0)
