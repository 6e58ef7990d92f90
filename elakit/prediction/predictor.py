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
from elakit.numbering import number_of
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
    """Predictor of failures: one calibrated logistic model for each pair of a share of the steps and an outcome.

    The outcomes are predicted independently, and an image may have several kinds of failure, so the probabilities of
    one image do not sum to 1.

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
                f"weights {self.weights.shape} and intercepts {self.intercepts.shape} do not match "
                f"{number_of(wanted[0], 'share')}, {number_of(wanted[1], 'outcome')} and "
                f"{number_of(wanted[2], 'feature')}. Give weights of shape {wanted} and intercepts of shape "
                f"{wanted[:2]}."
            )
        for name, values in (("weights", self.weights), ("intercepts", self.intercepts)):
            if bad := int((~np.isfinite(values)).sum()):
                raise SettingError(
                    f"{bad} of {values.size} {name} {'is' if bad == 1 else 'are'} NaN or infinite; fit the predictor "
                    "again: elakit predict fit SWEEP."
                )

    def predict(self, run: Run | pd.DataFrame) -> pd.DataFrame:
        """Predict the probability of each outcome of a run, at several points of the run.

        The points are the shares of the run's steps in `Predictor.shares`, as far as the run has reached them.

        Parameters
        ----------
        run : Run or DataFrame
            A recorded run, or the result of `elakit.prediction.features` for it.

        Returns
        -------
        pandas.DataFrame
            Probabilities: one row per share (index "share") and one column per outcome. A row does not sum to 1,
            because an image may have several kinds of failure, and "failure" stands for any of them.

        Raises
        ------
        SettingError
            The columns of the features differ from `Predictor.features`, for example because the predictor was fitted
            with another version of elakit; or the prompt names no entity.
        RecordingError
            The run was not recorded, or has no recorded step.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5 for every outcome:

        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=4, progress=False)
        >>> nothing.predict(run).loc[1.0].tolist()
        [0.5, 0.5, 0.5, 0.5]
        """
        table = run if isinstance(run, pd.DataFrame) else features(run)
        if tuple(table.columns) != self.features:
            raise SettingError(
                "The columns of the features differ from the features that this predictor was fitted on. Pass a "
                "recorded run or the result of elakit.prediction.features; if the predictor comes from another version "
                "of elakit, fit it again on a new sweep: elakit predict fit SWEEP."
            )
        rows = [self.shares.index(share) for share in table.index]
        scores = np.einsum("sf,sof->so", table.to_numpy(float), self.weights[rows]) + self.intercepts[rows]
        return pd.DataFrame(1 / (1 + np.exp(-scores)), index=table.index, columns=list(self.outcomes))

    def stop_if(self, above: float = 0.5, outcome: str = "failure", after: float = 0.3) -> Callable[[Progress], bool]:
        """Callback for ``elakit.generate(stop_if=...)`` that ends runs which are likely to fail.

        Parameters
        ----------
        above : float
            Probability of the outcome above which a run ends, 0 to 1. A batch ends only if every one of its images has
            a higher probability.
        outcome : str
            Predicted outcome, one of `outcomes`.
        after : float
            Share of the steps after which the prediction is made, one of `shares`. The run is not ended at other steps.

        Returns
        -------
        callable
            Function of the `Progress` of a run that returns True if the run is to end.

        Raises
        ------
        SettingError
            The outcome or the share is unknown, or `above` is not from 0 to 1.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5, so the run ends after half of its
        four steps:

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
            Probability of the outcome above which an image is guided, 0 to 1. The decision is made separately for each
            image of a batch.
        outcome : str
            Predicted outcome, one of `outcomes`.
        after : float
            Share of the steps after which the prediction is made, one of `shares`. No image is guided before.

        Returns
        -------
        callable
            Function of the `Progress` of a run. At the step of the prediction it returns a list with one bool per
            image, True for each image to guide. At all other steps it returns None.

        Raises
        ------
        SettingError
            The outcome or the share is unknown, or `above` is not from 0 to 1.

        Examples
        --------
        A predictor whose weights and intercepts are 0 predicts a probability of 0.5. This does not exceed 0.6, so the
        image is not guided:

        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> options = dict(guidance=elakit.RegionalAttention(start=0.5), steps=4, progress=False)
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
        """Function that predicts the probability of an outcome after the share `after` of a run's steps.

        The function returns a list with one probability per image at the step of the prediction, and None at all other
        steps. `above` is checked here, and compared with the probabilities by the caller.
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
        """Write the predictor to a JSON file, and return its path.

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
    remedy = f"Fit one on a sweep: elakit predict fit SWEEP --out {path.name}."
    if not isinstance(table, dict) or "weights" not in table:
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
    """Stack the features of several images into an array, (image, share, feature).

    Parameters
    ----------
    rows : sequence
        Values of the column "features" of a sweep's table, one per image: the rows of `elakit.prediction.features` one
        after the other, as one sequence of numbers; None if the features are missing.

    Raises
    ------
    SettingError
        There is no image, or the features of an image are missing or have another number than in this version of
        elakit.
    """
    size = len(SHARES) * len(FEATURES)
    if not len(rows) or any(row is None or len(row) != size for row in rows):
        raise SettingError(
            "The sweep has no images, or the features of some images are missing or come from another version of "
            "elakit. Generate the sweep again in a new folder: elakit sweep run --out NEW."
        )
    return np.stack([np.asarray(row, float) for row in rows]).reshape(-1, len(SHARES), len(FEATURES))
