"""The panel: a prompt, a method with its options, regions by hand, and a run that can be watched and steered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from elakit.guidance import ELA, Method
from elakit.guidance.layout import Region
from elakit.models import adapter_for, default_settings
from elakit.pipeline import Pipeline
from elakit.prompt import Entity, Prompt, parse
from elakit.run import Run
from elakit.widgets.live import next_run, still
from elakit.widgets.live.choices import NUMBERS, Choices
from elakit.widgets.live.model import PanelModel
from elakit.widgets.live.options import REGIONS
from elakit.widgets.live.run_state import State
from elakit.widgets.live.view import PanelView

_ELA = ELA()


class Panel:
    """Interactive panel that runs a pipeline, shows its attention, and takes regions drawn by hand; made by `live`.

    Everything that the panel offers is available from Python, too. One run is made at a time, in a separate thread, so
    that notebook cells can be run meanwhile. A `PanelModel` holds the state, and the widgets are a `PanelView` of it.

    Parameters
    ----------
    pipe, prompt, seed, steps, guidance_scale, guidance
        See `live`.
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
        choices = Choices(
            seed=NUMBERS["seed"](seed),
            steps=NUMBERS["steps"](defaults.steps if steps is None else steps),
            guidance_scale=NUMBERS["guidance_scale"](
                defaults.guidance_scale if guidance_scale is None else guidance_scale
            ),
        )
        if guidance is not None:
            choices = choices.with_guidance(guidance)
        if isinstance(prompt, Prompt):
            choices = choices.with_prompt(prompt)
        else:
            choices = choices.with_text(prompt, lambda text: parse(text, pipe))
        if (regions := getattr(guidance, REGIONS, None)) is not None and choices.prompt is not None:
            for entity, region in zip(choices.prompt.entities, regions, strict=False):
                choices = choices.with_region(entity, region)
        self._model = PanelModel(pipe, choices)
        self._session = self._model.session
        height, width = adapter.default_size()
        self._view = PanelView(self._model, (width, height))
        self._model.on_choices, self._model.on_run = self._view.show, self._view.show_run

    @property
    def runs(self) -> list[Run]:
        """All runs in the order in which they ended, including canceled and failed ones after at least one step."""
        return self._model.runs

    @property
    def error(self) -> Exception | None:
        """Error that the panel shows, of an invalid prompt, a refused action or a failed run; None if there is none."""
        return self._model.error

    @property
    def view(self) -> Any:
        """The widget (an ``ipywidgets.VBox``)."""
        return self._view.root

    # -- settings --------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt | None:
        """Parsed prompt with its entities; None if the text cannot be parsed. Assign a text or a `Prompt` to set it."""
        return self._model.choices.prompt

    @prompt.setter
    def prompt(self, prompt: str | Prompt) -> None:
        if isinstance(prompt, Prompt):
            self._model.enter_prompt(prompt)
        else:
            self._model.enter_text(prompt)

    @property
    def seed(self) -> int:
        """Seed of the noise that the run starts from."""
        return int(self._model.choices.seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self._number("seed", seed)

    @property
    def steps(self) -> int:
        """Number of denoising steps."""
        return int(self._model.choices.steps)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._number("steps", steps)

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance scale."""
        return float(self._model.choices.guidance_scale)

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._number("guidance_scale", scale)

    @property
    def method(self) -> str:
        """Name of the method: "plain" or a key of `elakit.guidance.METHODS`."""
        return self._model.choices.method

    @method.setter
    def method(self, name: str) -> None:
        self._model.choose_method(name)

    @property
    def options(self) -> dict[str, Any]:
        """Options of the method by name. To change some of them, assign a mapping with these.

        Regions are not among them; see `draw`.
        """
        return self._model.choices.options()

    @options.setter
    def options(self, options: Mapping[str, Any]) -> None:
        self._model.change(self._model.choices.with_options(options))

    @property
    def guidance(self) -> Method | None:
        """Method of the next run, with its options and regions; None for a plain run.

        Raises
        ------
        SettingError
            An option is invalid, or the method needs regions and one is missing.
        """
        return next_run.guidance(self._model.choices)

    # -- regions by hand -------------------------------------------------------------------------------------------

    @property
    def regions(self) -> dict[str, Region]:
        """Regions by hand, by label: boxes (left, top, right, bottom) as fractions of the image, or masks (y, x)."""
        return {label: region for label, region in self._model.choices.regions().items() if region is not None}

    def draw(self, entity: str | int | Entity, region: Region | None) -> None:
        """Set the region of an entity, before a run or during one.

        ELA anchors to it from its next guided step on; other methods use it from the next run on.

        Parameters
        ----------
        entity : str, int or Entity
            Label of the entity ("car", "car#2"), its index in the prompt, or the entity itself.
        region : (left, top, right, bottom), ndarray bool (y, x), or None
            Box as fractions of the image, or mask of any resolution; None lets the method localize the entity.

        Raises
        ------
        SettingError
            There is no such entity, or the region is not valid.
        """
        self._model.change(self._model.choices.with_region(entity, region))

    def clear(self) -> None:
        """Remove all regions by hand, so that the method localizes every entity."""
        self._model.clear_regions()

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
        self._model.start()

    def step(self, steps: int = 1) -> None:
        """Run a number of steps and pause, in the paused run or in a new one.

        Parameters
        ----------
        steps : int
            Number of steps, at least 1.

        Raises
        ------
        ElakitError
            See `start`; also raised when `steps` is less than 1.
        """
        self._model.step(steps)

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

    # -- display ---------------------------------------------------------------------------------------------------

    def _number(self, name: str, value: float) -> None:
        self._model.change(self._model.choices.with_number(name, NUMBERS[name](value)))

    def __repr__(self) -> str:
        text = self.prompt.text if self.prompt is not None else self._model.choices.text
        return f"Panel of {text!r}, {self.method}, seed {self.seed}, {self.state}, {len(self.runs)} runs"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """MIME bundle of the widget, with a static image for viewers without widgets, such as GitHub."""
        data = dict(self.view._repr_mimebundle_(**kwargs))
        regions = self._model.choices.regions()
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
        Initial prompt; by default the user enters one.
    seed : int
        Initial seed of the noise.
    steps : int, optional
        Initial number of denoising steps; by default the model's.
    guidance_scale : float, optional
        Initial classifier-free guidance scale; by default the model's.
    guidance : Method or None
        Initial method with its options and regions; by default ELA. None for plain runs.

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
