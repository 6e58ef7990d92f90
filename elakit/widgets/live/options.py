"""Controls for a method's options, derived from the method's dataclass fields and docstring."""

from __future__ import annotations

import ast
import re
import typing
from dataclasses import dataclass
from inspect import cleandoc
from typing import Any, Literal

import ipywidgets as w

from elakit.errors import SettingError
from elakit.guidance import metadata

REGIONS = "regions"  # drawn on the stage, not typed
KINDS: dict[Any, str] = {float: "number", int: "integer", bool: "switch", str: "text"}
_PARAMETERS = re.compile(r"^Parameters\n-+\n(.*?)(?=\n\n\w[^\n]*\n-+\n|\Z)", re.S | re.M)
_ENTRY = re.compile(r"^(\w[^:\n]*)[^\n]*\n((?: {4}[^\n]*\n?)*)", re.M)


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Attributes
    ----------
    name : str
        Prefixed with the part that it belongs to: "anchor.step_size".
    kind : {"number", "integer", "switch", "choice", "text", "value"}
        "value" is a Python literal: a number, a tuple, or an empty field for None.
    choices : tuple
        Allowed values of a "choice".
    default : Any
    about : str
        Description from the method's docstring.
    """

    name: str
    kind: str
    choices: tuple[Any, ...]
    default: Any
    about: str


def options(method: type[Any]) -> tuple[Option, ...]:
    """Options of a method without its regions, in the order of the dataclass fields.

    Parameters
    ----------
    method : type
        One of `elakit.guidance.METHODS`.

    Examples
    --------
    >>> from elakit.guidance import ELA
    >>> found = {option.name: option for option in options(ELA)}
    >>> found["anchor.decay"].kind, found["anchor.gradient"].choices, "regions" in found
    ('number', ('normalized', 'raw'), False)
    >>> found["anchor.every"].about
    'Guide every n-th of these steps only.'
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
    """Description of each parameter in the docstrings of a class and its bases (numpydoc "Parameters").

    Examples
    --------
    >>> from elakit.guidance import SynGen
    >>> descriptions(SynGen)["size"]
    'Longer side of the maps read; by default 16, or the nearest size that the model has.'
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


class Controls:
    """Widgets for the options of one method.

    Parameters
    ----------
    method : type

    Attributes
    ----------
    view : ipywidgets.VBox
    """

    def __init__(self, method: type[Any]) -> None:
        self.method = method
        self.options = {option.name: option for option in options(method)}
        self.widgets = {name: _widget(option) for name, option in self.options.items()}
        grid, back = w.Box(list(self.widgets.values())), w.Button(description="Defaults")
        grid.add_class("elx-options")
        back.add_class("ell-defaults")
        back.on_click(lambda _button: self.reset())
        self.view = w.VBox([grid, back])

    def values(self) -> dict[str, Any]:
        """Current values, in the types that the method expects.

        Raises
        ------
        SettingError
            A text is not a Python literal.
        """
        return {name: _read(self.method, self.options[name], self.widgets[name].value) for name in self.options}

    def set(self, values: dict[str, Any]) -> None:
        """Set the given options; the others keep their values."""
        for name, value in values.items():
            if name in self.widgets:
                self.widgets[name].value = _shown(self.options[name], value)

    def reset(self) -> None:
        """Restore the method's defaults."""
        self.set({name: option.default for name, option in self.options.items()})


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """Kind and choices of an option."""
    alternatives = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return "choice", alternatives
    if type(None) in alternatives and any(typing.get_origin(each) is Literal for each in alternatives):
        (allowed,) = (typing.get_args(each) for each in alternatives if typing.get_origin(each) is Literal)
        return "choice", (None, *allowed)
    return KINDS.get(hint, "value"), ()


def _widget(option: Option) -> Any:
    make = {"number": w.FloatText, "integer": w.IntText, "switch": w.Checkbox, "choice": w.Dropdown}.get(
        option.kind, w.Text
    )
    settings: dict[str, Any] = {"value": _shown(option, option.default), "tooltip": option.about}
    if option.kind == "choice":
        settings["options"] = [("automatic" if each is None else each, each) for each in option.choices]
    elif option.kind == "switch":
        settings["indent"] = False
    elif option.kind == "value":
        settings["placeholder"] = "automatic" if option.default is None else ""
    return make(description=option.name.rpartition(".")[2].replace("_", " "), continuous_update=False, **settings)


def _shown(option: Option, value: Any) -> Any:
    if option.kind == "value":
        return "" if value is None else repr(value)
    return value


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
