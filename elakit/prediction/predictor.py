"""Predictor of failures: calibrated probabilities from the attention of the first steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from elakit.errors import OutputError, SettingError, clause
from elakit.files import read_json, write_json
from elakit.pipeline_call import GuideIf, Progress
from elakit.prediction.attention_features import FEATURES, SHARES, features
from elakit.resources import data_path
from elakit.run import Run

# Version of the files that `Predictor.save` writes.
FORMAT = 2
# "failure" is any failure; the kinds are those of the judge, and an image may have several.
OUTCOMES = ("failure", "neglect", "mixture", "wrong color")


@dataclass(frozen=True, eq=False)
class Predictor:
    """Predictor of failures, which predicts the probability of each outcome at several points of a run.

    The points are shares of the run's steps. There is one calibrated logistic model for each point and each outcome.
    The outcomes are predicted independently, and an image may have several kinds of failure. The probabilities of one
    image therefore do not sum to 1.

    Attributes
    ----------
    weights : ndarray, float, (share, outcome, feature)
        Weights of the models, for features as `elakit.prediction.features` returns them (not standardized).
    intercepts : ndarray, float, (share, outcome)
        Intercepts of the models.
    shares : tuple of float
        Shares of a run's steps after which a prediction can be made; 0.3 is the point after 30% of the steps.
    outcomes : tuple of str
        Predicted outcomes: "failure" for any failure, and the kinds "neglect", "mixture" and "wrong color".
    features : tuple of str
        Names of the features, in the order of the last dimension of `weights`.
    about : dict
        Description of the images on which the predictor was fitted: model, method, suites, numbers of prompts and
        images, steps and guidance scale.

    Raises
    ------
    SettingError
        Shapes do not match, or some weights or intercepts are NaN or infinite.
    """

    weights: np.ndarray
    intercepts: np.ndarray
    shares: tuple[float, ...] = SHARES
    outcomes: tuple[str, ...] = OUTCOMES
    features: tuple[str, ...] = FEATURES
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wanted = (len(self.shares), len(self.outcomes), len(self.features))
        if self.weights.shape != wanted or self.intercepts.shape != wanted[:2]:
            raise SettingError(
                f"weights have shape {self.weights.shape} and must have shape {wanted}: (shares, outcomes, features). "
                f"intercepts have shape {self.intercepts.shape} and must have shape {wanted[:2]}: (shares, outcomes)."
            )
        for name, values in (("weights", self.weights), ("intercepts", self.intercepts)):
            if bad := int((~np.isfinite(values)).sum()):
                raise SettingError(
                    f"{bad} of {values.size} {name} {'is' if bad == 1 else 'are'} NaN or infinite; fit the predictor "
                    "again: elakit predict fit SWEEP."
                )

    def predict(self, run: Run | pd.DataFrame) -> pd.DataFrame:
        """Predict the probability of each outcome of a run, at several points of the run.

        The points are shares of the run's steps, given by `Predictor.shares`: 0.3 is the point after 30% of the steps.
        Points that the run has not reached are left out.

        Parameters
        ----------
        run : Run or DataFrame
            A recorded run, or the result of `elakit.prediction.features` for it.

        Returns
        -------
        pandas.DataFrame
            Probabilities: one row per point (index "share") and one column per outcome. A row does not sum to 1,
            because an image may have several kinds of failure, and "failure" stands for any of them.

        Raises
        ------
        SettingError
            The columns of the features differ from `Predictor.features`, for example because the predictor was fitted
            with another version of elakit. Also raised if the prompt names no entity.
        RecordingError
            The run was not recorded, or has no recorded step.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5 for each of the four outcomes. The
        row 1.0 is the prediction after all steps:

        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=4, progress=False)
        >>> nothing.predict(run).loc[1.0].tolist()
        [0.5, 0.5, 0.5, 0.5]
        """
        table = run if isinstance(run, pd.DataFrame) else features(run)
        if tuple(table.columns) != self.features:
            raise SettingError(
                "The columns of the table are not the features on which this predictor was fitted. Pass a recorded "
                "run, or the result of elakit.prediction.features. If the predictor comes from another version of "
                "elakit, fit it again on a new sweep: elakit predict fit SWEEP."
            )
        rows = [self.shares.index(share) for share in table.index]
        scores = np.einsum("sf,sof->so", table.to_numpy(float), self.weights[rows]) + self.intercepts[rows]
        return pd.DataFrame(1 / (1 + np.exp(-scores)), index=table.index, columns=list(self.outcomes))

    def stop_if(self, above: float = 0.5, outcome: str = "failure", after: float = 0.3) -> Callable[[Progress], bool]:
        """Callback for ``elakit.generate(stop_if=...)`` that ends runs which are likely to fail.

        Parameters
        ----------
        above : float
            Limit of the probability, 0 to 1. A run ends if the predicted probability of the outcome is above this
            limit. A batch ends only if the probability is above the limit for every image.
        outcome : str
            Predicted outcome, one of `outcomes`.
        after : float
            Share of the steps after which the outcome is predicted, one of `shares`. The run can end only then.

        Returns
        -------
        callable
            Function that `elakit.generate` calls after each step with the state of the run, an `elakit.Progress`. The
            function returns True if the run is to end, and False otherwise.

        Raises
        ------
        SettingError
            The outcome or the share is unknown, or `above` is not from 0 to 1.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5. This is above 0.4, so the run ends
        after half of its four steps:

        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> options = dict(stop_if=nothing.stop_if(above=0.4, after=0.5), steps=4, progress=False)
        >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", **options)
        >>> run.recording.steps
        (0, 1)
        """
        probabilities = self._asked(above, outcome, after)

        def stop(so_far: Progress) -> bool:
            found = probabilities(so_far)
            return found is not None and min(found) > above

        return stop

    def guide_if(self, above: float = 0.25, outcome: str = "failure", after: float = 0.2) -> GuideIf:
        """Callback for ``elakit.generate(guide_if=...)`` that guides only images which are likely to fail.

        Parameters
        ----------
        above : float
            Limit of the probability, 0 to 1. An image is guided if the predicted probability of the outcome is above
            this limit. The decision is made for each image of a batch separately.
        outcome : str
            Predicted outcome, one of `outcomes`.
        after : float
            Share of the steps after which the outcome is predicted, one of `shares`. No image is guided before the
            prediction.

        Returns
        -------
        callable
            Function that `elakit.generate` calls after each step with the state of the run, an `elakit.Progress`. At
            the step of the prediction, the function returns a list with one bool per image, True for each image to
            guide. At every other step, the function returns None.

        Raises
        ------
        SettingError
            The outcome or the share is unknown, or `above` is not from 0 to 1.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5. This is not above 0.6, so the
        image is not guided, and the trace of the guidance method has no rows:

        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> options = dict(guidance=elakit.RegionalAttention(), steps=4, progress=False)
        >>> pipe = elakit.load("picture-world")
        >>> run = elakit.generate(pipe, "a [cat] and a [lion]", guide_if=nothing.guide_if(above=0.6), **options)
        >>> run.settings["guided"], len(run.guidance.rows)
        (False, 0)
        """
        probabilities = self._asked(above, outcome, after)

        def needed(so_far: Progress) -> list[bool] | None:
            found = probabilities(so_far)
            return None if found is None else [each > above for each in found]

        return needed

    def _asked(self, above: float, outcome: str, after: float) -> Callable[[Progress], list[float] | None]:
        """Return a function that predicts the probability of an outcome at one point of a run.

        The point is given by `after`, a share of the run's steps. At the last step of this share, the function returns
        a list with one probability per image. At every other step, it returns None. `above` is only checked here; the
        caller compares it with the probabilities.
        """
        if outcome not in self.outcomes:
            raise SettingError(f"outcome={outcome!r}: choose from {', '.join(self.outcomes)}.")
        if after not in self.shares:
            raise SettingError(f"after={after!r}: choose from {', '.join(map(str, self.shares))}.")
        if not 0 <= above <= 1:
            raise SettingError(f"above={above!r}: give a probability from 0 to 1.")

        def probabilities(so_far: Progress) -> list[float] | None:
            if so_far.step + 1 != int(np.ceil(after * so_far.steps - 1e-9)):
                return None
            return [float(self.predict(run)[outcome].iloc[-1]) for run in so_far.runs(decode=False)]

        return probabilities

    def save(self, path: str | Path) -> Path:
        """Write the predictor to a JSON file, and return the path of the file.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        table = {
            "format": FORMAT,
            "about": self.about,
            "shares": list(self.shares),
            "outcomes": list(self.outcomes),
            "features": list(self.features),
            "intercepts": self.intercepts.tolist(),
            "weights": self.weights.tolist(),
        }
        return write_json(path, table, indent=None)


