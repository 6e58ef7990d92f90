"""Widgets for the options of a guidance method: they show what was entered, and report what the user changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w

from elakit.widgets.live.options import Option, options


class Controls:
    """Widgets for the options of one guidance method.

    Parameters
    ----------
    method : type
        Class of the method.
    entries : mapping of str to object
        Initial entries of all options, by name of the option. An entry is the content of an option's input field, as
        `elakit.widgets.live.options.entry` returns it.
    on_entry : callable
        Called when the entry of an option changes, with the name of the option and the new entry.
    on_defaults : callable
        Called without arguments when the user clicks the button "Defaults".

    Attributes
    ----------
    widgets : dict of str to ipywidgets.Widget
        Input field of each option, by name.
    view : ipywidgets.VBox
        All input fields, and the button "Defaults".
    """

    def __init__(
        self,
        method: type[Any],
        entries: Mapping[str, Any],
        on_entry: Callable[[str, Any], None] = lambda name, entry: None,
        on_defaults: Callable[[], None] = lambda: None,
    ) -> None:
        self.widgets = {option.name: _widget(option, entries[option.name]) for option in options(method)}
        for name, widget in self.widgets.items():
            widget.observe(lambda change, name=name: on_entry(name, change["new"]), "value")
        grid, self.back = w.Box(list(self.widgets.values())), w.Button(description="Defaults")
        grid.add_class("elx-options")
        self.back.add_class("ell-defaults")
        self.back.on_click(lambda _button: on_defaults())
        self.view = w.VBox([grid, self.back])

    def show(self, entries: Mapping[str, Any]) -> None:
        """Show an entry in each input field; `entries` has the entries of all options, by name of the option."""
        for name, widget in self.widgets.items():
            widget.value = entries[name]

    def lock(self, locked: bool) -> None:
        """Lock all input fields against changes if `locked` is True; otherwise unlock all input fields."""
        for widget in self.widgets.values():
            widget.disabled = locked


def _widget(option: Option, entry: Any) -> Any:
    make = {"number": w.FloatText, "integer": w.IntText, "switch": w.Checkbox, "choice": w.Dropdown}.get(
        option.kind, w.Text
    )
    settings: dict[str, Any] = {"value": entry, "tooltip": option.about}
    if option.kind == "choice":
        settings["options"] = [("automatic" if each is None else each, each) for each in option.choices]
    elif option.kind == "switch":
        settings["indent"] = False
    elif option.kind == "value":
        settings["placeholder"] = "automatic" if option.default is None else ""
    return make(description=option.name.rpartition(".")[2].replace("_", " "), continuous_update=False, **settings)
