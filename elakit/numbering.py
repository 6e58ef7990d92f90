"""Numbers and names of steps in text and figures, which count from 1; arrays and arguments count from 0."""

from __future__ import annotations


def step_number(index: int) -> int:
    """Number of a step in text and figures.

    Parameters
    ----------
    index : int
        Coordinate of the step in arrays and tables, counted from 0.

    Returns
    -------
    int
        Number of the step, counted from 1.

    Examples
    --------
    >>> step_number(0)
    1
    """
    return int(index) + 1


def step_name(index: int, total: int | None = None) -> str:
    """Name of a step in text and figures: "step 1 of 25".

    Parameters
    ----------
    index : int
        Coordinate of the step in arrays and tables, counted from 0.
    total : int, optional
        Number of steps of the run. The name is "step 5" without a total if `total` is None, or smaller than the number
        of the step. Indices exceed the number of steps with a scheduler such as Heun, because arrays count denoiser
        calls, and Heun makes two per step.

    Returns
    -------
    str
        Name of the step.

    Examples
    --------
    >>> step_name(0, 25), step_name(4)
    ('step 1 of 25', 'step 5')
    """
    number = step_number(index)
    return f"step {number}" if total is None or total < number else f"step {number} of {total}"
