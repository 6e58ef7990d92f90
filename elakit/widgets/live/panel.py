"""The panel: a prompt, a method with its options, regions given by hand, and a run that can be watched and steered."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from elakit.guidance import ELA, Method
from elakit.guidance.layout import Region
from elakit.models import adapter_for, default_settings
from elakit.numbering import number_of
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
    """Interactive panel that generates images, shows attention, and takes regions drawn by hand; `live` opens a panel.

    Everything that the panel offers is available from Python, too. The panel generates one image at a time, in a
    separate thread, so that notebook cells can be run meanwhile. A `PanelModel` holds the state, and a `PanelView` has
    the widgets that show the state.

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
        """All runs in the order in which they ended.

        A canceled or failed run is included if at least one step was completed.
        """
        return self._model.runs

    @property
    def error(self) -> Exception | None:
        """Error that the panel shows; None if the panel shows no error.

        The error comes from an invalid prompt, a refused action or a failed run.
        """
        return self._model.error

    @property
    def view(self) -> Any:
        """Widget that displays the whole panel, an ``ipywidgets.VBox``."""
        return self._view.root

    # -- settings --------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> Prompt | None:
        """Parsed prompt of the next run; None if no prompt was entered, or if the text cannot be parsed.

        A text or a `Prompt` can be assigned. If an assigned text cannot be parsed, the error is stored in `error` and
        not raised.
        """
        return self._model.choices.prompt

    @prompt.setter
    def prompt(self, prompt: str | Prompt) -> None:
        if isinstance(prompt, Prompt):
            self._model.enter_prompt(prompt)
        else:
            self._model.enter_text(prompt)

    @property
    def seed(self) -> int:
        """Seed of the noise that the next run starts from. Assign a number to change the seed."""
        return int(self._model.choices.seed)

    @seed.setter
    def seed(self, seed: int) -> None:
        self._number("seed", seed)

    @property
    def steps(self) -> int:
        """Number of denoising steps of the next run. Assign a number to change this number."""
        return int(self._model.choices.steps)

    @steps.setter
    def steps(self, steps: int) -> None:
        self._number("steps", steps)

    @property
    def guidance_scale(self) -> float:
        """Classifier-free guidance scale of the next run. Assign a number to change the scale."""
        return float(self._model.choices.guidance_scale)

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        self._number("guidance_scale", scale)

    @property
    def method(self) -> str:
        """Name of the next run's guidance method: "plain" or a key of `elakit.guidance.METHODS`.

        Assign a name to change the method.
        """
        return self._model.choices.method

    @method.setter
    def method(self, name: str) -> None:
        self._model.choose_method(name)

    @property
    def options(self) -> dict[str, Any]:
        """Values of the guidance method's options, by name of the option.

        Assign a mapping to change some options; the options that the mapping does not name keep their values. Regions
        are not among the options: `draw` sets the regions.
        """
        return self._model.choices.options()

    @options.setter
    def options(self, options: Mapping[str, Any]) -> None:
        self._model.change(self._model.choices.with_options(options))

    @property
    def guidance(self) -> Method | None:
        """Guidance method of the next run, with its options and regions; None for a plain run.

        Raises
        ------
        SettingError
            An option is invalid, or an entity has no region although the method needs a region for each entity.
        """
        return next_run.guidance(self._model.choices)

    # -- regions by hand -------------------------------------------------------------------------------------------

    @property
    def regions(self) -> dict[str, Region]:
        """Regions that were given by hand, by label of the entity; the dict has no key for an entity without a region.

        Regions are boxes (left, top, right, bottom) as fractions of the image, or boolean masks (y, x).
        """
        return {label: region for label, region in self._model.choices.regions().items() if region is not None}

    def draw(self, entity: str | int | Entity, region: Region | None) -> None:
        """Set or remove the region of an entity, before or during a run.

        The next run uses the new region if its method takes regions. A run in progress uses the new region, from the
        next guided step on, if its method can be steered, such as "ela" or "regional-attention".

        Parameters
        ----------
        entity : str, int or Entity
            Label of the entity, such as "car" or "car#2"; or the index of the entity in the prompt, counted from 0; or
            the `Entity` itself.
        region : (left, top, right, bottom), ndarray bool (y, x), or None
            Box as fractions of the image, or mask of any resolution. None removes the region. The method then localizes
            the entity, or cannot start if the method needs a region for each entity.

        Raises
        ------
        SettingError
            There is no such entity, or the region is not valid.
        """
        self._model.change(self._model.choices.with_region(entity, region))

    def clear(self) -> None:
        """Remove all regions that were given by hand, as ``draw(entity, None)`` does for one entity."""
        self._model.clear_regions()

    # -- the run ---------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """State of the current or the last run: "running", "paused", "done", "canceled" or "failed".

        It is "idle" before the first run.
        """
        return self._session.state

    @property
    def run(self) -> Run | None:
        """The last run, complete or partial, once it has ended.

        None before the first run, and while a run is in progress. Also None after a failed run in which no step was
        completed or whose image cannot be decoded.
        """
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
        """Run a number of denoising steps, then pause.

        A paused run is resumed. If no run is paused, a new run is started.

        Parameters
        ----------
        steps : int
            Number of steps, at least 1.

        Raises
        ------
        ElakitError
            `steps` is not a whole number of at least 1. Also raised if a run is in progress without being paused, or
            if a new run cannot be started because the prompt or a setting is invalid.
        """
        self._model.step(steps)

    def pause(self) -> None:
        """Pause the run after the current step; no effect if no run is in progress."""
        self._session.pause()

    def resume(self) -> None:
        """Resume the paused run, to its end; no effect if no run is paused."""
        self._session.resume()

    def cancel(self) -> None:
        """End the run after the current step; a paused run ends at once. `run` and `runs` keep the partial run."""
        self._session.cancel()

    def wait(self, timeout: float | None = None) -> Run | None:
        """Wait until the run ends or pauses.

        The browser cannot change anything while a notebook cell waits.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds; by default without limit.

        Returns
        -------
        Run or None
            The run that has ended; a canceled run is partial. None if the run is paused, if the run did not end within
            `timeout`, or if no run was started.

        Raises
        ------
        Exception
            The run failed. The exception is the error that ended the run; `run` has the partial run, if any.
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
        count = number_of(len(self.runs), "run")
        return f"Panel of {text!r}, {self.method}, seed {self.seed}, {self.state}, {count}"

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
        Pipeline that generates the images.
    prompt : str or Prompt, optional
        Initial prompt; by default the user enters the prompt. If a text cannot be parsed, the panel shows the error.
    seed : int
        Initial value of the seed from which the noise is sampled.
    steps : int, optional
        Initial number of denoising steps; by default that of the model.
    guidance_scale : float, optional
        Initial classifier-free guidance scale; by default that of the model.
    guidance : Method or None
        Initial guidance method with its options, by default ELA; None for plain runs. The regions of the method are
        assigned to the entities of `prompt`. Without a prompt, the regions are ignored.

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
    The car has the left half of the image in the first two of four steps. The method finds the region of the bird:

    >>> import elakit
    >>> pipe, method = elakit.load("picture-world"), elakit.RegionalAttention(start=0)
    >>> panel = elakit.live(pipe, "a [red car] and a [bird]", steps=4, guidance=method)
    >>> panel.draw("car", (0, 0, 0.5, 1))
    >>> panel.step(2)
    >>> panel.wait()

    Then the car gets the right half:

    >>> panel.draw("car", (0.5, 0, 1, 1))
    >>> panel.resume()
    >>> run = panel.wait()

    The upper left corner is in the region of the car at the first step, but not at the last step:

    >>> first, last = run.guidance.regions.sel(entity="car").values[[0, -1]]
    >>> bool(first[0, 0]), bool(last[0, 0])
    (True, False)
    """
    return Panel(pipe, prompt, seed=seed, steps=steps, guidance_scale=guidance_scale, guidance=guidance)
