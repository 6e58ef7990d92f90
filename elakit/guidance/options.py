"""Checks of the options of methods; each error names the method, the option, its value and the rule."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np

from elakit import checks


def refuse(method: Any, option: str, rule: str) -> NoReturn:
    """Raise the SettingError for a wrong value of a method's option.

    `option` is the name of the option. `rule` states the allowed values: with the rule "a number from 0 to 1", the
    message is "SynGen(guided=2): must be a number from 0 to 1."
    """
    checks.refuse(getattr(method, option), option, rule, owner=type(method).__name__)


def check_acts(method: Any, cause: str, *options: str) -> None:
    """Check that ineffective options have their default values.

    The value of another option, such as "weight=0", makes these options ineffective.

    Parameters
    ----------
    method : Method
        Method whose options are checked.
    cause : str
        The other option with its value, such as "weight=0", for the error message. The caller makes sure that the
        option has this value.
    *options : str
        Names of the options that have no effect.

    Raises
    ------
    SettingError
        The value of an ineffective option differs from its default.
    """
    defaults = {each.name: each.default for each in fields(method)}
    for option in options:
        if getattr(method, option) != defaults[option]:
            refuse(method, option, f"left out, because it has no effect with {cause}")


def check_numbers(method: Any, *options: str) -> None:
    """Check that the named options of a method are finite numbers, 0 or more; otherwise raise a SettingError.

    NumPy numbers in the fields of `method` are replaced by Python numbers.
    """
    for option in options:
        if not is_number(number(method, option)):
            refuse(method, option, "a finite number, 0 or more")


def check_whole(method: Any, *options: str, least: int = 0) -> None:
    """Check that the named options of a method are whole numbers, at least `least`; otherwise raise a SettingError.

    NumPy integers in the fields of `method` are replaced by Python integers.
    """
    for option in options:
        value = checks.whole_number(getattr(method, option), option, least, owner=type(method).__name__)
        object.__setattr__(method, option, value)


def check_flag(method: Any, *options: str) -> None:
    """Check that the named options of a method are True or False; otherwise raise a SettingError."""
    for option in options:
        checks.boolean(getattr(method, option), option, owner=type(method).__name__)


def check_guided(method: Any) -> None:
    """Check that the option ``guided`` of a method is a number from 0 to 1; otherwise raise a SettingError.

    A NumPy number in the field of `method` is replaced by a Python number.
    """
    if not is_number(number(method, "guided"), most=1):
        refuse(method, "guided", "a number from 0 to 1 (a share of the steps)")


def check_refine(method: Any, goal: str) -> None:
    """Check the option ``refine`` of a method: a sequence of refinements, each of the form (share, value, count).

    The share, a number from 0 to 1, gives the step of the refinement: a share of 0.2 means that 20% of the denoising
    steps precede the refinement. The value, a finite number of 0 or more, has to be reached by the refinement. The
    count, a whole number of 0 or more, is the largest number of latent steps in the refinement. A sequence of another
    type, such as a list, is converted to a tuple in the field of `method`.

    Parameters
    ----------
    method : Method
        Method with an option ``refine``.
    goal : str
        Description of the value for the error message, such as "largest attention to reach".

    Raises
    ------
    SettingError
        The option has another form, or two refinements have the same share.
    """
    rule = (
        f"a sequence of (share of the steps, {goal}, largest number of updates): a number from 0 to 1, a finite "
        "number, 0 or more, and a whole number, 0 or more, such as ((0.0, 0.05, 20),)"
    )
    try:
        entries = tuple((_plain(share), _plain(least), _plain(most)) for share, least, most in method.refine)
    except (TypeError, ValueError):
        refuse(method, "refine", rule)
    for share, least, most in entries:
        if not (is_number(share, most=1) and is_number(least) and checks.is_whole(most) and most >= 0):
            refuse(method, "refine", rule)
    if len({share for share, _, _ in entries}) < len(entries):
        example = "such as ((0.0, 0.05, 20), (0.2, 0.1, 20))"
        refuse(method, "refine", f"a sequence of (share of the steps, {goal}, largest number of updates) in which no "
               f"share occurs twice, {example}")  # fmt: skip
    object.__setattr__(method, "refine", entries)


def number(method: Any, option: str) -> Any:
    """Return the value of a method's option, with a NumPy scalar converted to a Python number.

    A converted number also replaces the NumPy scalar in the field of `method`. Other values are returned unchanged.
    """
    object.__setattr__(method, option, _plain(getattr(method, option)))
    return getattr(method, option)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any, most: float = math.inf) -> bool:
    """True for a finite number from 0 to `most`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value) and 0 <= value <= most
