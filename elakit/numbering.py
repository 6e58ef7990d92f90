"""Text that contains numbers: names of steps, counts with a noun, and ranges of indices.

Steps count from 1 in text and figures, and from 0 in arrays.
"""

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
    """Name of a step in text and figures, such as "step 1 of 25".

    Parameters
    ----------
    index : int
        Coordinate of the step in arrays and tables, counted from 0.
    total : int, optional
        Number of steps of the run. If `total` is None, or smaller than the number of the step, the name is short, such
        as "step 5". The number of the step can exceed `total` with a scheduler such as Heun: arrays count denoiser
        calls, and Heun makes two calls per step.

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
    """Singular or plural of a noun: `word` itself if `count` is 1, otherwise its plural.

    Examples
    --------
    >>> plural("image", 1), plural("image", 0), plural("entity", 2), plural("key", 2)
    ('image', 'images', 'entities', 'keys')
    """
    return word if count == 1 else f"{re.sub('(?<![aeiou])y$', 'ie', word)}s"


def number_of(count: int, word: str) -> str:
    """Text with a count and a noun. The noun is in the plural, unless the count is 1.

    Examples
    --------
    >>> number_of(1, "region"), number_of(2, "region")
    ('1 region', '2 regions')
    """
    return f"{count} {plural(word, count)}"


def an_index(count: int) -> str:
    """Text that names the valid indices of a sequence with `count` items.

    Error messages use the text after the word "give".

    Examples
    --------
    >>> an_index(4), an_index(1)
    ('an index from 0 to 3', 'index 0, the only one')
    """
    return f"an index from 0 to {count - 1}" if count > 1 else "index 0, the only one"
