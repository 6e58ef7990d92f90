"""The panel's widgets, which show a `PanelModel` and pass the user's actions on to the model.

All state is in the model. An event calls an action of the model, the model calls `show` or `show_run`, and `show` or
`show_run` sets the widgets. When `show` or `show_run` changes a widget, this does not count as an event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from html import escape
from threading import get_ident
from typing import Any

import ipywidgets as w

from elakit.errors import ElakitError
from elakit.guidance import METHODS, method_title
from elakit.plot.style import entity_colors
from elakit.widgets.live import wording, words
from elakit.widgets.live.choices import LARGEST_SEED, MOST_STEPS, NUMBERS, PLAIN
from elakit.widgets.live.controls import Controls
from elakit.widgets.live.model import PanelModel
from elakit.widgets.live.widgets import Stage, Words


class PanelView:
    """Widgets that show a `PanelModel`.

    Parameters
    ----------
    model : PanelModel
        State of the panel, and the actions of its user.
    size : (width, height)
        Size, in pixels, of the images that the pipeline generates.

    Attributes
    ----------
    root : ipywidgets.VBox
        The whole panel.
    text, seed, steps, guidance_scale, method : ipywidgets.Widget
        Fields for the choices of the next run.
    run, hold, step, cancel : ipywidgets.Button
        Buttons: `run` starts a run, `hold` pauses or resumes it, `step` makes one step, `cancel` ends the run.
    words : Words
        Words of the prompt, which can be clicked.
    controls : dict of str to Controls
        Widgets for the options of each method that was chosen so far, by name of the method.
    stage : Stage
        Image with attention, regions and boxes.
    message, status : ipywidgets.HTML
        Error that the model reports, and state of the run.
    """

    def __init__(self, model: PanelModel, size: tuple[int, int]) -> None:
        self._model = model
        self._showing: int | None = None  # the thread that sets the widgets
        choices = model.choices
        self.text = w.Textarea(choices.text, description="Prompt", rows=2, placeholder='"a red car and a blue bird"')
        self.words = Words(self._event(model.toggle_word))
        self.seed = w.BoundedIntText(choices.seed, min=0, max=LARGEST_SEED, description="Seed")
        self.steps = w.BoundedIntText(choices.steps, min=1, max=MOST_STEPS, description="Steps")
        self.guidance_scale = w.FloatText(choices.guidance_scale, description="Guidance scale", step=0.5)
        titles = [(method_title(name), name) for name in (PLAIN, *METHODS)]
        self.method = w.Dropdown(options=titles, value=choices.method, description="Method")
        settings = w.Box([self.seed, self.steps, self.guidance_scale, self.method])
        settings.add_class("ell-settings")
        for field in self.fields:
            field.add_class("ell-field")
        self.controls: dict[str, Controls] = {}
        self._options = w.Accordion([w.Box()], selected_index=None)
        self._options.add_class("ell-fold")
        self.run = w.Button(description="Run", icon="play", tooltip="Generate the image")
        self.run.add_class("ell-go")
        self.hold = w.Button(description="Pause", icon="pause", tooltip="Pause after the current step, or resume")
        self.step = w.Button(description="Step", icon="step-forward", tooltip="Make one step and pause")
        self.cancel = w.Button(
            description="Cancel", icon="stop", tooltip="End the run after the current step; the partial run is kept"
        )
        self.status = w.HTML()
        self.status.add_class("ell-status")
        buttons = w.Box([self.run, self.hold, self.step, self.cancel, self.status])
        buttons.add_class("ell-run")
        self.message = w.HTML()
        self.stage = Stage(size, self._event(model.move_boxes), self._event(model.clear_regions))
        self.root = w.VBox([self.text, self.words, self.message, settings, self._options, buttons, self.stage])
        self.root.add_class("elx")
        self.root.add_class("ell-panel")
        self._observe()
        self.show()

    @property
    def fields(self) -> tuple[Any, ...]:
        """Fields that are locked during a run."""
        return self.text, self.seed, self.steps, self.guidance_scale, self.method

    # -- events --------------------------------------------------------------------------------------------------------

    def _observe(self) -> None:
        model = self._model
        self._on_value(self.text, model.enter_text)
        self._on_value(self.method, model.choose_method)
        for number in NUMBERS:
            self._on_value(getattr(self, number), partial(model.enter_number, number))
        actions = (
            (self.run, model.start), (self.hold, model.pause_or_resume), (self.step, model.step), (self.cancel,
            model.cancel),
        )  # fmt: skip
        for button, action in actions:
            button.on_click(self._event(lambda _button, action=action: action()))

    def _on_value(self, field: Any, action: Callable[[Any], None]) -> None:
        act = self._event(action)
        field.observe(lambda change: act(change["new"]), "value")

    def _event(self, action: Callable[..., None]) -> Callable[..., None]:
        """Event handler that calls `action`, an action of the model.

        If the action raises an `ElakitError`, the panel shows the error. The handler does nothing if the view itself
        changed the widget.
        """

        def act(*values: Any) -> None:
            if self._showing == get_ident():
                return
            try:
                action(*values)
            except ElakitError as error:
                self._model.refuse(error)

        return act

    # -- display -------------------------------------------------------------------------------------------------------

    def show(self) -> None:
        """Show the whole model.

        The model calls this function when the choices for the next run change, in the thread that changes them.
        """
        choices = self._model.choices
        with self._writing():
            self.text.value, self.method.value = choices.text, choices.method
            for number in NUMBERS:
                getattr(self, number).value = getattr(choices, number)
            self._show_options()
            self.words.show(words.chips(choices.prompt) if choices.prompt is not None else [])
            regions = choices.regions()
            self.stage.name(list(entity_colors(list(regions)).items()), list(regions.values()))
            self.show_run()

    def show_run(self) -> None:
        """Show the run and the error, but do not change fields that the user may be editing.

        The model may call this function in any thread.
        """
        with self.stage.lock:
            model, now = self._model, self._model.now
            paused, readable = now.state == "paused", model.choices.prompt is not None
            for field in self.fields:
                field.disabled = now.going
            for controls in self.controls.values():
                controls.lock(now.going)
            self.words.lock(now.going)
            self.run.disabled = now.going or not readable
            self.step.disabled = now.state == "running" or not readable
            self.hold.disabled = self.cancel.disabled = not now.going
            self.hold.description, self.hold.icon = ("Resume", "play") if paused else ("Pause", "pause")
            self.status.value = escape(wording.status(now))
            text = escape(wording.message(model.error))
            self.message.value = f'<p class="ell-error" role="alert">{text}</p>' if text else ""
            self.stage.show(model.frame)
            self.stage.guide(wording.guidance(model.choices, now))

    def _show_options(self) -> None:
        """Show the options of the chosen method in an accordion, which is hidden for a plain run."""
        name = self._model.choices.method
        self._options.layout.display = "none" if name == PLAIN else None
        if name == PLAIN:
            return
        entries = self._model.choices.entries_of(name)
        if name not in self.controls:
            self.controls[name] = self._controls(name)
        self.controls[name].show(entries)
        self._options.titles = (f"Options of {method_title(name)}",)
        self._options.children = (self.controls[name].view,)

    def _controls(self, method: str) -> Controls:
        model = self._model
        return Controls(
            METHODS[method],
            model.choices.entries_of(method),
            self._event(partial(model.enter_option, method)),
            self._event(partial(model.restore_defaults, method)),
        )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Context manager for a block in which the view changes widgets: these changes do not count as events."""
        with self.stage.lock:
            before, self._showing = self._showing, get_ident()
            try:
                yield
            finally:
                self._showing = before
