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
    """Values at one step, or their mean over the steps, and a caption that states which of the two they are.

    Parameters
    ----------
    values : DataArray, (step, ...)
    step : int, optional
        Number of a recorded denoising step, counted from 0; -1 is the last recorded step, -2 the one before it. None
        takes the mean over all recorded steps.

    Returns
    -------
    values : DataArray, (...)
    caption : str
        Caption, for example "Step 3." (steps count from 1 here) or "Mean over the steps."

    Raises
    ------
    SettingError
        The step was not recorded.

    Examples
    --------
    >>> values = xr.DataArray([1.0, 3.0], dims="step", coords={"step": [0, 1]})
    >>> [(float(chosen), caption) for chosen, caption in (at_step(values, None), at_step(values, -1))]
    [(2.0, 'Mean over the steps.'), (3.0, 'Step 2.')]
    """
    if step is None:
        return values.mean("step"), "Mean over the steps."
    chosen = style.pick_steps(values.step.values, [step])[0]
    return values.sel(step=chosen), f"{step_name(chosen).capitalize()}."


def labels_of_one_prompt(labels: Iterable[Iterable[Any]], what: str) -> list[str]:
    """Labels of the entities of a figure, after a check that all its runs have the same entities.

    Parameters
    ----------
    labels : iterable of iterable
        Labels of each run.
    what : str
        Name of the function that makes the figure, for the message.

    Returns
    -------
    list of str

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
    """Heatmap trace in one color whose opacity grows with the value, for attention over an image.

    Parameters
    ----------
    values : ndarray, (y, x)
        Probabilities.
    largest : float
        Value that is shown in the full color; 0 for a map of zeros.
    color : str
        Hexadecimal color.
    label : str
        Name of the trace.
    where : str
        Beginning of the hover text.
    **more
        Further properties of the trace.

    Returns
    -------
    dict
        Trace with the properties that plotly expects.
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