def load_predictor(path: str | Path | None = None) -> Predictor:
    """Load a predictor from a file.

    Parameters
    ----------
    path : str or Path, optional
        File that `Predictor.save` or ``elakit predict fit`` wrote; by default the file shipped for picture-world.

    Returns
    -------
    Predictor

    Raises
    ------
    OutputError
        The file cannot be read, is not a predictor, or has the format of an older or newer version of elakit.

    Examples
    --------
    >>> predictor = load_predictor()
    >>> predictor.shares, predictor.outcomes[0]
    ((0.1, 0.2, 0.3, 0.5, 1.0), 'failure')
    """
    path = data_path("picture-world", "predictor.json") if path is None else Path(path)
    table = read_json(path)
    remedy = f"Fit a predictor on a sweep: elakit predict fit SWEEP --out {path.name}."
    if not isinstance(table, dict) or "weights" not in table or type(table.get("format", 1)) is not int:
        raise OutputError(f"{path} is not a predictor. {remedy}")
    if (found := table.get("format", 1)) != FORMAT:
        newer = isinstance(found, int) and found > FORMAT
        raise OutputError(
            f"{path} was written by {'a newer' if newer else 'an older'} version of elakit: its format is {found!r}, "
            f"and this version reads {FORMAT}. {'Install a newer version of elakit.' if newer else remedy}"
        )
    try:
        return Predictor(
            weights=np.array(table["weights"], float),
            intercepts=np.array(table["intercepts"], float),
            shares=tuple(table["shares"]),
            outcomes=tuple(table["outcomes"]),
            features=tuple(table["features"]),
            about=table["about"],
        )
    except (ValueError, KeyError, TypeError) as error:  # SettingError is a ValueError
        raise OutputError(f"{path} is not a valid predictor ({clause(error)}). {remedy}") from error


def stack(rows: Sequence[Any]) -> np.ndarray:
    """Stack the features of several images into one array.

    Parameters
    ----------
    rows : sequence
        The column "features" of a sweep's table, with one element per image. An element is a flat sequence of numbers:
        the table of `elakit.prediction.features`, row after row. An element is None if the image has no features.

    Returns
    -------
    ndarray, float, (image, share, feature)

    Raises
    ------
    SettingError
        There is no image, an image has no features, or the number of an image's features is not the number in this
        version of elakit.
    """
    size = len(SHARES) * len(FEATURES)
    if not len(rows) or any(row is None or len(row) != size for row in rows):
        raise SettingError(
            "The sweep has no images, or has images without the features of this version of elakit. Generate the sweep "
            "again in a new folder: elakit sweep run --out NEW."
        )
    return np.stack([np.asarray(row, float) for row in rows]).reshape(-1, len(SHARES), len(FEATURES))
