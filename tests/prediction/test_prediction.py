"""Features, fit and files of the predictor of failures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_pipeline

from elakit.errors import OutputError, RecordingError, SettingError
from elakit.generation import generate
from elakit.prediction import FEATURES, OUTCOMES, SHARES, Predictor, features, load_predictor
from elakit.prediction.fit import fit
from elakit.prediction.map_statistics import MAP_STATISTICS, map_statistics
from elakit.prediction.predictor import FORMAT
from elakit.run import Run
from elakit.world.vocabulary import NOUNS

PAIR = "a [red car] and a [blue bird]"


@pytest.fixture(scope="module")
def run() -> Run:
    return generate(tiny_pipeline(), PAIR, seed=3, steps=10, progress=False)


def test_features_do_not_depend_on_later_steps(run: Run) -> None:
    assert run.recording is not None
    first_half = replace(run, recording=run.recording.isel(step=slice(0, 5)))
    early, late = features(first_half), features(run)
    assert early.index.tolist() == [0.1, 0.2, 0.3, 0.5]
    assert late.index.tolist() == list(SHARES)
    assert np.allclose(early, late.loc[:0.5])
    assert not np.allclose(late.loc[0.5], late.loc[1.0])


def test_features_are_those_of_the_worst_entity_pair_and_attribute(run: Run) -> None:
    table, frame = features(run), run.measure().to_frame()
    last = frame[frame["step"] == 9]
    for name, worst in (("bleed", max), ("attribute_margin", min), ("ruzicka", max)):
        assert table.loc[1.0, f"{name}_last"] == pytest.approx(worst(last.loc[last["measure"] == name, "value"]))
    peaks = run.entity_maps().isel(step=2).max(("y", "x"))  # a share of .3 ends with the third of ten steps
    assert table.loc[0.3, "peak_last"] == pytest.approx(float(peaks.min()))
    assert table.loc[0.3, "peak_ratio_last"] == pytest.approx(float(peaks.min() / peaks.max()))
    spills = frame.query("measure == 'spill' and step < 3").groupby("step")["value"].mean()
    assert table.loc[0.3, "spill_mean_mean"] == pytest.approx(spills.mean())


def test_features_of_a_prompt_without_pairs_or_attributes() -> None:
    run = generate(tiny_pipeline(), "a [cat]", seed=1, steps=3, progress=False)
    table = features(run)
    assert table.shape == (len(SHARES), len(FEATURES))
    assert np.isfinite(table.to_numpy()).all()
    assert (table["ruzicka_last"] == 0).all()
    assert (table["hellinger_last"] == 1).all()
    assert (table["attribute_margin_mean"] == 1).all()


def test_runs_without_recording_or_entities_are_refused(run: Run) -> None:
    with pytest.raises(RecordingError, match="record=True"):
        features(replace(run, recording=None))
    with pytest.raises(SettingError, match="brackets"):
        features(replace(run, prompt=replace(run.prompt, entities=())))


# --- the predictor ------------------------------------------------------------------------------------------


def sweep(images: int = 600) -> pd.DataFrame:
    """A synthetic sweep in which the probability of failure depends on the worst bleed at the end of the run."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(images, len(SHARES), len(FEATURES)))
    cause = 2 * values[:, -1, FEATURES.index("bleed_last")] - 1
    failed = rng.random(images) < 1 / (1 + np.exp(-cause))
    return pd.DataFrame(
        {
            "prompt": [f"a {NOUNS[i % 20]} and a {NOUNS[i % 20 + 1]}" for i in range(images)],
            "suite": "synthetic", "method": "plain", "model": "picture-world", "steps": 25, "guidance_scale": 4.0,
            "success": ~failed, "neglect": failed, "mixture": False, "wrong_color": False,
            "features": list(values.astype(np.float32).reshape(images, -1)),
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted() -> tuple[Predictor, pd.DataFrame]:
    """Predictor of the synthetic sweep and its quality."""
    predictor, quality, _ = fit(sweep())
    return predictor, quality


def test_the_fit_recovers_the_true_feature_and_is_calibrated(fitted: tuple[Predictor, pd.DataFrame]) -> None:
    predictor, quality = fitted
    own = quality[quality["by"] == "predictor"].set_index(["outcome", "share"])
    assert own.loc[("failure", 1.0), "auroc"] > 0.75
    assert own.loc[("failure", 1.0), "ece"] < 0.06
    assert 0.4 < own.loc[("failure", 0.1), "auroc"] < 0.6  # the early features are noise
    weights = predictor.weights[-1, 0]
    assert int(np.abs(weights).argmax()) == FEATURES.index("bleed_last")
    # The true logit is 2 bleed - 1; correlated noise features take some of the weight.
    assert 0.5 < weights.max() < 2.5
    assert predictor.intercepts[-1, 0] == pytest.approx(-1, abs=0.5)


def test_an_outcome_that_was_never_observed_is_predicted_as_rare(fitted: tuple[Predictor, pd.DataFrame]) -> None:
    predictor, _ = fitted
    table = pd.DataFrame(np.zeros((len(SHARES), len(FEATURES))), index=list(SHARES), columns=list(FEATURES))
    assert (predictor.predict(table)["mixture"] < 0.01).all()


def test_a_predictor_is_saved_and_loaded_unchanged(
    fitted: tuple[Predictor, pd.DataFrame], tmp_path: Path, run: Run
) -> None:
    predictor, _ = fitted
    again = load_predictor(predictor.save(tmp_path / "predictor.json"))
    assert again.predict(run).equals(predictor.predict(run))
    assert again.about == predictor.about
    assert json.loads((tmp_path / "predictor.json").read_text())["format"] == FORMAT
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OutputError, match="elakit predict fit"):
        load_predictor(tmp_path / "other.json")


@pytest.mark.parametrize(("intercept", "stopped"), [(5.0, 3), (-5.0, None)])
def test_a_run_that_is_likely_to_fail_is_ended_after_the_given_share(intercept: float, stopped: int | None) -> None:
    shape = (len(SHARES), len(OUTCOMES))
    predictor = Predictor(np.zeros((*shape, len(FEATURES))), np.full(shape, intercept))
    run = generate(tiny_pipeline(), PAIR, steps=10, stop_if=predictor.stop_if(above=0.9), progress=False)
    assert run.settings.get("stopped") == stopped


@pytest.mark.parametrize(
    ("options", "part"), [({"outcome": "rain"}, "neglect"), ({"after": 0.25}, "0.3"), ({"above": 2}, "probability")]
)
def test_invalid_conditions_are_refused(options: dict[str, object], part: str) -> None:
    shape = (len(SHARES), len(OUTCOMES))
    with pytest.raises(SettingError, match=part):
        Predictor(np.zeros((*shape, len(FEATURES))), np.zeros(shape)).stop_if(**options)  # type: ignore[arg-type]


def test_a_sweep_with_too_few_images_or_without_features_is_refused() -> None:
    with pytest.raises(SettingError, match=r"20 judged images .* at least 50 are needed"):
        fit(sweep(20))
    with pytest.raises(SettingError, match="new folder"):
        fit(sweep(100).assign(features=None))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, r"older version of elakit.*elakit predict fit"),
        ({"format": 99}, r"newer version of elakit.*Install"),
        ({"format": None}, "is not a predictor"),
        ({"shares": [0.1]}, r"not a valid predictor .*must have shape \(1, "),
        ({"about": ...}, "not a valid predictor"),
        ({"weights": [[[float("nan")] * len(FEATURES)] * len(OUTCOMES)] * len(SHARES)}, "weights are NaN or infinite"),
    ],
)
def test_files_of_other_versions_and_damaged_files_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shape = (len(SHARES), len(OUTCOMES))
    path = Predictor(np.zeros((*shape, len(FEATURES))), np.zeros(shape)).save(tmp_path / "predictor.json")
    table = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in table.items() if value is not ...}))
    with pytest.raises(OutputError, match=message):
        load_predictor(path)


