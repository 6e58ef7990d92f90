"""The panel's widgets: fields, buttons, status, options and the stage, without any knowledge of pipelines or runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import ipywidgets as w

from elakit.widgets.live.widgets import Stage, Words

LARGEST_SEED = 2**53 - 1  # the largest whole number that a browser represents exactly
MOST_STEPS = 1000  # of elakit.generate


class PanelView:
    """The widgets of a `Panel`.

    Parameters
    ----------
    seed, steps, guidance_scale
        Initial values of the fields.
    methods : sequence of (title, name)
        Choices of the method field.
    on_word, on_boxes, on_clear : callable
        Called when a word is clicked, when boxes change, and when regions are cleared (see `Words` and `Stage`).

    Attributes
    ----------
    root : ipywidgets.VBox
        The whole panel.
    text, seed, steps, guidance_scale, method : ipywidgets.Widget
        The fields.
    run, hold, step, cancel : ipywidgets.Button
    words : Words
    stage : Stage
    message, status : ipywidgets.HTML
    """

    def __init__(
        self,
        *,
        seed: int,
        steps: int,
        guidance_scale: float,
        methods: Sequence[tuple[str, str]],
        on_word: Callable[[int], None],
        on_boxes: Callable[[], None],
        on_clear: Callable[[int | None], None],
    ) -> None:
        self.text = w.Textarea(description="Prompt", rows=2, placeholder='"a red car and a blue bird"')
        self.words = Words(on_word)
        self.seed = w.BoundedIntText(seed, min=0, max=LARGEST_SEED, description="Seed")
        self.steps = w.BoundedIntText(steps, min=1, max=MOST_STEPS, description="Steps")
        self.guidance_scale = w.FloatText(guidance_scale, description="Guidance scale", step=0.5)
        self.method = w.Dropdown(options=methods, description="Method")
        settings = w.Box([self.seed, self.steps, self.guidance_scale, self.method])
        settings.add_class("ell-settings")
        for field in self.fields:
            field.add_class("ell-field")
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
        self.stage = Stage(on_boxes, on_clear)
        self.root = w.VBox([self.text, self.words, self.message, settings, self._options, buttons, self.stage])
        self.root.add_class("elx")
        self.root.add_class("ell-panel")

    @property
    def fields(self) -> tuple[Any, ...]:
        """Fields that are locked during a run."""
        return self.text, self.seed, self.steps, self.guidance_scale, self.method

    def show_state(self, *, running: bool, paused: bool, readable: bool, status: str) -> None:
        """Lock fields and buttons as the run's state requires, and show the status line.

        Parameters
        ----------
        running, paused : bool
            Whether the run is making steps, and whether it is paused.
        readable : bool
            Whether the prompt can be parsed.
        status : str
            Plain text; it is escaped.
        """
        going = running or paused
        for field in self.fields:
            field.disabled = going
        self.run.disabled = going or not readable
        self.step.disabled = running or not readable
        self.hold.disabled = self.cancel.disabled = not going
        self.hold.description, self.hold.icon = ("Resume", "play") if paused else ("Pause", "pause")
        self.status.value = escape(status)

    def show_options(self, title: str, options: Any | None) -> None:
        """Show a method's controls in the accordion; None hides it."""
        self._options.layout.display = "none" if options is None else None
        if options is not None:
            self._options.titles = (f"Options of {title}",)
            self._options.children = (options,)

    def show_error(self, text: str) -> None:
        """Show an error message as plain text; an empty one clears it."""
        self.message.value = f'<p class="ell-error" role="alert">{escape(text)}</p>' if text else ""
