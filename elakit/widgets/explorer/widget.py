"""The explorer widget: settings that Python and the browser share, and data that is sent to the browser only once."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets as t

from elakit.attention import Recording
from elakit.checks import is_whole, whole_number
from elakit.errors import RecordingError, SettingError
from elakit.numbering import number_of, plural
from elakit.run import Run
from elakit.widgets.explorer import page, still
from elakit.widgets.explorer.describe import describe, sizes_of
from elakit.widgets.explorer.packing import BUDGET
from elakit.widgets.shared.assets import SHARED, source
from elakit.widgets.shared.traits import RefusedError

HERE = Path(__file__).parent
# Settings that both Python and the browser can change; an exported page opens with their current values.
SETTINGS = (
    "step",
    "tokens",
    "token",
    "layer",
    "size",
    "head",
    "normalization",
    "shared_scale",
    "measure",
    "regions",
    "predicted",
    "opacity",
    "smooth",
    "colors",
    "speed",
    "playing",
)


class Explorer(anywidget.AnyWidget):
    """Widget that shows runs side by side in a notebook; `explore` creates it.

    Every setting is an attribute that can be read and set from Python. When the user changes a setting in the browser,
    the attribute changes, too. An invalid value raises `RefusedError`, a subclass of `SettingError`. The message of the
    error lists the valid values.

    Parameters
    ----------
    *runs : Run
        Recorded runs.
    budget : int
        Largest number of bytes of the maps of all runs together, before compression.
    **settings
        Initial values of settings, by name of the setting. The attributes below are the settings.

    Attributes
    ----------
    step : int
        Step that is shown: a denoiser call, counted from 0. Negative numbers count from the end. If runs have different
        numbers of steps, `step` counts the steps of the longest run. A shorter run shows the step at the same
        fraction of its length, up to rounding. Default: the middle step.
    tokens : list of str
        Labels of the words that are shown as thumbnails below each image, such as "car", "red#2", "<start>" or "<end>".
        Default: the nouns of all entities.
    token : str
        Label of the word whose map lies over the large image. A word that is missing in `tokens` is added there.
        Suppose that the word is the noun of the n-th entity of one prompt. Then a run whose prompt lacks the word shows
        the n-th entity of its own prompt. Default: the first of `tokens`.
    layer : str
        "all" for all layers, a part of the network, or the name of a layer. The parts of a U-Net are "down", "mid" and
        "up". The parts of a transformer are "double", "single" and "block". Maps of several layers are averaged.
        Default: "up" if every run has maps in this part, otherwise "all".
    size : int or None
        Map size, the number of locations along the longer side; None averages over all map sizes. If a new `layer` has
        no maps of this size, `size` changes to the only size of the new layer, or to None if there are several.
        Default: the recorded size nearest to 16, or None if a run has no maps of this size.
    head : int or "mean"
        Index of the head whose maps are shown; "mean" shows the mean over the heads. An index is only valid if the
        heads were recorded separately (``RecordSpec(heads="all")``).
    normalization : {"none", "sum", "start"}
        Normalization of the maps. With "none", the values are probabilities. With "sum", the values of each map sum to
        1. With "start", each value is divided by the probability of start-of-text at the same location.
    shared_scale : bool
        True if the maps of all runs, steps and `tokens` share one color scale, False if each map has its own.
    measure : str
        Name of the measure that is plotted over the steps. The names are in the column "measure" of
        ``run.bleeding.to_frame()``; leakage and other matrices are not available. Default: "bleed", or "" if no measure
        is available.
    regions : bool
        True to outline the entities' regions.
    predicted : bool
        Image under the attention map: True for the image that is predicted at the shown step, False for the finished
        image. A run that was generated without ``predicted=True`` always shows the finished image. Default: True if at
        least one run has predicted images.
    opacity : float
        Opacity of the attention overlay, 0 to 1.
    smooth : bool
        True to interpolate colors between locations, False to show each location in one color.
    colors : {"viridis", "magma", "cividis"}
        Color map.
    speed : float
        Playback speed in steps per second, 0.1 to 60.
    playing : bool
        True while the explorer plays the steps one after another.
    """

    _esm = source(SHARED / "maps.js", SHARED / "plot.js", HERE / "view.js")
    _css = source(SHARED / "style.css")

    _meta = t.Dict(read_only=True).tag(sync=True)
    _maps = t.Bytes(read_only=True).tag(sync=True)

    step = t.Any().tag(sync=True)
    tokens = t.Any().tag(sync=True)
    token = t.Any().tag(sync=True)
    layer = t.Any().tag(sync=True)
    size = t.Any().tag(sync=True)
    head = t.Any("mean").tag(sync=True)
    normalization = t.Any("none").tag(sync=True)
    shared_scale = t.Any(True).tag(sync=True)
    measure = t.Any().tag(sync=True)
    regions = t.Any(True).tag(sync=True)
    predicted = t.Any().tag(sync=True)
    opacity = t.Any(0.75).tag(sync=True)
    smooth = t.Any(False).tag(sync=True)
    colors = t.Any("viridis").tag(sync=True)
    speed = t.Any(8.0).tag(sync=True)
    playing = t.Any(False).tag(sync=True)

    def __init__(self, *runs: Run, budget: int = BUDGET, **settings: Any) -> None:
        if unknown := sorted(settings.keys() - set(SETTINGS)):
            raise SettingError(
                f"explore() has no {plural('setting', len(unknown))} {', '.join(unknown)}; its settings are "
                f"{', '.join(SETTINGS)}."
            )
        budget = whole_number(budget, "budget", 1, hint=f"Give a number of bytes, such as {BUDGET}.")
        self._runs = _checked(runs)
        self._payload = describe(self._runs, budget)
        super().__init__(**settings)

    # -- defaults and checks ---------------------------------------------------------------------------------------

    @t.default("_meta")
    def _default_meta(self) -> dict[str, Any]:
        return self._payload.meta

    @t.default("_maps")
    def _default_maps(self) -> bytes:
        return self._payload.maps

    @t.default("step")
    def _default_step(self) -> int:
        return int(self._meta["default"]["step"])

    @t.default("tokens")
    def _default_tokens(self) -> list[str]:
        return list(self._meta["default"]["tokens"])

    @t.default("token")
    def _default_token(self) -> str:
        return str(self.tokens[0])

    @t.default("layer")
    def _default_layer(self) -> str:
        return str(self._meta["default"]["layer"])

    @t.default("size")
    def _default_size(self) -> int | None:
        size = self._meta["default"]["size"]
        return None if size is None else int(size)

    @t.default("measure")
    def _default_measure(self) -> str:
        return str(self._meta["default"]["measure"])

    @t.default("predicted")
    def _default_predicted(self) -> bool:
        return any(run["predicted"] for run in self._meta["runs"])

    @t.validate("token", "layer", "size", "head", "normalization", "measure", "colors")
    def _check_choice(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        value = int(value) if is_whole(value) else value
        there = self._meta["choices"]["tokens" if name == "token" else name]
        # A boolean equals 0 or 1, and a list has no hash: neither is ever a choice.
        if isinstance(value, bool) or value not in there:
            if name == "measure" and not there and value == "":
                return value
            listed = ", ".join(map(repr, there))
            rule = f"choose one of {listed}" if there else f"these runs have no {name}s; leave {name} out"
            raise RefusedError(f"{name}={value!r}: {rule}.")
        return value

    @t.validate("step")
    def _check_step(self, proposal: Any) -> int:
        value, steps = proposal["value"], self._meta["choices"]["step"]
        step = int(value) + (steps[-1] + 1 if value < 0 else 0) if is_whole(value) else None
        if step is None or step not in steps:
            dense = len(steps) > 1 and steps == list(range(steps[0], steps[-1] + 1))
            there = f"any number from {steps[0]} to {steps[-1]}" if dense else ", ".join(map(str, steps))
            raise RefusedError(f"step={value!r}: choose from {there}; negative numbers count from the end.")
        return step

    @t.validate("tokens")
    def _check_tokens(self, proposal: Any) -> list[str]:
        value, there = proposal["value"], self._meta["choices"]["tokens"]
        chosen = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
        missing = [each for each in chosen if each not in there]
        if missing or not chosen:
            what = ", ".join(map(repr, missing)) or "an empty list"
            verb = "are" if len(missing) > 1 else "is"
            raise RefusedError(
                f"tokens: {what} {verb} not available; choose one or more of {', '.join(map(repr, there))}."
            )
        return list(dict.fromkeys(chosen))

    @t.validate("shared_scale", "regions", "predicted", "smooth", "playing")
    def _check_switch(self, proposal: Any) -> bool:
        if not isinstance(proposal["value"], bool | np.bool_):
            raise RefusedError(f"{proposal['trait'].name}={proposal['value']!r}: give True or False.")
        return bool(proposal["value"])

    @t.validate("opacity", "speed")
    def _check_number(self, proposal: Any) -> float:
        name, value = proposal["trait"].name, proposal["value"]
        low, high = {"opacity": (0.0, 1.0), "speed": (0.1, 60.0)}[name]
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise RefusedError(f"{name}={value!r}: give a number from {low:g} to {high:g}.")
        return float(value)

    @t.observe("token")
    def _add_token(self, change: Any) -> None:
        if change["new"] not in self.tokens:
            self.tokens = [*self.tokens, change["new"]]

    @t.observe("tokens")
    def _keep_token(self, change: Any) -> None:
        if self.token not in change["new"]:
            self.token = change["new"][0]

    @t.observe("layer")
    def _keep_size(self, change: Any) -> None:
        sizes = {size for run in self._meta["runs"] for size in sizes_of(run["layers"], change["new"])}
        if self.size is not None and self.size not in sizes:
            self.size = sizes.pop() if len(sizes) == 1 else None

    # -- output ----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path) -> Path:
        """Export the explorer as a self-contained HTML page that needs neither Jupyter nor a network.

        Parameters
        ----------
        path : str or pathlib.Path
            File to write, completely or not at all; an existing file is replaced.

        Returns
        -------
        pathlib.Path
            Absolute path of the page.

        Raises
        ------
        OutputError
            The path is empty, is too long, or is an existing folder. Also raised if the folder that would contain the
            file does not exist or is not writable.
        """
        state = {name: getattr(self, name) for name in SETTINGS}
        return page.write(path, page.render(self._meta, self._maps, state, str(self._esm), str(self._css)))

    def __repr__(self) -> str:
        names = ", ".join(f"{run['name']} (seed {run['seed']})" for run in self._meta["runs"])
        steps, layers = len(self._meta["choices"]["step"]), len(self._meta["runs"][0]["layers"])
        counts = f"{number_of(steps, 'step')}, {number_of(layers, 'layer')}"
        return f"Explorer of {names}: {counts}, {len(self._maps) / 1e6:.2f} MB of maps"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """MIME bundle of the widget, with a static image for viewers without widgets, such as GitHub."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        image, width = still.png(self._runs)
        data["image/png"] = base64.b64encode(image).decode("ascii")
        return data, {**metadata, "image/png": {"width": width}}


