"""The panel: a prompt, a method and its options, regions by hand, and a run that is watched and steered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from html import escape
from typing import Any

import ipywidgets as w
import numpy as np

from elakit.errors import ElakitError, PromptError, SettingError
from elakit.generation import Run
from elakit.guidance import ELA, METHODS, Method, build, method_title, option_values
from elakit.guidance.layout import Region, check_layout
from elakit.models import adapter_for, default_settings
from elakit.plot.style import entity_colors
from elakit.prompt import Entity, Prompt, parse
from elakit.widgets.live import still, words
from elakit.widgets.live.frames import frame
from elakit.widgets.live.options import REGIONS, Controls
from elakit.widgets.live.session import Session, State
from elakit.widgets.live.widgets import Stage, Words

PLAIN = "plain"
_ELA = ELA()
_SAID: dict[State, str] = {
    "idle": "",
    "running": "Drawing…",
    "paused": "Paused: regions may be drawn or dragged now.",
    "done": "Done.",
    "cancelled": "Cancelled; the run as far as it came is kept.",
    "failed": "Failed; what there was of the run is kept.",
}


class Panel:
    """Draw with a pipeline, watch it, and put things where they are wanted; made by `live`.

    Everything in it can be done from Python too. Only one run is made at a time, in a thread of its own, so that cells
    can be run meanwhile.

    Parameters
    ----------
    pipe, prompt, seed, steps, guidance_scale, guidance
        As `live` takes them.

    Attributes
    ----------
    runs : list of Run
        All runs, in the order in which they ended.
    error : Exception or None
        What the panel shows: why the prompt cannot be read, the run could not start, or ended.
    view : ipywidgets.VBox
        The widget.
    """

    def __init__(
        self,
        pipe: Any,
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
        self._hand: dict[str, Region] = {}  # by the entity's label; also of entities that are gone, should they return
        self._controls: dict[str, Controls] = {}
        self._session = Session(pipe, self._on_state, self._on_preview)
        self._build(
            seed, steps or defaults.steps, defaults.guidance_scale if guidance_scale is None else guidance_scale
        )
        height, width = adapter.default_size()
        self._stage._size = [width, height]
        if guidance is None:
            self.method = PLAIN
        else:
            self._take(guidance)
        self.prompt = prompt
        if (regions := getattr(guidance, REGIONS, None)) is not None and self._prompt is not None:
            for entity, region in zip(self._prompt.entities, regions, strict=False):
                self.draw(entity, region)

    # -- what is to be drawn ---------------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt | None:
        """The prompt as it is read and marked; None where it cannot be read. Give a text, or a `Prompt`."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str | Prompt) -> None:
        self._check_idle("prompt")
        if isinstance(prompt, Prompt):
            self._text.value = prompt.text
            self._mark(prompt)
        elif self._text.value == prompt:
            self._read()
        else:
            self._text.value = prompt

    @property
    def seed(self) -> int:
        """Of the noise that the run starts from."""
        return int(self._seed.value)

    @seed.setter
    def seed(self, seed: int) -> None:
        self._seed.value = seed

    @property
    def steps(self) -> int:
        """Denoising steps."""
        return int(self._steps.value)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._steps.value = steps

    @property
    def guidance_scale(self) -> float:
        """Of classifier-free guidance."""
        return float(self._scale.value)

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._scale.value = scale

    @property
    def method(self) -> str:
        """ "plain", or a name of `elakit.guidance.METHODS`."""
        return str(self._method.value)

    @method.setter
    def method(self, name: str) -> None:
        if name not in (PLAIN, *METHODS):
            raise SettingError(f"method={name!r}: choose one of {', '.join(map(repr, (PLAIN, *METHODS)))}.")
        self._method.value = name

    @property
    def _takes_regions(self) -> bool:
        return self.method != PLAIN and METHODS[self.method].takes_regions

    @property
    def _needs_regions(self) -> bool:
        return self.method != PLAIN and METHODS[self.method].needs_regions

    @property
    def options(self) -> dict[str, Any]:
        """The method's options, without its regions; give those that are to change."""
        return {} if self.method == PLAIN else self._controls_of(self.method).values()

    @options.setter
    def options(self, options: Mapping[str, Any]) -> None:
        there = {} if self.method == PLAIN else self._controls_of(self.method).options
        if unknown := sorted(options.keys() - there.keys()):
            raise SettingError(f"{self.method} has no option {', '.join(unknown)}; there are {', '.join(there)}.")
        self._controls_of(self.method).set(dict(options))

    @property
    def guidance(self) -> Method | None:
        """The method with its options and regions, as the next run gets it; None for a plain one.

        Raises
        ------
        SettingError
            An option is refused, or a region is missing that the method cannot do without.
        """
        if self.method == PLAIN:
            return None
        options = self.options
        if self._takes_regions:
            options[REGIONS] = self._layout()
        if self._needs_regions:
            missing = [label for label, region in self._regions().items() if region is None]
            if missing:
                raise SettingError(f"{self.method} needs a region for each entity: draw {', '.join(missing)}.")
        method: Method = build(METHODS[self.method], options)
        return method

    # -- regions by hand -------------------------------------------------------------------------------------------

    @property
    def regions(self) -> dict[str, Region]:
        """Regions by hand, by the entities' labels: boxes (left, top, right, bottom) in shares, or masks."""
        return {label: region for label, region in self._regions().items() if region is not None}

    def draw(self, entity: str | int | Entity, region: Region | None) -> None:
        """Say where an entity is to be, before a run or in the middle of one.

        ELA anchors to it from its next guided step on; other methods from the next run on.

        Parameters
        ----------
        entity : str, int or Entity
            Its label ("car", "car#2"), its place in the prompt, or itself.
        region : (left, top, right, bottom), ndarray bool (y, x), or None
            A box in shares of the image, or a mask of any resolution; None lets the method localize it.

        Raises
        ------
        SettingError
            There is no such entity, or the region is none.
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
        """Give up all regions by hand: the method localizes every entity."""
        for label in self._regions():
            self._hand.pop(label, None)
        self._steer()

    # -- the run ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """ "idle", "running", "paused", "done", "cancelled" or "failed"."""
        return self._session.state

    @property
    def run(self) -> Run | None:
        """The last run, as far as it came; None while one goes on."""
        return self._session.run

    def start(self) -> None:
        """Begin a run, in a thread of its own.

        Raises
        ------
        ElakitError
            A run is going on, the prompt cannot be read, or a setting is refused.
        """
        self._start(None)

    def step(self, steps: int = 1) -> None:
        """Make so many steps and pause: of the run that is paused, or else of a new one.

        Raises
        ------
        ElakitError
            As `start`; also of fewer than one step.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise SettingError(f"step({steps!r}): make 1 step or more.")
        if self.state == "paused":
            self._session.resume(steps)
        else:
            self._start(steps)

    def pause(self) -> None:
        """Pause after the step that is being made."""
        self._session.pause()

    def resume(self) -> None:
        """Go on to the end."""
        self._session.resume()

    def cancel(self) -> None:
        """End the run after the step that is being made; what there is of it is kept."""
        self._session.cancel()

    def wait(self, timeout: float | None = None) -> Run | None:
        """Wait until the run ends or pauses; gives the run, None where it pauses or goes on.

        The browser can change nothing while a cell waits.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.

        Raises
        ------
        Exception
            What the run failed with; as far as it came it is in `run`.
        """
        if self._session.wait(timeout) == "failed":
            assert self._session.error is not None
            raise self._session.error
        return self.run

    # -- parts -----------------------------------------------------------------------------------------------------

    def _build(self, seed: int, steps: int, scale: float) -> None:
        self._text = w.Textarea(description="Prompt", rows=2, placeholder='"a red car and a blue bird"')
        self._words = Words(self._turn)
        self._seed = w.IntText(seed, description="Seed")
        self._steps = w.BoundedIntText(steps, min=1, max=1000, description="Steps")
        self._scale = w.FloatText(scale, description="Guidance scale", step=0.5)
        names = [(method_title(name), name) for name in (PLAIN, *METHODS)]
        self._method = w.Dropdown(options=names, description="Method")
        for field in (self._text, self._seed, self._steps, self._scale, self._method):
            field.add_class("ell-field")
        self._settings = w.Box([self._seed, self._steps, self._scale, self._method])
        self._settings.add_class("ell-settings")
        self._fold = w.Accordion([w.Box()], selected_index=None)
        self._fold.add_class("ell-fold")
        self._go = w.Button(description="Run", icon="play", tooltip="Draw the image")
        self._go.add_class("ell-go")
        self._hold = w.Button(description="Pause", icon="pause", tooltip="Pause after this step, or go on")
        self._one = w.Button(description="Step", icon="step-forward", tooltip="Make one step, and pause")
        self._end = w.Button(description="Cancel", icon="stop", tooltip="End the run after this step, and keep it")
        self._status = w.HTML()
        self._status.add_class("ell-status")
        buttons = w.Box([self._go, self._hold, self._one, self._end, self._status])
        buttons.add_class("ell-run")
        self._message = w.HTML()
        self._stage = Stage(self._boxes_changed, self._cleared)
        self.view = w.VBox([self._text, self._words, self._message, self._settings, self._fold, buttons, self._stage])
        self.view.add_class("elx")
        self.view.add_class("ell-panel")
        self._text.observe(lambda _change: self._read(), "value")
        for field in (self._method, self._steps):
            field.observe(lambda _change: self._show_method(), "value")
        actions = ((self._go, self.start), (self._hold, self._toggle), (self._one, self.step), (self._end, self.cancel))
        for button, action in actions:
            button.on_click(lambda _button, action=action: self._try(action))

    def _controls_of(self, name: str) -> Controls:
        if name not in self._controls:
            controls = self._controls[name] = Controls(METHODS[name])
            for widget in controls.widgets.values():
                widget.observe(lambda _change: self._show_guidance(), "value")
        return self._controls[name]

    def _take(self, guidance: Method) -> None:
        """Show a method as it is."""
        if METHODS.get(guidance.name) is not type(guidance):
            raise SettingError(f"guidance={guidance!r}: the panel has the methods {', '.join(METHODS)}, and plain.")
        self.method = guidance.name
        self.options = {name: value for name, value in option_values(guidance).items() if name != REGIONS}

    # -- what people do --------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Read the text anew; what was marked by hand is given up."""
        if self._prompt is not None and self._prompt.text == self._text.value:
            return
        try:
            self._mark(parse(self._text.value, self._pipe))
        except ElakitError as error:
            self._prompt = None
            self._tell(error)
            self._show()

    def _turn(self, at: int) -> None:
        """A word was clicked."""
        if self._prompt is None or self._session.going:
            return
        try:
            self._mark(words.turned(self._prompt, at))
        except PromptError as error:
            self._tell(error)

    def _mark(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._tell(None)
        self._show()

    def _boxes_changed(self) -> None:
        if self._prompt is None or len(self._stage.boxes) != len(self._prompt.entities):
            return
        changed = False
        for entity, box in zip(self._prompt.entities, self._stage.boxes, strict=True):
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

    def _toggle(self) -> None:
        if self.state == "paused":
            self.resume()
        else:
            self.pause()

    def _try(self, action: Any) -> None:
        """Do what a button says; what is refused is shown."""
        try:
            action()
        except ElakitError as error:
            self._tell(error)

    def _start(self, pause_after: int | None) -> None:
        self._check_idle("start")
        if self._prompt is None:
            raise self.error or PromptError("There is no prompt yet: say what to draw.")
        call = {
            "prompt": self._prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "guidance": self.guidance,
        }
        self._tell(None)
        self._session.start(call, pause_after)

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _on_preview(self, run: Run, step: int, steps: int) -> None:
        self._stage.show(frame(run, step, steps))
        self._show_guidance()

    def _on_state(self) -> None:
        """The session's state has changed, here or in the run's thread."""
        session = self._session
        if not session.going and session.state != "idle":
            if session.run is not None:
                self.runs.append(session.run)
                done = session.state == "done"
                steps = session.made if done else max(session.made, self.steps)
                self._stage.show(frame(session.run, session.made - 1, steps, finished=done))
            self._tell(session.error)
        self._show()

    def _show(self) -> None:
        """Bring everything up to date that does not change from step to step."""
        going, readable = self._session.going, self._prompt is not None
        for field in (self._text, self._seed, self._steps, self._scale, self._method):
            field.disabled = going
        for controls in self._controls.values():
            for widget in controls.widgets.values():
                widget.disabled = going
        self._go.disabled = going or not readable
        self._one.disabled = self.state == "running" or not readable
        self._hold.disabled = self._end.disabled = not going
        paused = self.state == "paused"
        self._hold.description, self._hold.icon = ("Resume", "play") if paused else ("Pause", "pause")
        said = _SAID[self.state]
        if self._session.no_preview is not None:
            said += f" There was no preview: {self._session.no_preview}"
        self._status.value = escape(said)
        self._words.show(words.chips(self._prompt) if self._prompt is not None else [], going)
        self._show_regions()
        self._show_method()

    def _show_regions(self) -> None:
        regions = self._regions()
        self._stage.name(list(entity_colors(list(regions)).items()), list(regions.values()))

    def _show_method(self) -> None:
        self._fold.layout.display = "none" if self.method == PLAIN else None
        if self.method != PLAIN:
            controls = self._controls_of(self.method)
            self._fold.titles = (f"Options of {method_title(self.method)}",)
            self._fold.children = (controls.view,)
        self._show_guidance()

    def _show_guidance(self) -> None:
        """Say what the method does with regions, and when."""
        guided = self._guided()
        self._stage.guide(
            {
                "takes": self._takes_regions,
                "needs": self._needs_regions,
                "note": self._note(guided),
                "quiet": "Plain drawing has no loss." if self.method == PLAIN else "No guided step yet.",
                "guided": guided,
                "steps": self.steps,
                "state": self.state,
            }
        )

    def _guided(self) -> list[int]:
        """Steps that the method is to guide."""
        try:
            method = self.guidance
            updates = method.plan([1.0] * self.steps, self._prompt) if method and self._prompt else ()
        except ElakitError:
            return []
        return [step for step, update in enumerate(updates[: self.steps]) if update.size or update.hold]

    def _note(self, guided: list[int]) -> str:
        """What a person should know before drawing a region."""
        name = method_title(self.method)
        if not self._takes_regions:
            able = [method_title(each) for each in METHODS if METHODS[each].takes_regions]
            return f"{'Plain drawing' if self.method == PLAIN else name} takes no regions; {', '.join(able)} do."
        if not self._session.going:
            if self._needs_regions:
                return f"{name} needs a region for each entity."
            alone = self._prompt is not None and len(self._prompt.entities) == 1 and not self.regions
            return f"{name} leaves an entity alone that is by itself, unless you draw its region." if alone else ""
        if not METHODS[self.method].steerable:
            return f"{name} keeps to the regions it began with: what you draw now counts from the next run on."
        if not guided or self._session.made > guided[-1]:
            return "Guidance of this run is over: what you draw now counts from the next run on."
        return "What you draw counts from the next guided step on."

    def _tell(self, error: Exception | None) -> None:
        """Show an error, or none."""
        self.error = error
        if error is None:
            self._message.value = ""
            return
        kind = "" if isinstance(error, ElakitError) else f"{type(error).__name__}: "
        self._message.value = f'<p class="ell-error" role="alert">{escape(f"{kind}{error}")}</p>'

    # -- small things ----------------------------------------------------------------------------------------------

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
        if isinstance(entity, int) and not isinstance(entity, bool) and 0 <= entity < len(labels):
            return labels[entity]
        label = entity.label if isinstance(entity, Entity) else entity
        if label not in labels:
            there = ", ".join(map(repr, labels)) or "none"
            raise SettingError(f"draw({label!r}, ...): there is no such entity; there are {there}.")
        return str(label)

    def _check_idle(self, what: str) -> None:
        if self._session.going:
            raise SettingError(f"{what}: a run is going on. Wait for its end (panel.wait()), or panel.cancel() it.")

    def __repr__(self) -> str:
        text = self._prompt.text if self._prompt is not None else self._text.value
        return f"Panel of {text!r}, {self.method}, seed {self.seed}, {self.state}, {len(self.runs)} runs"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The widget, and an image for places without widgets, such as GitHub."""
        data = dict(self.view._repr_mimebundle_(**kwargs))
        regions = self._regions()
        image, width = still.png(self.run, list(regions), list(regions.values()))
        data["text/plain"] = repr(self)
        data["image/png"] = base64.b64encode(image).decode("ascii")
        return data, {"image/png": {"width": width}}


def live(
    pipe: Any,
    prompt: str | Prompt = "",
    *,
    seed: int = 0,
    steps: int | None = None,
    guidance_scale: float | None = None,
    guidance: Method | None = _ELA,
) -> Panel:
    """A panel to draw with: the run is watched as it goes, paused, and steered by regions drawn by hand.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    prompt : str or Prompt, optional
    seed : int
    steps : int, optional
        By default the model's.
    guidance_scale : float, optional
        By default the model's.
    guidance : Method, optional
        What the panel opens with, its regions included; None for plain drawing.

    Returns
    -------
    Panel

    Raises
    ------
    ModelError
        The pipeline's text cross-attention is not known.
    SettingError
        A `guidance` that the panel has no controls for.

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
    >>> [bool(step[0, 0, 0]) for step in run.guidance.regions.values]  # whether the car has the upper left corner
    [True, True, False, False]
    """
    return Panel(pipe, prompt, seed=seed, steps=steps, guidance_scale=guidance_scale, guidance=guidance)
