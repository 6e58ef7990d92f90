"""Functions that check a list of seeds, read seeds from a text such as "0-3,8", and write seeds as such a text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from itertools import pairwise
from typing import Any

from elakit import checks
from elakit.errors import SettingError

MAX_SEEDS = 10_000

_FORM = "Give seeds and ranges of seeds, separated by commas, such as 0-3 or 1,3."


def seed_list(values: Any, name: str = "seeds") -> list[int]:
    """Check that all seeds are valid and distinct, and return them as a list.

    Parameters
    ----------
    values : sequence of int
        One to 10,000 distinct seeds, each from 0 to 2**63 - 1; a range or a one-dimensional array is also accepted.
    name : str
        Name of the setting in error messages.

    Returns
    -------
    list of int
        The seeds in the given order.

    Raises
    ------
    SettingError
        The value is not a sequence, is empty or has more than 10,000 seeds; or a seed is repeated or is not a whole
        number from 0 to 2**63 - 1.

    Examples
    --------
    >>> seed_list(range(3))
    [0, 1, 2]
    >>> seed_list(4)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: seeds=4: must be a list of seeds. Use range(4) for the seeds 0 to 3, or [4] for one...
    """
    if checks.is_whole(values):
        hint = f"Use [{values}] for one seed."
        if 1 <= values <= MAX_SEEDS:
            hint = f"Use range({values}) for {_shown(int(values))}, or [{values}] for one seed."
        checks.refuse(values, name, "a list of seeds", hint=hint)
    if isinstance(values, str) or not isinstance(values, Iterable):
        checks.refuse(values, name, "a list of seeds, such as range(4) or [1, 3]")
    if isinstance(values, Sized):
        _check_count(len(values), name)
    return checks.seeds(values, name, distinct=True)


def parse_seeds(text: str, name: str = "--seeds") -> list[int]:
    """Read seeds from a text. The text is a comma-separated list of seeds and ranges, such as "0-3,8".

    Parameters
    ----------
    text : str
        Comma-separated list. A range includes both its first and its last seed: "0-3" means 0, 1, 2 and 3.
    name : str
        Name of the option in error messages.

    Returns
    -------
    list of int
        The seeds in the order of the text.

    Raises
    ------
    SettingError
        The text has another form, a range ends before it starts, there are more than 10,000 seeds, or a seed is
        repeated or exceeds 2**63 - 1.

    Examples
    --------
    >>> parse_seeds("0-3, 8")
    [0, 1, 2, 3, 8]
    >>> parse_seeds("3-0")
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: --seeds 3-0: the range 3-0 ends before it starts. Give seeds and ranges of seeds, ...
    """
    values: list[int] = []
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not (_is_number(first) and (_is_number(last) if dash else True)):
            raise SettingError(f"{name} {text}: {part.strip()!r} is not a seed or a range of seeds. {_FORM}")
        start, end = (checks.seed(int(word), name) for word in (first, last if dash else first))
        if end < start:
            raise SettingError(f"{name} {text}: the range {part.strip()} ends before it starts. {_FORM}")
        _check_count(len(values) + end - start + 1, name)
        values += range(start, end + 1)
    return seed_list(values, name)


def format_seeds(seeds: Sequence[int]) -> str:
    """Write seeds as a text from which `parse_seeds` reads the same seeds.

    Parameters
    ----------
    seeds : sequence of int

    Returns
    -------
    str
        Comma-separated list, in which three or more consecutive seeds are a range.

    Examples
    --------
    >>> format_seeds([0, 1, 2, 3, 8, 9])
    '0-3,8,9'
    """
    starts = [0, *(i for i, (one, other) in enumerate(pairwise(seeds), start=1) if other != one + 1)]
    runs = [seeds[start:end] for start, end in zip(starts, [*starts[1:], len(seeds)], strict=True)]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs)


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit()


def _shown(count: int) -> str:
    return f"the seeds 0 to {count - 1}" if count > 1 else "seed 0"


def _check_count(count: int, name: str) -> None:
    if count > MAX_SEEDS:
        raise SettingError(f"{name} has {count:,} seeds; at most {MAX_SEEDS:,} are allowed. Give fewer.")
