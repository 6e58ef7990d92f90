"""Checks of the options of methods; each error names the method, the option, its value and the rule."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, NoReturn

import numpy as np

from elakit import checks


def refuse(method: Any, option: str, rule: str) -> NoReturn:
    """Raise the SettingError of an option: "SynGen(guided=2): must be ...", where `rule` completes the sentence."""
    checks.refuse(getattr(method, option), option, rule, owner=type(method).__name__)


def check_acts(method: Any, cause: str, *options: str) -> None:
    """Refuse options that differ from their defaults although another option makes them ineffective.

    Parameters
    ----------
    method : Method
    cause : str
        Option that switches the others off, with its value, such as "weight=0".
    *options : str
        Names of the options without effect.
    """
    defaults = {each.name: each.default for each in fields(method)}
    for option in options:
        if getattr(method, option) != defaults[option]:
            refuse(method, option, f"left out, because it has no effect with {cause}")


def check_numbers(method: Any, *options: str) -> None:
    """Refuse options that are not finite numbers of 0 or more; convert NumPy numbers."""
    for option in options:
        if not is_number(number(method, option)):
            refuse(method, option, "a finite number, 0 or more")


def check_whole(method: Any, *options: str, least: int = 0) -> None:
    """Refuse options that are not whole numbers of at least `least`; convert NumPy integers to int."""
    for option in options:
        value = checks.whole_number(getattr(method, option), option, least, owner=type(method).__name__)
        object.__setattr__(method, option, value)


def check_flag(method: Any, *options: str) -> None:
    """Refuse options that are neither True nor False."""
    for option in options:
        checks.boolean(getattr(method, option), option, owner=type(method).__name__)


def check_guided(method: Any) -> None:
    """Refuse a ``guided`` that is not a number from 0 to 1; convert NumPy numbers."""
    if not is_number(number(method, "guided"), most=1):
        refuse(method, "guided", "a number from 0 to 1 (a share of the steps)")


def check_refine(method: Any, goal: str) -> None:
    """Refuse a ``refine`` that is not a sequence of (share, value, count); convert lists to tuples.

    The share, from 0 to 1, is that of the denoising steps after which a refinement takes place. The value, a finite
    number of 0 or more, is what the refinement has to reach. The count, a whole number, is its largest number of
    updates. No two entries may have the same share.

    Parameters
    ----------
    method : Method
        Method with an option ``refine``.
    goal : str
        Name of the value for the message, such as "largest attention to reach".
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
    """Return the value of an option; a NumPy scalar is first converted to a Python number.

    The converted number replaces the NumPy scalar in the field of `method`.
    """
    object.__setattr__(method, option, _plain(getattr(method, option)))
    return getattr(method, option)


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def is_number(value: Any, most: float = math.inf) -> bool:
    """True for a finite number from 0 to `most`."""
    real = isinstance(value, int | float) and not isinstance(value, bool)
    return real and math.isfinite(value) and 0 <= value <= most
