"""Form for a guidance method's options, derived from the fields and the docstring of the method's class.

The form has one input field per option. The content of an input field is called the entry of the option. For most kinds
of options, the entry is the value of the option. For the kind "value", the entry is a Python literal as text.
"""

from __future__ import annotations

import ast
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, Literal

from elakit import checks
from elakit.errors import SettingError
from elakit.guidance import metadata

REGIONS = "regions"  # drawn on the stage, not typed
KINDS: dict[Any, str] = {float: "number", int: "integer", bool: "switch", str: "text"}
_PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?=\n\n\w[^\n]*\n-+\n|\Z)", re.S | re.M)
_ENTRY = re.compile(r"^(\w[^:\n]*)[^\n]*\n((?: {4}[^\n]*\n?)*)", re.M)


@dataclass(frozen=True)
class Option:
    """One option of a guidance method.

    Attributes
    ----------
    name : str
        Name of the option, such as "size". If the option belongs to a part of the method, the name of the part comes
        first, as in "anchor.step_size".
    kind : {"number", "integer", "switch", "choice", "text", "value"}
        Kind of input field. "number" is for a float, "integer" for an int, "switch" for a bool, and "text" for a str.
        "choice" is for an option with a list of allowed values. "value" is for any other type, such as a tuple or a
        number that may be None. A field of the kind "value" takes a Python literal as text, and is empty for None.
    choices : tuple
        Allowed values of an option of the kind "choice"; empty for other kinds.
    default : object
        Default value.
    about : str
        Description of the option, from the docstring of the method.
    """

    name: str
    kind: str
    choices: tuple[Any, ...]
    default: Any
    about: str


def options(method: type[Any]) -> tuple[Option, ...]:
    """Options of a guidance method, in the order of its dataclass fields. The option "regions" is left out.

    Parameters
    ----------
    method : type
        Class of the method, such as `elakit.guidance.ELA`.

    Examples
    --------
    "anchor.decay" is a float, and "anchor.gradient" has two allowed values:

    >>> from elakit.guidance import ELA
    >>> found = {option.name: option for option in options(ELA)}
    >>> found["anchor.decay"].kind, found["anchor.gradient"].choices, "regions" in found
    ('number', ('normalized', 'raw'), False)
    >>> found["anchor.every"].about
    'Interval of the guided steps...'
    """
    return tuple(
        Option(
            name=each.name,
            kind=kind,
            choices=choices,
            default=each.default,
            about=descriptions(each.owner).get(each.field_name, ""),
        )
        for each in metadata.method_options(method)
        if each.name != REGIONS
        for kind, choices in [_kind(each.hint)]
    )


def descriptions(method: type[Any]) -> dict[str, str]:
    """Descriptions of the parameters of a method, by name of the parameter.

    The descriptions come from the sections "Parameters" in the docstrings of the method's class and its base classes.

    Examples
    --------
    >>> from elakit.guidance import SynGen
    >>> descriptions(SynGen)["size"]
    'Size of the maps that are read...'
    """
    found: dict[str, str] = {}
    for each in reversed(method.__mro__[:-1]):
        section = _PARAMETERS.search(cleandoc(each.__doc__ or ""))
        entries = _ENTRY.findall(section[1] if section else "")
        for names, lines in entries:
            text = " ".join(lines.split())
            for name in names.replace(" ", "").split(","):
                # a method's docstring may only refer to the full description in its base
                if name not in found or "see `" not in text:
                    found[name] = text
    return found


def defaults(method: type[Any]) -> dict[str, Any]:
    """Contents of the input fields that show the default values of a method's options, by name of the option.

    An input field of the kind "value" shows the default None as "".

    Examples
    --------
    The default of "anchor.decay" is 0.5, and the default of "localize.lock_from" is None:

    >>> from elakit.guidance import ELA
    >>> defaults(ELA)["anchor.decay"], defaults(ELA)["localize.lock_from"]
    (0.5, '')
    """
    return {option.name: entry(method, option, option.default) for option in options(method)}


def entry(method: type[Any], option: Option, value: Any) -> Any:
    """Content of the input field that shows a value of an option.

    For an option of the kind "value", the content is a text: the value as a Python literal, or "" for None. For any
    other option, the content is the value itself.

    Raises
    ------
    SettingError
        The value does not have the type of the option, so that the input field cannot show the value.

    Examples
    --------
    The option "refine" takes tuples, and so is of the kind "value":

    >>> from elakit.guidance import AttendAndExcite
    >>> refine = next(option for option in options(AttendAndExcite) if option.name == "refine")
    >>> entry(AttendAndExcite, refine, ((0.0, 0.05, 20),))
    '((0.0, 0.05, 20),)'
    """
    owner = method.__name__
    if option.kind == "value":
        return "" if value is None else repr(value)
    if option.kind == "choice":
        return checks.choice(value, option.name, option.choices, owner=owner)
    if option.kind == "switch":
        return checks.boolean(value, option.name, owner=owner)
    if option.kind == "integer":
        return checks.whole_number(value, option.name, owner=owner)
    if option.kind == "number":
        return checks.real_number(value, option.name, owner=owner)
    if not isinstance(value, str):
        checks.refuse(value, option.name, "text", owner=owner)
    return value


def values(method: type[Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a method's options, by name of the option, from the contents of the input fields.

    An input field of the kind "value" contains text. An empty text becomes None, and a Python literal becomes its
    value. Any other text stays text, such as "up" for the layers. If the default of the option is a number or a tuple,
    however, such text is an error. An input field of any other kind contains the value itself.

    Parameters
    ----------
    method : type
        Class of the method.
    entries : mapping of str to object
        Content of each input field, by name of the option.

    Raises
    ------
    SettingError
        The text for an option whose default is a number or a tuple is not a Python literal.

    Examples
    --------
    The text that was entered for the option "refine" becomes a tuple:

    >>> from elakit.guidance import AttendAndExcite
    >>> entries = defaults(AttendAndExcite) | {"refine": "((0.0, 0.1, 3),)"}
    >>> values(AttendAndExcite, entries)["refine"]
    ((0.0, 0.1, 3),)
    """
    return {option.name: _read(method, option, entries[option.name]) for option in options(method)}


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Kind and choices, as in `Option`, of an option whose dataclass field has the type `hint`."""
    alternatives = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "choice", alternatives
    if type(None) in alternatives and any(typing.get_origin(each) is Literal for each in alternatives):
        (allowed,) = (typing.get_args(each) for each in alternatives if typing.get_origin(each) is Literal)
        return "choice", (None, *allowed)
    return KINDS.get(hint, "value"), ()


def _read(method: type[Any], option: Option, shown: Any) -> Any:
    if option.kind != "value":
        return shown
    if not shown.strip():
        return None
    try:
        return ast.literal_eval(shown.strip())
    except (ValueError, SyntaxError):
        if not isinstance(option.default, int | float | tuple):
            return shown.strip()  # a layer name such as "up", for a method that chooses its layers by default
        raise SettingError(
            f"{method.__name__}({option.name}={shown!r}): enter a Python literal such as {option.default!r}."
        ) from None
