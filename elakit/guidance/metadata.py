"""Options of guidance methods: functions that list their names and values, create a method, or write its code.

A method's options are the fields of its dataclass. If a field is a dataclass itself (a *part*, such as `LatentStep`),
the part's fields are listed instead, with dotted names: "anchor.step_size".
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from elakit.errors import SettingError


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes
    ----------
    name : str
        Dotted name: the part that the option belongs to (if any), a dot and the keyword argument, as in
        "anchor.step_size"; without a part, the keyword argument alone.
    owner : type
        Class that the option is a field of; its docstring describes the option.
    hint : object
        Type hint of the value.
    default : object
        Default value; `REQUIRED` for an option that must be given.
    """

    name: str
    owner: type[Any] = field(repr=False)
    hint: Any = field(repr=False)
    default: Any = None

    @property
    def field_name(self) -> str:
        """Name of the field in `owner`."""
        return self.name.rpartition(".")[2]


REQUIRED: Any = MISSING


def method_options(method: type[Any]) -> tuple[Option, ...]:
    """Options of a method in the order of its fields, with those of nested dataclasses, such as "anchor.step_size".

    Parameters
    ----------
    method : type
        Class of a guidance method, a dataclass.

    Returns
    -------
    tuple of Option

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> [option.name for option in method_options(ELA)][:2], method_options(ELA)[-1].name
    (['localize.differentiation', 'localize.binarization'], 'size')
    """
    hints = typing.get_type_hints(method)
    found: list[Option] = []
    for each in fields(method):
        hint = hints[each.name]
        if is_part(hint):
            found += [Option(f"{each.name}.{o.name}", o.owner, o.hint, o.default) for o in method_options(hint)]
        else:
            default = each.default if each.default_factory is MISSING else each.default_factory()
            found.append(Option(each.name, method, hint, default))
    return tuple(found)


def is_part(hint: Any) -> bool:
    """True if the type of a field is a part, a dataclass with options of its own."""
    return isinstance(hint, type) and is_dataclass(hint)


def option_values(method: Any) -> dict[str, Any]:
    """Values of a method's options by dotted name.

    Parameters
    ----------
    method : Method
        A guidance method; for any other object the result is empty.

    Returns
    -------
    dict of str to object

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> option_values(ELA())["localize.differentiation"]
    'argmax'
    """
    if not is_dataclass(method) or isinstance(method, type):
        return {}
    values: dict[str, Any] = {}
    for each in fields(method):
        value = getattr(method, each.name)
        if is_dataclass(value):
            values |= {f"{each.name}.{name}": one for name, one in option_values(value).items()}
        else:
            values[each.name] = value
    return values


def options_of(method: Any) -> dict[str, Any]:
    """Values of a method's options by dotted name, in a form that JSON can represent.

    Parameters
    ----------
    method : Method
        A guidance method; for any other object the result is empty.

    Returns
    -------
    dict of str to object
        Result of `option_values` with nested lists instead of arrays.

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> options_of(ELA(regions=np.ones((1, 1, 2), bool)))["regions"]
    [[[True, True]]]
    """
    return {name: _plain(value) for name, value in option_values(method).items()}


def build(method: type[Any], values: Mapping[str, Any]) -> Any:
    """Create a method from option values by dotted name; the other options keep their defaults.

    Parameters
    ----------
    method : type
        Class of a guidance method, a dataclass.
    values : mapping of str to object
        Values by dotted name.

    Returns
    -------
    Method

    Raises
    ------
    SettingError
        `values` names an option that the method does not have, lacks a required one, or has a value that is refused.

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> build(ELA, {"anchor.step_size": 0.2}).anchor.step_size
    0.2
    >>> build(ELA, {"step_size": 0.2})
    Traceback (most recent call last):
    ...
    elakit.errors.SettingError: ELA has no option 'step_size'. Did you mean 'anchor.step_size'? ...
    """
    known = method_options(method)
    names = [option.name for option in known]
    for name in values:
        if name not in names:
            near = [one for one in names if one.endswith(f".{name.rpartition('.')[2]}")]
            meant = f" Did you mean {near[0]!r}?" if near else ""
            raise SettingError(f"{method.__name__} has no option {name!r}.{meant} Choose from {', '.join(names)}.")
    if missing := [option.name for option in known if option.default is REQUIRED and option.name not in values]:
        raise SettingError(f"{method.__name__} needs a value for {', '.join(missing)}: add it to the options.")
    own: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        part, dot, rest = name.partition(".")
        if dot:
            parts.setdefault(part, {})[rest] = value
        else:
            own[name] = value
    hints = typing.get_type_hints(method)
    return method(**own, **{part: build(hints[part], inner) for part, inner in parts.items()})


def as_code(method: type[Any], values: Mapping[str, Any], module: str = "elakit.guidance") -> str:
    """Python code that creates a method from option values by dotted name.

    The arguments are in the order of `values`, but parts, such as ``anchor=...`` for "anchor.step_size", come last.

    Parameters
    ----------
    method : type
        Class of a guidance method, a dataclass.
    values : mapping of str to object
        Values by dotted name. Options that are left out keep their defaults.
    module : str
        Module through which the code refers to the classes.

    Returns
    -------
    str

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> as_code(ELA, {"anchor.step_size": 0.2, "size": 8})
    'elakit.guidance.ELA(size=8, anchor=elakit.guidance.LatentStep(step_size=0.2))'
    """
    own = [f"{name}={value!r}" for name, value in values.items() if "." not in name]
    hints = typing.get_type_hints(method)
    for part in dict.fromkeys(name.partition(".")[0] for name in values if "." in name):
        inner = {name.partition(".")[2]: value for name, value in values.items() if name.startswith(f"{part}.")}
        own.append(f"{part}={as_code(hints[part], inner, module)}")
    return f"{module}.{method.__name__}({', '.join(own)})"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_plain(each) for each in value)
    return value.tolist() if isinstance(value, np.ndarray) else value
