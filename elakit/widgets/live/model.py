"""State of a panel: choices for the next run, the run in progress, the data that the panel shows, and all past runs.

Nothing in this module depends on widgets. Each action of the user, in the browser or from Python, is a call of a
function of `PanelModel`. The function changes the state. Then `on_choices` or `on_run` is called, so that a view can
show the new state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from elakit.checks import whole_number
from elakit.errors import ElakitError, SettingError
from elakit.guidance.layout import Box
from elakit.pipeline import Pipeline
from elakit.prompt import Prompt, parse
from elakit.run import Run
from elakit.widgets.live import next_run
from elakit.widgets.live.choices import Choices
from elakit.widgets.live.frames import Frame, frame
from elakit.widgets.live.run_state import RunState
from elakit.widgets.live.session import Session


class PanelModel:
    """State of a `Panel`, and the actions of the user of the panel.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline that generates the images.
    choices : Choices
        Initial choices.

    Attributes
    ----------
    choices : Choices
        Choices for the next run.
    session : Session
        Session that generates the runs in a background thread.
    runs : list of Run
        All runs in the order in which they ended, including canceled and failed runs with at least one completed step.
    frame : Frame or None
        Data of the current or the last run that the panel shows: image, maps, losses and, if the run is complete, the
        judge's verdict. None before the first preview, and after a change of the prompt.
    error : Exception or None
        Error that the panel shows; None if the panel shows no error.
    on_choices : callable
        Called without arguments when the choices have changed, in the thread that changed the choices.
    on_run : callable
        Called without arguments when the state or the preview of the run has changed. The call can come from any
        thread.

    Examples
    --------
    The bracket of the first prompt is not closed. The error is stored, not raised:

    >>> import elakit
    >>> model = PanelModel(elakit.load("picture-world"), Choices(seed=0, steps=3, guidance_scale=3.0))
    >>> model.enter_text("a [cat")
    >>> model.choices.prompt, type(model.error).__name__
    (None, 'PromptError')

    A run with a valid prompt is started, pauses after two of three steps, and is canceled:

    >>> model.enter_text("a [cat]")
    >>> model.step(2)
    >>> model.session.wait(), model.now.made, model.error  # `made` is the number of completed steps
    ('paused', 2, None)
    >>> model.cancel()
    >>> model.session.wait(), len(model.runs)
    ('canceled', 1)
    """

    def __init__(self, pipe: Pipeline, choices: Choices) -> None:
        self.choices = choices
        self.session = Session(pipe, self._run_changed, self._preview_made)
        self.runs: list[Run] = []
        self.frame: Frame | None = None
        self.error: Exception | None = choices.unreadable
        self.on_choices: Callable[[], None] = lambda: None
        self.on_run: Callable[[], None] = lambda: None
        self._read: Callable[[str], Prompt] = partial(parse, pipe=pipe)
        self._obstacle: ElakitError | None = None  # the problem for which a start was refused
        self._started = choices  # those of the current or the last run

    @property
    def now(self) -> RunState:
        """State of the current or the last run; before the first run, ``now.state`` is "idle"."""
        return self.session.now

    # -- choices -------------------------------------------------------------------------------------------------------

    def enter_text(self, text: str) -> None:
        """Set the text of the prompt, and parse the text.

        If the text cannot be parsed, the error is stored in `error` and not raised. If the prompt changes, the display
        of the last run is cleared.

        Raises
        ------
        SettingError
            A run is in progress.
        """
        self._check_idle("prompt")
        self._change_prompt(self.choices.with_text(text, self._read))

    def enter_prompt(self, prompt: Prompt) -> None:
        """Set a parsed prompt; if the prompt changes, the display of the last run is cleared.

        Raises
        ------
        SettingError
            A run is in progress.
        """
        self._check_idle("prompt")
        self._change_prompt(self.choices.with_prompt(prompt))

    def enter_number(self, name: str, value: float) -> None:
        """Set "seed", "steps" or "guidance_scale"; the value is checked when a run is started."""
        self.change(self.choices.with_number(name, value))

    def choose_method(self, name: str) -> None:
        """Choose a guidance method by name, or "plain".

        Options that were entered for this method before are restored.

        Raises
        ------
        SettingError
            There is no such method.
        """
        self.change(self.choices.with_method(name))

    def enter_option(self, method: str, option: str, entry: Any) -> None:
        """Set the entry of a method's option, that is, the content of the option's input field.

        The entry is checked when a run is started.
        """
        self.change(self.choices.with_entry(method, option, entry))

    def restore_defaults(self, method: str) -> None:
        """Restore the default options of a method."""
        self.change(self.choices.with_defaults(method))

    def toggle_word(self, at: int) -> None:
        """Change the role of a word as a click on the word does.

        A word without a role becomes an entity, an entity becomes an attribute, and an attribute loses its role. `at`
        is the index of the word in the prompt, counted from 0. During a run, nothing changes.
        `elakit.widgets.live.words.toggled` explains which entity the new attribute belongs to.

        Raises
        ------
        PromptError
            No entity would be left, or the tokenizer has no separate token for the word.
        """
        if not self.now.going:
            self.change(self.choices.with_word_toggled(at))

    def move_boxes(self, boxes: Sequence[Box | None]) -> None:
        """Set the boxes of all entities, after the user has drawn, moved or removed a box on the image.

        `boxes` has one item per entity: (left, top, right, bottom) as fractions of the image, or None for an entity
        without a box.
        """
        self.change(self.choices.with_boxes(boxes))

    def clear_regions(self, which: int | None = None) -> None:
        """Remove the regions that were given by hand, for one entity or for all entities.

        `which` is the index of the entity, counted from 0; None stands for all entities.
        """
        if which is None:
            self.change(self.choices.without_regions())
        elif 0 <= which < len(self.choices.regions()):
            self.change(self.choices.with_region(which, None))

    def change(self, choices: Choices) -> None:
        """Replace the choices for the next run.

        If the regions given by hand have changed, the new regions are also passed to the run in progress.
        """
        before, self.choices = self.choices, choices
        if choices is before:
            return
        if choices.prompt is not before.prompt or choices.unreadable is not before.unreadable:
            self.error = choices.unreadable
        elif self.error is not None and self.error is self._obstacle:  # it may have been removed
            self.error = self._obstacle = next(iter(next_run.problems(choices).values()), None)
        if choices.by_hand is not before.by_hand:
            self.session.steer(choices.layout())
        self.on_choices()

    # -- the run -------------------------------------------------------------------------------------------------------

    def start(self, pause_after: int | None = None) -> None:
        """Start a run; if `pause_after` is given, the run pauses after this number of steps.

        Raises
        ------
        ElakitError
            A run is in progress, or a choice is invalid.
        """
        self._check_idle("start")
        try:
            call = next_run.call(self.choices)
        except ElakitError as error:
            self._obstacle = error
            raise
        self.error, self._started = None, self.choices
        self.session.start(call, pause_after)

    def step(self, steps: int = 1) -> None:
        """Run a number of denoising steps, then pause.

        A paused run is resumed. If no run is paused, a new run is started.

        Raises
        ------
        ElakitError
            `steps` is not a whole number of at least 1. Also raised if a run is in progress without being paused, or
            if a new run cannot be started because a choice is invalid.
        """
        steps = whole_number(steps, "steps", 1, owner="step")
        if self.now.state == "paused":
            self.session.resume(steps)
        else:
            self.start(steps)

    def pause_or_resume(self) -> None:
        """Resume the run if it is paused; otherwise pause it after the current step."""
        if self.now.state == "paused":
            self.session.resume()
        else:
            self.session.pause()

    def cancel(self) -> None:
        """End the run after the current step; a paused run ends at once."""
        self.session.cancel()

    def refuse(self, error: ElakitError) -> None:
        """Store the error of a refused action in `error`, so that the panel shows the error."""
        self.error = error
        self.on_choices()

    # -- events of the session -----------------------------------------------------------------------------------------

    def _preview_made(self, run: Run, step: int, steps: int) -> None:
        self.frame = frame(run, step, steps)
        self.on_run()

    def _run_changed(self) -> None:
        now = self.now
        if now.over:
            if now.run is not None:
                self.runs.append(now.run)
                done = now.state == "done"
                steps = now.made if done else max(now.made, self._started.steps)
                self.frame = frame(now.run, now.made - 1, steps, finished=done)
            self.error = now.error
        self.on_run()

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _change_prompt(self, choices: Choices) -> None:
        if choices.prompt is None or choices.prompt != self.choices.prompt:
            self.frame = None
        self.change(choices)

    def _check_idle(self, what: str) -> None:
        if self.now.going:
            raise SettingError(
                f"{what}: a run is in progress. Wait for its end with panel.wait(), or end it with panel.cancel()."
            )
