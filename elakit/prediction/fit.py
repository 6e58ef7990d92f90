"""Fit a predictor of failures on a sweep, and measure how well failures are predicted for held-out prompts."""

from __future__ import annotations

import importlib.util
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from elakit.errors import SettingError
from elakit.numbering import number_of
from elakit.prediction.attention_features import FEATURES, SHARES
from elakit.prediction.predictor import OUTCOMES, Predictor, stack
from elakit.world.vocabulary import NOUNS

FOLDS = 5
# Smallest number of judged images that a predictor is fitted on.
LEAST_IMAGES = 10 * FOLDS
# Inverse strengths of the L2 penalty, chosen by cross-validation.
PENALTIES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
# Single features for comparison, and the sign of their correlation with failure. A-STAR's overlap of distributions is a
# monotonic function of Ruzicka similarity, so both rank images in the same way.
BASELINES = {
    "A-STAR overlap": ("ruzicka_mean", 1),
    "symmetric KL": ("symmetric_kl_mean", -1),
    "least attended entity": ("peak_last", -1),
}
BINS = 10


class Fit(NamedTuple):
    """Result of `fit`: a predictor, a table of its quality, and a table of predictions for held-out images.

    The fields are described in `fit`.
    """

    predictor: Predictor
    quality: pd.DataFrame
    held_out: pd.DataFrame


def fit(table: pd.DataFrame, method: str = "plain") -> Fit:
    """Fit a predictor of failures (calibrated logistic models) on the images of a sweep.

    The result is a named tuple, `Fit`, with the three fields below.

    Parameters
    ----------
    table : DataFrame
        Table of a sweep, from `elakit.sweep.table`.
    method : str
        Method of the sweep whose images are used.

    Returns
    -------
    predictor : Predictor
        Predictor fitted on all images of the method.
    quality : DataFrame
        Quality of the predictions for held-out images. There is one row for each combination of the columns "share",
        "outcome" and "by". "share" is the share of the steps after which the prediction is made. "by" is "predictor" or
        the name of a baseline in `BASELINES`. A baseline ranks the images by a single feature.

        The other columns are "auroc" (area under the ROC curve), "ece" (expected calibration error), "brier" (Brier
        score), "rate" (share of the images with the outcome) and "images" (number of images). For baselines, only
        "auroc" is given, and the columns after "auroc" are NaN.
    held_out : DataFrame
        Predictions for held-out images, one row per image. Each image is predicted by models that were fitted without
        the image. The columns (outcome, share) have probabilities, and the columns (outcome, "observed") have booleans.

    Raises
    ------
    SettingError
        The sweep has fewer than `LEAST_IMAGES` judged images of the method. Also raised if the features of some images
        are missing or come from another version of elakit, or if scikit-learn is not installed.

    Notes
    -----
    Images are held out in `FOLDS` folds. Images are in the same fold if their prompts have the same picture-world nouns
    (`elakit.world.vocabulary.NOUNS`). Images whose prompt has no such noun are in the same fold if they have the same
    prompt.

    Features are standardized for the fit. The L2 penalty is chosen by cross-validation over the folds. A logistic curve
    (Platt, 1999) converts the score of a model into a calibrated probability. The predictor's curve is fitted on the
    scores of all images, each scored while it was held out. For `quality` and `held_out`, the curve that is applied to
    the images of one fold is fitted on the other folds.
    """
    if importlib.util.find_spec("sklearn") is None:
        raise SettingError("Fitting a predictor needs scikit-learn, which is not installed: pip install 'elakit[fit]'.")
    rows = table[(table["method"] == method) & table["success"].notna()]
    if len(rows) < LEAST_IMAGES:
        raise SettingError(
            f"The sweep has {number_of(len(rows), 'judged image')} of method {method!r}, but at least {LEAST_IMAGES} "
            "are needed; a thousand are better. Generate more images in the folder of the sweep. For example, this "
            "command uses 276 prompts and four seeds: "
            f"elakit sweep run --out FOLDER --suite attend-and-excite --methods {method} --seeds 0,1,2,3."
        )
    values, groups = stack(list(rows["features"])), np.array([_group(prompt) for prompt in rows["prompt"]])
    truth = {
        "failure": ~rows["success"].to_numpy(bool),
        **{name: rows[name.replace(" ", "_")].fillna(False).to_numpy(bool) for name in OUTCOMES[1:]},
    }
    weights = np.zeros((len(SHARES), len(OUTCOMES), len(FEATURES)))
    intercepts = np.zeros(weights.shape[:2])
    quality: list[dict[str, Any]] = []
    predicted: dict[tuple[str, float | str], np.ndarray] = {
        (name, "observed"): observed for name, observed in truth.items()
    }
    for s, share in enumerate(SHARES):
        for o, outcome in enumerate(OUTCOMES):
            x, y = values[:, s], truth[outcome]
            about = {"share": share, "outcome": outcome}
            weights[s, o], intercepts[s, o], held_out = _fit_one(x, y, groups)
            predicted[outcome, share] = held_out
            quality.append(about | {"by": "predictor"} | _quality(held_out, y))
            for name, (feature, sign) in BASELINES.items():
                quality.append(about | {"by": name, "auroc": _auroc(sign * x[:, FEATURES.index(feature)], y)})
    about = {
        "model": sorted(rows["model"].unique().tolist()),
        "method": method,
        "suites": sorted(rows["suite"].unique().tolist()),
        "prompts": int(rows["prompt"].nunique()),
        "images": len(rows),
        "steps": sorted({int(steps) for steps in rows["steps"]}),
        "guidance_scale": sorted({float(scale) for scale in rows["guidance_scale"]}),
    }
    return Fit(Predictor(weights, intercepts, about=about), pd.DataFrame(quality), pd.DataFrame(predicted))


