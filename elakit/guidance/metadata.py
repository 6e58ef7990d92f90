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
    """One option of a guidance method: a field of the method's dataclass, or a field of one of the method's parts.

    A part is a field that is a dataclass itself, such as ``anchor`` of `ELA`.

    Attributes
    ----------
    name : str
        Name of the field, such as "size". For a field of a part, the name of the part and a dot precede the name of the
        field, as in "anchor.step_size".
    owner : type
        Class that has the field: the method's class or the part's class. The docstring of this class describes the
        option.
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
        """Name of the option without its part: "step_size" for the option "anchor.step_size"."""
        return self.name.rpartition(".")[2]


REQUIRED: Any = MISSING


def method_options(method: type[Any]) -> tuple[Option, ...]:
    """Options of a method, in the order of the fields of its class.

    If a field is a dataclass itself, the result has the options of this dataclass instead of the field. The names of
    such options are dotted, such as "anchor.step_size".

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
    """True if a type hint is a dataclass, so that a field of this type has options of its own."""
    return isinstance(hint, type) and is_dataclass(hint)


def option_values(method: Any) -> dict[str, Any]:
    """Values of a method's options, by dotted names such as "anchor.step_size".

    Parameters
    ----------
    method : Method
        A guidance method. For an object of another kind, the result is empty.

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
    """Values of a method's options in a form that JSON can represent, by dotted names such as "anchor.step_size".

    Parameters
    ----------
    method : Method
        A guidance method. For an object of another kind, the result is empty.

    Returns
    -------
    dict of str to object
        Result of `option_values`, with nested lists instead of arrays.

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> options_of(ELA(regions=np.ones((1, 1, 2), bool)))["regions"]
    [[[True, True]]]
    """
    return {name: _plain(value) for name, value in option_values(method).items()}


def build(method: type[Any], values: Mapping[str, Any]) -> Any:
    """Create a method from the values of some of its options; the other options keep their defaults.

    Parameters
    ----------
    method : type
        Class of a guidance method, a dataclass.
    values : mapping of str to object
        Values of options, by dotted names such as "anchor.step_size".

    Returns
    -------
    Method

    Raises
    ------
    SettingError
        `values` contains an unknown option or a value that the method does not accept, or a required option is missing.

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
    """Python code that creates a method with given values of its options.

    The arguments of the call are in the order of `values`, but parts come last. A part is an argument that is a
    dataclass itself, such as ``anchor=...`` for the option "anchor.step_size".

    Parameters
    ----------
    method : type
        Class of a guidance method, a dataclass.
    values : mapping of str to object
        Values of options, by dotted names such as "anchor.step_size". Options that are left out keep their defaults.
    module : str
        Name of the module that precedes the name of each class in the code.

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
