"""The probability that an image fails, and how, from the attention of its first steps: fitted, calibrated, saved."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from elakit.errors import OutputError, SettingError
from elakit.generation import GuideIf, Progress, Run
from elakit.prediction.features import FEATURES, SHARES, features
from elakit.resources import data_path

# "failure" is any; the kinds are the judge's, and an image may fail in several ways.
OUTCOMES = ("failure", "neglect", "mixture", "wrong color")


@dataclass(frozen=True, eq=False)
class Predictor:
    """Logistic models, one a share of the steps and outcome, whose probabilities are calibrated.

    Attributes
    ----------
    weights : ndarray, float, (share, outcome, feature)
        Of the features as they are.
    intercepts : ndarray, float, (share, outcome)
    shares, outcomes, features : tuple
        What the dimensions stand for.
    about : dict
        What it was fitted on: model, prompts, images, settings.
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
                f"weights {self.weights.shape} and intercepts {self.intercepts.shape} do not belong to "
                f"{wanted[0]} shares, {wanted[1]} outcomes and {wanted[2]} features."
            )

    def predict(self, run: Run | pd.DataFrame) -> pd.DataFrame:
        """Probability of each outcome, after each share of the steps that the run has reached.

        Parameters
        ----------
        run : Run, or DataFrame
            Or its `features`.

        Returns
        -------
        DataFrame, float
            A row a share, a column an outcome, 0 to 1.

        Raises
        ------
        SettingError
            The features are others than those it was fitted on.

        Examples
        --------
        >>> import elakit
        >>> nothing = Predictor(np.zeros((5, 4, len(FEATURES))), np.zeros((5, 4)))
        >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=4, progress=False)
        >>> nothing.predict(run).loc[1.0].tolist()
        [0.5, 0.5, 0.5, 0.5]
        """
        table = run if isinstance(run, pd.DataFrame) else features(run)
        if tuple(table.columns) != self.features:
            raise SettingError("The features are not those this predictor was fitted on; fit it again on a new sweep.")
        rows = [self.shares.index(share) for share in table.index]
        scores = np.einsum("sf,sof->so", table.to_numpy(float), self.weights[rows]) + self.intercepts[rows]
        return pd.DataFrame(1 / (1 + np.exp(-scores)), index=table.index, columns=list(self.outcomes))

    def stop_if(self, above: float = 0.5, outcome: str = "failure", after: float = 0.3) -> Callable[[Progress], bool]:
        """For ``elakit.generate(stop_if=...)``: end a run that is likely to fail.

        Parameters
        ----------
        above : float
            Probability from which a run is ended.
        outcome : str
            One of `outcomes`.
        after : float
            The share of the steps after which it is asked, one of `shares`; of a batch the least likely to fail counts.

        Raises
        ------
        SettingError
            No such outcome or share, or a probability outside 0 to 1.
        """
        probabilities = self._asked(above, outcome, after)

        def stop(so_far: Progress) -> bool:
            found = probabilities(so_far)
            return found is not None and min(found) > above

        return stop

    def guide_if(self, above: float = 0.25, outcome: str = "failure", after: float = 0.2) -> GuideIf:
        """For ``elakit.generate(guide_if=...)``: guide the images that are likely to fail, and no others.

        Parameters
        ----------
        above, outcome, after
            As in `stop_if`, but each image of a batch counts for itself.

        Raises
        ------
        SettingError
            No such outcome or share, or a probability outside 0 to 1.

        Examples
        --------
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
        """Each image's probability after the step that a share of the steps ends with; None after the others."""
        if outcome not in self.outcomes:
            raise SettingError(f"outcome={outcome!r}: choose from {', '.join(self.outcomes)}.")
        if after not in self.shares:
            raise SettingError(f"after={after!r}: choose from {', '.join(map(str, self.shares))}.")
        if not 0 <= above <= 1:
            raise SettingError(f"above={above!r}: give a probability, 0 to 1.")

        def probabilities(so_far: Progress) -> list[float] | None:
            if so_far.step + 1 != int(np.ceil(after * so_far.steps - 1e-9)):
                return None
            return [float(self.predict(run)[outcome].iloc[-1]) for run in so_far.runs(decode=False)]

        return probabilities

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, whole or not at all.

        Raises
        ------
        OutputError
            The file cannot be written.
        """
        path = Path(path)
        table = {
            "about": self.about,
            "shares": self.shares,
            "outcomes": self.outcomes,
            "features": self.features,
            "intercepts": self.intercepts.tolist(),
            "weights": self.weights.tolist(),
        }
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(table), encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise OutputError(f"The predictor cannot be written to {path}: {error.strerror or error}.") from error
        finally:
            part.unlink(missing_ok=True)
        return path


def load_predictor(path: str | Path | None = None) -> Predictor:
    """A saved predictor; by default the one that is shipped for picture-world.

    Parameters
    ----------
    path : str or Path, optional

    Raises
    ------
    OutputError
        The file cannot be read, or holds no predictor.
    """
    path = data_path("picture-world", "predictor.json") if path is None else Path(path)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return Predictor(
            np.array(table["weights"], float),
            np.array(table["intercepts"], float),
            tuple(table["shares"]),
            tuple(table["outcomes"]),
            tuple(table["features"]),
            table["about"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(
            f"{path} holds no predictor ({error}). Fit one on a sweep: elakit predict fit SWEEP --out {path.name}."
        ) from error


def stack(rows: Sequence[Any]) -> np.ndarray:
    """The features column of a sweep's table as an array, (image, share, feature).

    Raises
    ------
    SettingError
        Features are missing, or of another version of elakit.
    """
    size = len(SHARES) * len(FEATURES)
    if not len(rows) or any(row is None or len(row) != size for row in rows):
        raise SettingError(
            "The sweep has images without features, or features of another version of elakit. Draw it again into a "
            "new folder: elakit sweep run --out NEW."
        )
    return np.stack([np.asarray(row, float) for row in rows]).reshape(-1, len(SHARES), len(FEATURES))
