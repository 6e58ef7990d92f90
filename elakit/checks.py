"""Validators of settings: each returns the value as plain Python, or raises an error that names the allowed values.

The validators accept NumPy scalars. Validators of numbers refuse NaN, infinity, True and False.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from elakit.errors import SettingError

if TYPE_CHECKING:
    from typing_extensions import TypeIs  # in typing from Python 3.13; type checkers have it built in

T = TypeVar("T")

# Seeds are stored in 64-bit signed columns of tables.
MAX_SEED = 2**63 - 1


def is_whole(value: Any) -> TypeIs[int]:
    """True if a value is an integer of Python or NumPy; a bool does not count as an integer.

    Examples
    --------
    >>> import numpy as np
    >>> is_whole(np.int64(3)), is_whole(3.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole_number(
    value: Any, name: str, low: int | None = None, high: int | None = None, *, owner: str = "", hint: str = ""
) -> int:
    """Check that a value is a whole number within bounds, and return it as int.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.
    low, high : int, optional
        Smallest and largest allowed value, both included; None means no bound.
    owner : str
        Name of the class or function with this setting, for the error message; "" adds no name. With owner "SynGen",
        name "iterations" and value 0, the message begins with ``SynGen(iterations=0)``.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Returns
    -------
    int

    Raises
    ------
    SettingError
        The value is not a whole number, or is out of bounds.

    Examples
    --------
    >>> import numpy as np
    >>> whole_number(np.int64(25), "steps", 1)
    25
    >>> whole_number(2.5, "steps", 1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: steps=2.5: must be a whole number, 1 or more.
    """
    if not is_whole(value) or not _within(value, low, high):
        if isinstance(value, float) and value.is_integer():
            refuse(value, name, f"an integer{_bounds(low, high)}, not a float", owner=owner, hint=hint)
        refuse(value, name, f"a whole number{_bounds(low, high)}", owner=owner, hint=hint)
    return int(value)


def real_number(
    value: Any, name: str, low: float | None = None, high: float | None = None, *, owner: str = "", hint: str = ""
) -> float:
    """Check that a value is a finite real number within bounds, and return it as float.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.
    low, high : float, optional
        Smallest and largest allowed value, both included; None means no bound.
    owner : str
        Name of the class or function with this setting, for the error message; "" adds no name.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Returns
    -------
    float

    Raises
    ------
    SettingError
        The value is not a finite real number, or is out of bounds.

    Examples
    --------
    >>> import numpy as np
    >>> real_number(np.float32(0.5), "strength", 0)
    0.5
    >>> real_number(float("nan"), "strength", 0, 1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: strength=nan: must be a number from 0 to 1.
    """
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not _finite(value) or not _within(value, low, high):
        refuse(value, name, f"a{' finite' if None in (low, high) else ''} number{_bounds(low, high)}",
               owner=owner, hint=hint)  # fmt: skip
    return float(value)


def share(value: Any, name: str, *, owner: str = "", hint: str = "") -> float:
    """Check that a value is a number from 0 to 1, both included, and return it as float.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.
    owner : str
        Name of the class or function with this setting, for the error message; "" adds no name.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Returns
    -------
    float

    Raises
    ------
    SettingError
        The value is not a number from 0 to 1.

    Examples
    --------
    >>> share(1, "guided")
    1.0
    """
    return real_number(value, name, 0, 1, owner=owner, hint=hint)


def choice(value: Any, name: str, allowed: Collection[T], *, owner: str = "", hint: str = "") -> T:
    """Check that a value is one of the allowed values, and return it.

    For a misspelled text, the error message suggests the most similar allowed text.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.
    allowed : collection
        Allowed values.
    owner : str
        Name of the class or function with this setting, for the error message; "" adds no name.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Returns
    -------
    object
        The allowed value that equals `value`.

    Raises
    ------
    SettingError
        The value is not among the allowed values.

    Examples
    --------
    >>> choice("otsu", "binarization", ("otsu", "threshold"))
    'otsu'
    >>> choice("otzu", "binarization", ("otsu", "threshold"))
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: binarization='otzu': must be one of 'otsu', 'threshold'. Did you mean 'otsu'?
    """
    for one in allowed:
        # the type must agree too, or True would pass for 1 and an array would be compared element by element
        if isinstance(value, type(one)) and isinstance(value, bool) == isinstance(one, bool) and value == one:
            return one
    texts = [one for one in allowed if isinstance(one, str)]
    near = difflib.get_close_matches(value, texts, n=1) if isinstance(value, str) else []
    meant = f"Did you mean {near[0]!r}?" if near else ""
    refuse(
        value, name, f"one of {', '.join(map(repr, allowed))}", owner=owner, hint=" ".join(filter(None, (meant, hint)))
    )


def boolean(value: Any, name: str, *, owner: str = "", hint: str = "") -> bool:
    """Check that a value is True or False, and return it as bool; other values, such as 1, are refused.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.
    owner : str
        Name of the class or function with this setting, for the error message; "" adds no name.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Returns
    -------
    bool

    Raises
    ------
    SettingError
        The value is neither True nor False.

    Examples
    --------
    >>> import numpy as np
    >>> boolean(np.True_, "refine")
    True
    """
    import numpy as np  # not at the top: the command line's help does without it

    if not isinstance(value, bool | np.bool_):
        refuse(value, name, "True or False", owner=owner, hint=hint)
    return bool(value)


def seed(value: Any, name: str = "seed") -> int:
    """Check a seed of the initial noise, a whole number from 0 to 2**63 - 1, and return it as int.

    Parameters
    ----------
    value : object
        Value to check.
    name : str
        Name of the setting in the error message.

    Returns
    -------
    int

    Raises
    ------
    SettingError
        The value is not a whole number from 0 to 2**63 - 1.

    Examples
    --------
    >>> import numpy as np
    >>> seed(np.uint8(7))
    7
    >>> seed(-1)
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: seed=-1: must be a whole number from 0 to 9223372036854775807.
    """
    return whole_number(value, name, 0, MAX_SEED)


def seeds(values: Any, name: str = "seed", *, distinct: bool = False) -> list[int]:
    """Check the seeds of one or several images, and return them as a list.

    Parameters
    ----------
    values : int or sequence of int
        One seed, or a sequence, range or one-dimensional array of one or more seeds.
    name : str
        Name of the setting in the error message.
    distinct : bool
        If True, a seed that occurs more than once is refused.

    Returns
    -------
    list of int

    Raises
    ------
    SettingError
        `values` contains no seed; a seed is not a whole number from 0 to 2**63 - 1; or a seed is repeated although
        `distinct` is True.

    Examples
    --------
    >>> import numpy as np
    >>> seeds(3), seeds(range(2)), seeds(np.array([5, 6]))
    ([3], [0, 1], [5, 6])
    """
    if is_whole(values):
        return [seed(values, name)]
    import numpy as np

    rule = f"a whole number from 0 to {MAX_SEED}, or a list of one or more such numbers, one for each image"
    listed = isinstance(values, Sequence | np.ndarray | Iterable) and not isinstance(values, str | bytes | dict)
    if not listed or (isinstance(values, np.ndarray) and values.ndim != 1):
        refuse(values, name, rule)
    checked = [seed(value, name) for value in values]
    if not checked:
        refuse(values, name, rule)
    if distinct and len(set(checked)) < len(checked):
        twice = next(value for value in checked if checked.count(value) > 1)
        raise SettingError(f"{name}={twice} is given more than once: give each seed once.")
    return checked


def refuse(value: Any, name: str, rule: str, *, owner: str = "", hint: str = "") -> NoReturn:
    """Raise the error for a wrong setting, with a message such as "steps=0: must be a whole number, 1 or more."

    Parameters
    ----------
    value : object
        The wrong value.
    name : str
        Name of the setting.
    rule : str
        Allowed values, as the end of a sentence that starts with "must be".
    owner : str
        Name of the class or function with this setting; "" adds no name.
    hint : str
        Sentence with advice to the user, for the end of the error message; "" adds no sentence.

    Raises
    ------
    SettingError
        Always.
    """
    what = f"{name}={_shown(value)}"
    raise SettingError(f"{f'{owner}({what})' if owner else what}: must be {rule}.{f' {hint}' if hint else ''}")


def _within(value: Any, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _bounds(low: float | None, high: float | None) -> str:
    if low is not None and high is not None:
        return f" from {_number(low)} to {_number(high)}"
    if low is not None:
        return f", {_number(low)} or more"
    return "" if high is None else f", {_number(high)} or less"


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _shown(value: Any, length: int = 80) -> str:
    """Text of a value for a message, cut to `length` characters; NumPy scalars are shown as Python numbers."""
    import numpy as np

    if isinstance(value, np.generic):
        value = value.item()
    try:
        text = repr(value)
    except Exception:  # a broken repr must not hide the error; ValueError for integers of many digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 1]}…"