def confusion(held_out: pd.DataFrame, share: float = 1.0) -> pd.DataFrame:
    """Confusion matrix of the kinds of failure: "neglect", "mixture" and "wrong color".

    Only images with exactly one observed kind of failure are counted.

    Parameters
    ----------
    held_out : DataFrame
        Predictions for held-out images, from `fit`.
    share : float
        Share of the steps after which the prediction is made, one of `SHARES`.

    Returns
    -------
    pandas.DataFrame
        Numbers of images, with one row per observed kind and one column per predicted kind.

    Notes
    -----
    The probability of each kind is divided by the mean probability of this kind over all images. The predicted kind of
    an image is the kind with the largest quotient. By the probability alone, a rare kind would hardly ever be
    predicted.

    Examples
    --------
    The first image shows neglect, the second image a mixture, and both are predicted correctly:

    >>> held_out = pd.DataFrame({
    ...     ("neglect", "observed"): [True, False], ("neglect", 1.0): [0.9, 0.1],
    ...     ("mixture", "observed"): [False, True], ("mixture", 1.0): [0.1, 0.9],
    ...     ("wrong color", "observed"): [False, False], ("wrong color", 1.0): [0.1, 0.1]})
    >>> confusion(held_out).to_numpy().tolist()
    [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    """
    kinds = list(OUTCOMES[1:])
    observed = np.stack([held_out[kind, "observed"].to_numpy(bool) for kind in kinds], 1)
    lift = np.stack([held_out[kind, share] / held_out[kind, share].mean() for kind in kinds], 1)
    once = observed.sum(1) == 1
    counts = np.zeros((len(kinds), len(kinds)), int)
    np.add.at(counts, (observed[once].argmax(1), lift[once].argmax(1)), 1)
    return pd.DataFrame(counts, pd.Index(kinds, name="observed"), pd.Index(kinds, name="predicted"))