def explore(*runs: Run | Sequence[Run], budget: int = BUDGET, **settings: Any) -> Explorer:
    """Explore runs side by side in a notebook: images, attention of chosen words, regions and measures at every step.

    Parameters
    ----------
    *runs : Run or sequence of Run
        Recorded runs, of one prompt or of several.
    budget : int
        Largest number of bytes of the maps of all runs together, before compression. If the maps exceed this budget,
        the longer side of each map is limited to 32 or, if necessary, to 16. If this is not enough, steps are omitted.
        A note at the bottom of the explorer states what was reduced.
    **settings
        Initial values of attributes of `Explorer`, such as ``tokens=["car"], layer="down", step=-1``.

    Returns
    -------
    Explorer
        The widget. Its method `to_html` exports it as an HTML page.

    Raises
    ------
    SettingError
        No run is given, an argument is not a run, or a setting is invalid. For a setting with an invalid value, the
        error is a `RefusedError`, a subclass of `SettingError`.
    RecordingError
        A run was not recorded, or its recording is empty.

    Examples
    --------
    The last of two steps is shown; the other settings have their defaults:

    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> explorer = elakit.explore(run, step=-1)
    >>> explorer.step, explorer.tokens, explorer.layer, explorer.measure
    (1, ['cat', 'lion'], 'up', 'bleed')

    A word that is not in the prompt is refused:

    >>> explorer.tokens = ["zebra"]
    Traceback (most recent call last):
    ...
    elakit.widgets.shared.traits.RefusedError: tokens: 'zebra' is not available; choose one or more of 'a#1', 'cat', ...
    """
    flat: list[Any] = [run for each in runs for run in (each if isinstance(each, list | tuple) else [each])]
    return Explorer(*flat, budget=budget, **settings)


def _checked(runs: Sequence[Any]) -> tuple[Run, ...]:
    if not runs:
        raise SettingError(
            "explore() needs at least one run: run = elakit.generate(pipe, prompt), then elakit.explore(run)."
        )
    for run in runs:
        if isinstance(run, Recording):
            raise SettingError(
                "explore() takes runs, but got a recording, which has no image. Pass "
                "elakit.Run(image, recording.prompt, seed=0, settings={}, recording=recording)."
            )
        if not isinstance(run, Run):
            raise SettingError(
                f"explore() takes runs (from elakit.generate or elakit.open_run), not {type(run).__name__}."
            )
        if run.recording is None:
            raise RecordingError(
                f"The {run.label} run with seed {run.seed} was not recorded. Generate it again with record=True."
            )
    return tuple(runs)
