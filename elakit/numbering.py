"""Numbers in text: steps, which count from 1 in text and figures and from 0 in arrays, counted things, and indices."""

from __future__ import annotations

import re


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


def plural(word: str, count: int) -> str:
    """The form of a word for a count: the plural, unless the count is 1.

    Examples
    --------
    >>> plural("image", 1), plural("image", 0), plural("entity", 2), plural("key", 2)
    ('image', 'images', 'entities', 'keys')
    """
    return word if count == 1 else f"{re.sub('(?<![aeiou])y$', 'ie', word)}s"


def number_of(count: int, word: str) -> str:
    """A count with its word.

    Examples
    --------
    >>> number_of(1, "region"), number_of(2, "region")
    ('1 region', '2 regions')
    """
    return f"{count} {plural(word, count)}"


def an_index(count: int) -> str:
    """The allowed indices of a number of things, for a message that says "give ...".

    Examples
    --------
    >>> an_index(4), an_index(1)
    ('an index from 0 to 3', 'index 0, the only one')
    """
    return f"an index from 0 to {count - 1}" if count > 1 else "index 0, the only one"
