"""Options of guidance methods as canonical JSON: equal options always have the same text.

This text is part of the key that identifies a unit of a sweep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from elakit import checks
from elakit.errors import SettingError, clause
from elakit.guidance.registry import METHODS

if TYPE_CHECKING:
    from elakit.guidance import Method

PLAIN = "plain"
# Options that every method takes in addition to its own: guide only images whose probability of failure, predicted by
# the shipped predictor after a share `guide_after` of the steps (.2 by default), exceeds `guide_above`.
CONDITION = ("guide_above", "guide_after")


def canonical(value: Any) -> str:
    """JSON text of a value; equal values have equal texts, whatever the order of their keys.

    Examples
    --------
    >>> canonical({"b": (1, 2), "a": None})
    '{"a":null,"b":[1,2]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_options(method: str, options: Mapping[str, Any]) -> str:
    """All options of a method, including defaults, as JSON text. Equal options always have the same text.

    Parameters
    ----------
    method : str
        "plain" or a name in `elakit.guidance.METHODS`.
    options : mapping of str to object
        Values of options, by name. The other options have their defaults. "plain" has no options.

        Two more keys restrict guidance to images that are likely to fail. "guide_above" is a probability from 0 to 1:
        an image is guided only if its predicted probability of failure exceeds this value. "guide_after" is the time of
        this prediction, as a share of the steps: 0.1, 0.2 (default), 0.3, 0.5 or 1.
        "guide_after" requires "guide_above".

    Returns
    -------
    str
        JSON object of the options by name, with sorted names.

    Raises
    ------
    SettingError
        There is no such method, or the method needs regions. The method has no such option, or an option has an invalid
        value. "guide_after" is set without "guide_above".

    Examples
    --------
    The default of ELA's option anchor.step_size is 0.1. ELA has no option alpha:

    >>> canonical_options("ela", {}) == canonical_options("ela", {"anchor.step_size": 0.1})
    True
    >>> canonical_options("ela", {"alpha": 1})
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: ELA has no option 'alpha'. ...
    """
    if method == PLAIN:
        if options:
            are = "is" if len(options) == 1 else "are"
            raise SettingError(
                f"plain has no options, but {', '.join(options)} {are} set. Set options of a method instead."
            )
        return "{}"
    from elakit.guidance.metadata import build, method_options, options_of

    if method in METHODS and method not in sweepable():
        raise SettingError(
            f"{method} needs one region per entity, but a sweep has no regions. Use elakit.generate with regions, or "
            f"choose from {', '.join(sweepable())}."
        )
    if method not in METHODS:
        raise SettingError(f"There is no method {method!r}. Choose from {', '.join(sweepable())}.")
    condition = _condition(method, options)
    own = {name: value for name, value in options.items() if name not in CONDITION}
    defaults = {option.name: option.default for option in method_options(METHODS[method])}
    # 1 and 1.0 are the same setting and must give the same key
    values = {
        name: float(value) if isinstance(defaults.get(name), float) and type(value) is int else value
        for name, value in own.items()
    }
    try:
        text = canonical(options_of(build(METHODS[method], values)))
        # workers rebuild the method from this text, so values that JSON cannot represent are refused here
        unchanged = canonical(options_of(build_method(method, json.loads(text)))) == text
    except SettingError:
        raise
    except (TypeError, ValueError) as error:
        raise SettingError(f"{method} does not accept the options {own}: {clause(error)}.") from error
    if not unchanged:
        raise SettingError(f"{method}: the options {own} cannot be stored as JSON. Use numbers, text and lists.")
    return canonical(json.loads(text) | condition)


def build_method(method: str, options: Mapping[str, Any]) -> Method:
    """Build a guidance method from options that were read from JSON.

    Parameters
    ----------
    method : str
        Name in `elakit.guidance.METHODS`.
    options : mapping of str to object
        Options by name. Lists are converted to tuples, because JSON stores tuples as lists. If the value of an option
        is equal to its default, the default itself is used, with its own type.

    Returns
    -------
    Method

    Raises
    ------
    SettingError
        The method has no such option, or an option has an invalid value.
    """
    from elakit.guidance.metadata import build, options_of

    usual = json.loads(canonical(options_of(METHODS[method]())))
    changed = {name: _as_tuples(value) for name, value in options.items() if name not in usual or value != usual[name]}
    built: Method = build(METHODS[method], changed)
    return built


def sweepable() -> list[str]:
    """Names of the methods that a sweep can run: plain, and all methods that do not require regions.

    Examples
    --------
    >>> sweepable()[0], "ela" in sweepable()
    ('plain', True)
    """
    return [PLAIN, *(name for name, kind in METHODS.items() if not kind.needs_regions)]


def _condition(method: str, options: Mapping[str, Any]) -> dict[str, float]:
    """Check the options "guide_above" and "guide_after", and return them as a dict.

    The dict is empty if neither option is set. "guide_after" is a share of the steps, 0.2 by default. A SettingError is
    raised if only "guide_after" is set. `method` is the name of the method in error messages.
    """
    given = {name: options[name] for name in CONDITION if name in options}
    if not given:
        return {}
    given = {name: checks.share(value, f"{method}.{name}") for name, value in given.items()}
    if CONDITION[0] not in given:
        raise SettingError(
            f"{method}.{CONDITION[1]} is set without {method}.{CONDITION[0]}. Set {method}.{CONDITION[0]} too, for "
            "example to 0.2: only images with a higher predicted probability of failure are guided."
        )
    given = {CONDITION[1]: 0.2} | given
    from elakit.prediction import SHARES

    return given | {CONDITION[1]: checks.choice(given[CONDITION[1]], f"{method}.{CONDITION[1]}", SHARES)}


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