def _fit_one(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """Fit a calibrated logistic model of one outcome, and predict each image while it is held out.

    Parameters
    ----------
    x : ndarray, float, (image, feature)
        Features.
    y : ndarray, bool, (image,)
        True for each image with the outcome.
    groups : ndarray, (image,)
        Group of each image. The images of a group are held out together.

    Returns
    -------
    weights : ndarray, float, (feature,)
        Weights of the model, for features that are not standardized.
    intercept : float
        Intercept of the model.
    held_out : ndarray, float, (image,)
        Calibrated probability of the outcome for each image, predicted by a model that was fitted without the image.

    Notes
    -----
    No model can be fitted if there is only one group, or if all images outside some fold have the same outcome. Then
    all weights are 0, and every probability is the smoothed rate of the outcome.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss
    from sklearn.model_selection import GroupKFold

    folds = list(GroupKFold(min(FOLDS, len(set(groups)))).split(x, y, groups)) if len(set(groups)) > 1 else []
    if not all(0 < y[learn].sum() < len(learn) for learn, _ in folds) or not folds:  # a fold without one of the classes
        rate = (y.sum() + 0.5) / (len(y) + 1)
        return np.zeros(x.shape[1]), float(np.log(rate / (1 - rate))), np.full(len(y), rate)
    best, scores = np.inf, np.zeros(len(y))
    chosen = PENALTIES[0]
    for penalty in PENALTIES:
        tried = np.zeros(len(y))
        for learn, test in folds:
            tried[test] = _model(penalty).fit(x[learn], y[learn]).decision_function(x[test])
        loss = log_loss(y, 1 / (1 + np.exp(-tried)), labels=[False, True])
        if loss < best:
            best, scores, chosen = loss, tried, penalty
    held_out = np.zeros(len(y))
    for learn, test in folds:
        curve = LogisticRegression(C=np.inf).fit(scores[learn, None], y[learn])
        held_out[test] = curve.predict_proba(scores[test, None])[:, 1]
    curve = LogisticRegression(C=np.inf).fit(scores[:, None], y)
    model = _model(chosen).fit(x, y)
    scaler, linear = model[0], model[1]
    slope = float(curve.coef_[0, 0])
    weights = slope * linear.coef_[0] / scaler.scale_
    intercept = slope * (linear.intercept_[0] - linear.coef_[0] @ (scaler.mean_ / scaler.scale_)) + curve.intercept_[0]
    return weights, float(intercept), held_out


def _model(penalty: float) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=2000))


def _quality(probability: np.ndarray, y: np.ndarray) -> dict[str, float]:
    return {
        "auroc": _auroc(probability, y),
        "ece": expected_calibration_error(probability, y),
        "brier": float(np.mean((probability - y) ** 2)),
        "rate": float(y.mean()),
        "images": len(y),
    }


def expected_calibration_error(probability: np.ndarray, y: np.ndarray, bins: int = BINS) -> float:
    """Expected calibration error of predicted probabilities.

    The probabilities are sorted into bins. The error of a bin is the absolute difference between the mean predicted
    probability and the observed rate of the outcome. The result is the mean of the bins' errors, weighted by the number
    of predictions in each bin.

    Parameters
    ----------
    probability : ndarray, float, (n,)
        Predicted probabilities.
    y : ndarray, bool, (n,)
        Observed outcomes.
    bins : int
        Number of bins, which divide the range from 0 to 1 into parts of equal width.

    Returns
    -------
    float
        Expected calibration error, 0 to 1.

    Examples
    --------
    Two bins have two predictions each. The errors of these bins are 0.25 and 0.15:

    >>> round(expected_calibration_error(np.array([0.25, 0.25, 0.85, 0.85]), np.array([False, False, True, True])), 2)
    0.2
    """
    number = np.minimum((np.asarray(probability) * bins).astype(int), bins - 1)
    error = 0.0
    for each in np.unique(number):
        inside = number == each
        error += inside.mean() * abs(float(np.mean(probability[inside])) - float(np.mean(y[inside])))
    return float(error)


def _auroc(score: np.ndarray, y: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(y, score)) if 0 < y.sum() < len(y) else float("nan")


def _group(prompt: str) -> str:
    """Group of a prompt for cross-validation: all its picture-world nouns, or the prompt if it has none.

    Prompts of one group are held out together.
    """
    words = {word.strip(".,").lower() for word in prompt.replace("[", " ").replace("]", " ").split()}
    return " ".join(sorted(words & set(NOUNS))) or prompt
