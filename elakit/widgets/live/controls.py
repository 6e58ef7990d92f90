"""Widgets for a method's options: they show what was entered, and report changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w

from elakit.widgets.live.options import Option, options


class Controls:
    """Widgets for the options of one method.

    Parameters
    ----------
    method : type
        Class of the method.
    entries : mapping of str to object
        Initial entries, as `elakit.widgets.live.options.defaults` returns them.
    on_entry : callable
        Called with the name of an option and its entry when the entry changes.
    on_defaults : callable
        Called without arguments when the method's defaults are requested.

    Attributes
    ----------
    widgets : dict of str to ipywidgets.Widget
        One per option.
    view : ipywidgets.VBox
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
        """Show entries, given by the names of their options."""
        for name, widget in self.widgets.items():
            widget.value = entries[name]

    def lock(self, locked: bool) -> None:
        """Lock or unlock the widgets."""
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