def test_the_shipped_predictor_has_the_current_features() -> None:
    assert load_predictor().features == FEATURES


def test_weights_that_are_not_finite_are_refused() -> None:
    shape = (len(SHARES), len(OUTCOMES))
    with pytest.raises(SettingError, match="1 of 20 intercepts is NaN or infinite"):
        Predictor(np.zeros((*shape, len(FEATURES))), np.where(np.arange(20).reshape(shape) == 3, np.nan, 0.0))


def test_fitting_without_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingError, match=r"pip install 'elakit\[fit\]'"):
        fit(sweep(100))


# --- statistics of the maps ---------------------------------------------------------------------------------


def statistics(
    *entities: np.ndarray, attributes: tuple[np.ndarray, ...] = (), owners: tuple[int, ...] = ()
) -> dict[str, float]:
    rest = np.full((4, 4), 0.1)
    return dict(
        zip(
            MAP_STATISTICS,
            map_statistics(np.stack(entities), rest, np.array(attributes).reshape(-1, 4, 4), owners),
            strict=True,
        )
    )


def test_a_neglected_entity_wins_no_location() -> None:
    strong, weak, apart = np.zeros((3, 4, 4))
    strong[:2], weak[:2], apart[3] = 0.6, 0.2, 0.2
    neglected, present = statistics(strong, weak), statistics(strong, apart)
    assert neglected["won_min"] == neglected["won_last"] == 0
    assert present["won_min"] == pytest.approx(1)
    assert neglected["won_first"] == pytest.approx(1)
    assert neglected["peak_won_last"] == 0
    assert present["peak_won_last"] == pytest.approx(0.2)
    assert neglected["lead_last"] == pytest.approx(0, abs=1e-6)  # the largest margin, where both are 0
    assert present["lead_last"] == pytest.approx(0.2)
    assert neglected["common"] == pytest.approx(1)  # the same place, scaled
    assert present["common"] == pytest.approx(0, abs=1e-6)
    assert neglected["distance"] == pytest.approx(0, abs=1e-6)
    assert present["distance"] == pytest.approx(0.75 - 0.125)
    assert (neglected["joint_components"], present["joint_components"]) == (1, 1)


def test_an_attribute_on_the_wrong_entity_has_a_negative_binding() -> None:
    left, right = np.zeros((2, 4, 4))
    left[:, 0], right[:, 3] = 1, 1
    assert statistics(left, right, attributes=(left,), owners=(0,))["bound"] == pytest.approx(1)
    wrong = statistics(left, right, attributes=(left, left), owners=(0, 1))
    assert wrong["bound"] == pytest.approx(-1)
    assert wrong["misbound"] == pytest.approx(1)
    alone = statistics(left)
    assert (alone["bound"], alone["misbound"], alone["won_min"], alone["common"]) == (1, 0, pytest.approx(1), 0)
