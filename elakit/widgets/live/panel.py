"""The panel: a prompt, a method with its options, regions by hand, and a run that can be watched and steered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from elakit.checks import is_whole, real_number, whole_number
from elakit.errors import ElakitError, PromptError, SettingError
from elakit.guidance import ELA, METHODS, Method, build, method_title, option_values
from elakit.guidance.layout import Region, check_layout
from elakit.models import adapter_for, default_settings
from elakit.pipeline import Pipeline
from elakit.plot.style import entity_colors
from elakit.prompt import Entity, Prompt, parse
from elakit.run import Run
from elakit.widgets.live import still, words
from elakit.widgets.live.frames import frame
from elakit.widgets.live.options import REGIONS, Controls
from elakit.widgets.live.session import Session, State
from elakit.widgets.live.view import LARGEST_SEED, MOST_STEPS, PanelView

PLAIN = "plain"
_ELA = ELA()
_STATUS: dict[State, str] = {
    "idle": "",
    "running": "Generating…",
    "paused": "Paused: regions can be drawn or moved now.",
    "done": "Done.",
    "canceled": "Canceled; the partial run is kept.",
    "failed": "Failed; the partial run is kept.",
}


class Panel:
    """Interactive panel that runs a pipeline, shows its attention, and takes regions drawn by hand; made by `live`.

    Everything that the panel offers is available from Python, too. Only one run is made at a time, in a thread of its
    own, so that notebook cells can be run meanwhile.

    Parameters
    ----------
    pipe, prompt, seed, steps, guidance_scale, guidance
        See `live`.

    Attributes
    ----------
    runs : list of Run
        All runs, in the order in which they ended.
    error : Exception or None
        The error that the panel shows: why the prompt cannot be parsed, or why the run could not start or failed.
    """

    def __init__(
        self,
        pipe: Pipeline,
        prompt: str | Prompt,
        *,
        seed: int,
        steps: int | None,
        guidance_scale: float | None,
        guidance: Method | None,
    ) -> None:
        adapter = adapter_for(pipe)
        defaults = default_settings(pipe)
        self.runs: list[Run] = []
        self.error: Exception | None = None
        self._pipe = pipe
        self._prompt: Prompt | None = None
        # Regions by hand, by the entity's label; those of removed entities are kept in case the entity comes back.
        self._hand: dict[str, Region] = {}
        self._controls: dict[str, Controls] = {}
        self._session = Session(pipe, self._on_state, self._on_preview)
        self._view = PanelView(
            seed=whole_number(seed, "seed", 0, LARGEST_SEED),
            steps=whole_number(defaults.steps if steps is None else steps, "steps", 1, MOST_STEPS),
            guidance_scale=real_number(
                defaults.guidance_scale if guidance_scale is None else guidance_scale, "guidance_scale", 0
            ),
            methods=[(method_title(name), name) for name in (PLAIN, *METHODS)],
            on_word=self._toggle_word,
            on_boxes=self._boxes_changed,
            on_clear=self._cleared,
        )
        self._connect()
        height, width = adapter.default_size()
        self._view.stage._size = [width, height]
        if guidance is None:
            self.method = PLAIN
        else:
            self._take(guidance)
        self.prompt = prompt
        if (regions := getattr(guidance, REGIONS, None)) is not None and self._prompt is not None:
            for entity, region in zip(self._prompt.entities, regions, strict=False):
                self.draw(entity, region)

    @property
    def view(self) -> Any:
        """The widget (an ``ipywidgets.VBox``)."""
        return self._view.root

    # -- settings --------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt | None:
        """Parsed prompt with its entities, None where the text cannot be parsed; set it to a text or a `Prompt`."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str | Prompt) -> None:
        self._check_idle("prompt")
        if isinstance(prompt, Prompt):
            self._view.text.value = prompt.text
            self._set_prompt(prompt)
        elif self._view.text.value == prompt:
            self._parse()
        else:
            self._view.text.value = prompt

    @property
    def seed(self) -> int:
        """Seed of the noise that the run starts from."""
        return int(self._view.seed.value)

    @seed.setter
    def seed(self, seed: int) -> None:
        self._view.seed.value = whole_number(seed, "seed", 0, LARGEST_SEED)

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return int(self._view.steps.value)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._view.steps.value = whole_number(steps, "steps", 1, MOST_STEPS)

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance scale."""
        return float(self._view.guidance_scale.value)

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._view.guidance_scale.value = real_number(scale, "guidance_scale", 0)

    @property
    def method(self) -> str:
        """Name of the method: "plain" or a key of `elakit.guidance.METHODS`."""
        return str(self._view.method.value)

    @method.setter
    def method(self, name: str) -> None:
        if name not in (PLAIN, *METHODS):
            raise SettingError(f"method={name!r}: choose one of {', '.join(map(repr, (PLAIN, *METHODS)))}.")
        self._view.method.value = name

    @property
    def _takes_regions(self) -> bool:
        return self.method != PLAIN and METHODS[self.method].takes_regions

    @property
    def _needs_regions(self) -> bool:
        return self.method != PLAIN and METHODS[self.method].needs_regions

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method without its regions; assign a mapping of those to change."""
        return {} if self.method == PLAIN else self._controls_of(self.method).values()

    @options.setter
    def options(self, options: Mapping[str, Any]) -> None:
        there = {} if self.method == PLAIN else self._controls_of(self.method).options
        if unknown := sorted(options.keys() - there.keys()):
            raise SettingError(f"{self.method} has no option {', '.join(unknown)}; its options are {', '.join(there)}.")
        self._controls_of(self.method).set(dict(options))

    @property
    def guidance(self) -> Method | None:
        """Method of the next run, with its options and regions; None for a plain run.

        Raises
        ------
        SettingError
            An option is invalid, or the method needs regions and one is missing.
        """
        if self.method == PLAIN:
            return None
        options = self.options
        if self._takes_regions:
            options[REGIONS] = self._layout()
        if self._needs_regions:
            missing = [label for label, region in self._regions().items() if region is None]
            if missing:
                raise SettingError(
                    f"{self.method} needs a region for each entity; missing: {', '.join(missing)}. "
                    "Draw them, or use panel.draw()."
                )
        method: Method = build(METHODS[self.method], options)
        return method

    # -- regions by hand -------------------------------------------------------------------------------------------

    @property
    def regions(self) -> dict[str, Region]:
        """Regions by hand per entity label: boxes (left, top, right, bottom) in shares of the image, or masks."""
        return {label: region for label, region in self._regions().items() if region is not None}

    def draw(self, entity: str | int | Entity, region: Region | None) -> None:
        """Set the region of an entity, before a run or during one.

        ELA anchors to it from its next guided step on; other methods use it from the next run on.

        Parameters
        ----------
        entity : str, int or Entity
            Label of the entity ("car", "car#2"), its index in the prompt, or the entity itself.
        region : (left, top, right, bottom), ndarray bool (y, x), or None
            A box in shares of the image, or a mask of any resolution; None lets the method localize it.

        Raises
        ------
        SettingError
            There is no such entity, or the region is not valid.
        """
        label = self._label(entity)
        if region is None:
            self._hand.pop(label, None)
        else:
            (checked,) = check_layout([region], f"draw({label!r}, ...)")
            assert checked is not None
            self._hand[label] = checked
        self._steer()

    def clear(self) -> None:
        """Remove all regions by hand, so that the method localizes every entity."""
        for label in self._regions():
            self._hand.pop(label, None)
        self._steer()

    # -- the run ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """State of the run: "idle", "running", "paused", "done", "canceled" or "failed"."""
        return self._session.state

    @property
    def run(self) -> Run | None:
        """The last run, complete or partial; None while one is in progress."""
        return self._session.run

    def start(self) -> None:
        """Start a run in a thread of its own.

        Raises
        ------
        ElakitError
            A run is in progress, the prompt cannot be parsed, or a setting is invalid.
        """
        self._start(None)

    def step(self, steps: int = 1) -> None:
        """Make a number of steps and pause, in the paused run or in a new one.

        Parameters
        ----------
        steps : int
            At least 1.

        Raises
        ------
        ElakitError
            See `start`; also raised when `steps` is less than 1.
        """
        steps = whole_number(steps, "steps", 1, owner="step")
        if self.state == "paused":
            self._session.resume(steps)
        else:
            self._start(steps)

    def pause(self) -> None:
        """Pause after the current step."""
        self._session.pause()

    def resume(self) -> None:
        """Resume the run and continue to its end."""
        self._session.resume()

    def cancel(self) -> None:
        """End the run after the current step; the partial run is kept."""
        self._session.cancel()

    def wait(self, timeout: float | None = None) -> Run | None:
        """Wait until the run ends or pauses.

        The browser cannot change anything while a notebook cell waits.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds.

        Returns
        -------
        Run or None
            The finished run; None where it pauses or is still in progress.

        Raises
        ------
        Exception
            The error that ended the run; the partial run is in `run`.
        """
        if self._session.wait(timeout) == "failed":
            assert self._session.error is not None
            raise self._session.error
        return self.run

    # -- events ----------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        view = self._view
        view.text.observe(lambda _change: self._parse(), "value")
        for field in (view.method, view.steps):
            field.observe(lambda _change: self._show_method(), "value")
        actions = (
            (view.run, self.start), (view.hold, self._pause_or_resume), (view.step, self.step), (view.cancel,
            self.cancel),
        )  # fmt: skip
        for button, action in actions:
            button.on_click(lambda _button, action=action: self._try(action))

    def _controls_of(self, name: str) -> Controls:
        if name not in self._controls:
            controls = self._controls[name] = Controls(METHODS[name])
            for widget in controls.widgets.values():
                widget.observe(lambda _change: self._show_guidance(), "value")
        return self._controls[name]

    def _take(self, guidance: Method) -> None:
        """Show a method with its options."""
        if METHODS.get(guidance.name) is not type(guidance):
            raise SettingError(
                f"guidance={guidance!r}: the panel supports {', '.join(METHODS)}, and None for a plain run."
            )
        self.method = guidance.name
        self.options = {name: value for name, value in option_values(guidance).items() if name != REGIONS}

    def _parse(self) -> None:
        """Parse the text; roles assigned by clicks are reset, and so is what is shown of the last run."""
        if self._prompt is not None and self._prompt.text == self._view.text.value:
            return
        if self._session.state != "idle":
            self._view.stage.show(None)
        try:
            self._set_prompt(parse(self._view.text.value, self._pipe))
        except ElakitError as error:
            self._prompt = None
            self._show_error(error)
            self._show()

    def _toggle_word(self, at: int) -> None:
        """Change the role of a word that was clicked."""
        if self._prompt is None or self._session.going:
            return
        try:
            self._set_prompt(words.toggled(self._prompt, at))
        except PromptError as error:
            self._show_error(error)

    def _set_prompt(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._show_error(None)
        self._show()

    def _boxes_changed(self) -> None:
        boxes = self._view.stage.boxes
        if self._prompt is None or len(boxes) != len(self._prompt.entities):
            return
        changed = False
        for entity, box in zip(self._prompt.entities, boxes, strict=True):
            before = self._hand.get(entity.label)
            if box is not None and (isinstance(before, np.ndarray) or before != tuple(box)):
                self._hand[entity.label] = tuple(box)
                changed = True
            elif box is None and before is not None and not isinstance(before, np.ndarray):
                del self._hand[entity.label]
                changed = True
        if changed:
            self._steer()

    def _cleared(self, which: int | None) -> None:
        if which is None:
            self.clear()
        elif self._prompt is not None and 0 <= which < len(self._prompt.entities):
            self.draw(which, None)

    def _pause_or_resume(self) -> None:
        if self.state == "paused":
            self.resume()
        else:
            self.pause()

    def _try(self, action: Any) -> None:
        """Perform a button's action and show the error if it is refused."""
        try:
            action()
        except ElakitError as error:
            self._show_error(error)

    def _start(self, pause_after: int | None) -> None:
        self._check_idle("start")
        if self._prompt is None:
            raise self.error or PromptError("There is no prompt yet: enter one, such as 'a red car and a blue bird'.")
        call = {
            "prompt": self._prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance": self.guidance,
        }
        self._show_error(None)
        self._session.start(call, pause_after)

    def _on_preview(self, run: Run, step: int, steps: int) -> None:
        self._view.stage.show(frame(run, step, steps))
        self._show_guidance()

    def _on_state(self) -> None:
        """Update the view after the session's state has changed, in this thread or in the run's."""
        session = self._session
        if not session.going and session.state != "idle":
            if session.run is not None:
                self.runs.append(session.run)
                done = session.state == "done"
                steps = session.made if done else max(session.made, self.steps)
                self._view.stage.show(frame(session.run, session.made - 1, steps, finished=done))
            self._show_error(session.error)
        self._show()

    # -- display ---------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Update everything that does not change from step to step."""
        going = self._session.going
        for controls in self._controls.values():
            for widget in controls.widgets.values():
                widget.disabled = going
        status = _STATUS[self.state]
        if self._session.no_preview is not None:
            status += f" No preview could be shown: {self._session.no_preview}"
        self._view.show_state(
            running=self.state == "running",
            paused=self.state == "paused",
            readable=self._prompt is not None,
            status=status,
        )
        self._view.words.show(words.chips(self._prompt) if self._prompt is not None else [], going)
        self._show_regions()
        self._show_method()

    def _show_regions(self) -> None:
        regions = self._regions()
        self._view.stage.name(list(entity_colors(list(regions)).items()), list(regions.values()))

    def _show_method(self) -> None:
        options = None if self.method == PLAIN else self._controls_of(self.method).view
        self._view.show_options(method_title(self.method), options)
        self._show_guidance()

    def _show_guidance(self) -> None:
        """Show whether, how and when the method uses regions."""
        guided = self._guided()
        self._view.stage.guide(
            {
                "takes": self._takes_regions,
                "needs": self._needs_regions,
                "note": self._note(guided),
                "quiet": "A plain run has no loss." if self.method == PLAIN else "No guided step yet.",
                "guided": guided,
                "steps": self.steps,
                "state": self.state,
            }
        )

    def _guided(self) -> list[int]:
        """Steps that the method will guide."""
        try:
            method = self.guidance
            updates = method.plan([1.0] * self.steps, self._prompt) if method and self._prompt else ()
        except ElakitError:
            return []
        return [step for step, update in enumerate(updates[: self.steps]) if update.size or update.hold]

    def _note(self, guided: list[int]) -> str:
        """Hint about regions for the current method and state."""
        name = method_title(self.method)
        if not self._takes_regions:
            able = [method_title(each) for each in METHODS if METHODS[each].takes_regions]
            return f"{'A plain run' if self.method == PLAIN else name} takes no regions; {', '.join(able)} do."
        if not self._session.going:
            if self._needs_regions:
                return f"{name} needs a region for each entity."
            alone = self._prompt is not None and len(self._prompt.entities) == 1 and not self.regions
            return f"{name} does not guide a single entity unless its region is drawn." if alone else ""
        if not METHODS[self.method].steerable:
            return f"{name} keeps the regions it started with: changes apply from the next run on."
        if not guided or self._session.made > guided[-1]:
            return "The guided steps of this run are over: changes apply from the next run on."
        return "Changes apply from the next guided step on."

    def _show_error(self, error: Exception | None) -> None:
        """Show an error, or clear it."""
        self.error = error
        kind = "" if error is None or isinstance(error, ElakitError) else f"{type(error).__name__}: "
        self._view.show_error("" if error is None else f"{kind}{error}")

    # -- helpers ---------------------------------------------------------------------------------------------------

    def _regions(self) -> dict[str, Region | None]:
        entities = self._prompt.entities if self._prompt is not None else ()
        return {entity.label: self._hand.get(entity.label) for entity in entities}

    def _layout(self) -> tuple[Region | None, ...] | None:
        regions = tuple(self._regions().values())
        return None if all(region is None for region in regions) else regions

    def _steer(self) -> None:
        self._session.steer(self._layout())
        self._show_regions()
        self._show_guidance()

    def _label(self, entity: str | int | Entity) -> str:
        labels = list(self._regions())
        if is_whole(entity) and 0 <= entity < len(labels):
            return labels[entity]
        label = entity.label if isinstance(entity, Entity) else entity
        if label not in labels:
            there = ", ".join(map(repr, labels)) or "none"
            raise SettingError(f"draw({label!r}, ...): there is no such entity; the entities are {there}.")
        return str(label)

    def _check_idle(self, what: str) -> None:
        if self._session.going:
            raise SettingError(
                f"{what}: a run is in progress. Wait for its end with panel.wait(), or end it with panel.cancel()."
            )

    def __repr__(self) -> str:
        text = self._prompt.text if self._prompt is not None else self._view.text.value
        return f"Panel of {text!r}, {self.method}, seed {self.seed}, {self.state}, {len(self.runs)} runs"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """MIME bundle of the widget, with a static image for viewers without widgets, such as GitHub."""
        data = dict(self.view._repr_mimebundle_(**kwargs))
        regions = self._regions()
        image, width = still.png(self.run, list(regions), list(regions.values()))
        data["text/plain"] = repr(self)
        data["image/png"] = base64.b64encode(image).decode("ascii")
        return data, {"image/png": {"width": width}}


def live(
    pipe: Pipeline,
    prompt: str | Prompt = "",
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance: Method | None = _ELA,
) -> Panel:
    """Open a panel in which a run can be watched, paused, and steered by regions drawn by hand.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : str or Prompt, optional
    seed : int
    steps : int, optional
        Number of denoising steps; by default the model's.
    guidance_scale : float, optional
        Classifier-free guidance scale; by default the model's.
    guidance : Method, optional
        Method that the panel opens with, its regions included; None for a plain run.

    Returns
    -------
    Panel

    Raises
    ------
    ModelError
        The pipeline's family is not supported.
    SettingError
        A number is out of range, or the panel has no controls for the given `guidance`.

    Examples
    --------
    >>> import elakit
    >>> pipe, method = elakit.load("picture-world"), elakit.RegionalAttention(start=0)
    >>> panel = elakit.live(pipe, "a [red car] and a [bird]", steps=4, guidance=method)
    >>> panel.draw("car", (0, 0, 0.5, 1))  # the bird is localized
    >>> panel.step(2)
    >>> panel.wait()  # paused
    >>> panel.draw("car", (0.5, 0, 1, 1))
    >>> panel.resume()
    >>> run = panel.wait()
    >>> regions = run.guidance.regions.values
    >>> bool(regions[0, 0, 0, 0]), bool(regions[-1, 0, 0, 0])  # whether the car has the upper left corner
    (True, False)
    """
    return Panel(pipe, prompt, seed=seed, steps=steps, guidance_scale=guidance_scale, guidance=guidance)
