"""Functions that several figures of attention share: choice of a step, check of the entities, maps in one color."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xarray as xr

from elakit.errors import SettingError
from elakit.numbering import step_name
from elakit.plot import style


def at_step(values: xr.DataArray, step: int | None) -> tuple[xr.DataArray, str]:
    """Select one step of an array, or average the array over its steps, and return the result with a caption.

    Parameters
    ----------
    values : DataArray, (step, ...)
        Values at the recorded steps.
    step : int, optional
        Step to select, counted from 0. Negative numbers count back from the last recorded step. Default: the mean over
        all recorded steps.

    Returns
    -------
    values : DataArray, (...)
        Values at the step, or their mean over the steps.
    caption : str
        Caption for a figure, such as "Step 3." or "Mean over the steps." Steps in captions count from 1.

    Raises
    ------
    SettingError
        The step was not recorded.

    Examples
    --------
    >>> values = xr.DataArray([1.0, 3.0], dims="step", coords={"step": [0, 1]})
    >>> mean, caption = at_step(values, None)
    >>> float(mean), caption
    (2.0, 'Mean over the steps.')
    >>> last, caption = at_step(values, -1)
    >>> float(last), caption
    (3.0, 'Step 2.')
    """
    if step is None:
        return values.mean("step"), "Mean over the steps."
    chosen = style.pick_steps(values.step.values, [step], "step")[0]
    return values.sel(step=chosen), f"{step_name(chosen).capitalize()}."


def labels_of_one_prompt(labels: Iterable[Iterable[Any]], what: str) -> list[str]:
    """Check that all runs of a figure have the same labels of entities, and return these labels.

    Parameters
    ----------
    labels : iterable of iterable
        One item per run: the labels of the run's entities, or of their regions.
    what : str
        Name of the function that makes the figure, for the error message.

    Returns
    -------
    list of str
        The labels that all runs have.

    Raises
    ------
    SettingError
        The labels of the runs differ.

    Examples
    --------
    >>> labels_of_one_prompt([["cat", "lion"], ["cat", "lion"]], "leakage")
    ['cat', 'lion']
    """
    first, *others = [[str(label) for label in each] for each in labels]
    if any(each != first for each in others):
        raise SettingError(f"{what}: not all runs have the entities {first}; give runs of one prompt.")
    return first


def tint(values: np.ndarray, largest: float, color: str, label: str, where: str, **more: Any) -> dict[str, Any]:
    """Plotly heatmap that shows an attention map in one color over an image; larger values are more opaque.

    Parameters
    ----------
    values : ndarray, (y, x)
        Attention map, as probabilities.
    largest : float
        Value that is shown with the highest opacity. It may be 0 if all values are 0.
    color : str
        Color in hexadecimal form, such as "#E69F00".
    label : str
        Name of the trace.
    where : str
        First line of the text that appears when the mouse is over a location.
    **more
        Further properties of the plotly trace.

    Returns
    -------
    dict
        Properties of the plotly trace.
    """
    return {
        "type": "heatmap",
        "z": values,
        "zmin": 0,
        "zmax": largest or 1.0,
        "colorscale": [[0, style.rgba(color, 0)], [1, style.rgba(color, 0.9)]],
        "showscale": False,
        "name": style.escape(label),
        "hovertemplate": f"{style.escape(where)}<br>x %{{x}}, y %{{y}}<br>probability %{{z:.4f}}<extra></extra>",
        **more,
    }
