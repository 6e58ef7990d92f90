"""The widget: settings that Python and the browser share, and the data that goes to the browser once."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets as t

from elakit.attention import Recording
from elakit.errors import RecordingError, SettingError
from elakit.generation import Run
from elakit.widgets.explorer import page, still
from elakit.widgets.explorer.describe import describe, sizes_of
from elakit.widgets.explorer.packing import BUDGET

HERE = Path(__file__).parent
# What Python and the browser may both change; a page that is written opens as these are.
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
    "opacity",
    "smooth",
    "colors",
    "speed",
    "playing",
)


class RefusedError(SettingError, t.TraitError):
    """A setting that is refused; traitlets takes back what was set along with it."""


class Explorer(anywidget.AnyWidget):
    """Runs side by side, in a notebook.

    Made by `explore`. Every setting can be read and set from Python, and changes with what is done in the browser;
    a value that is not there is refused with a `SettingError` that lists those that are.

    Parameters
    ----------
    *runs : Run
        Recorded ones.
    budget : int
        Bytes of maps that are sent at most, before they are deflated.
    **settings
        Any of the attributes below.

    Attributes
    ----------
    step : int
        Denoiser call that is shown, of the run with the most steps; negative ones count back from the last. Other runs
        show what is nearest by share of the run.
    tokens : list of str
        Words that are shown small under each image, by their labels ("car", "red#2"), and "<start>" and "<end>".
    token : str
        The one that is shown large; one that is not among `tokens` is added to them. A run whose prompt lacks it shows
        the entity at the same place of its own prompt.
    layer : str
        "all", a place ("down", "mid", "up") or the name of a layer; the mean where there are several.
    size : int or None
        Only maps whose larger side is this one; None for the mean over all sizes. Choosing layers that have no such
        maps chooses the size they have, or None where they have several.
    head : int or "mean"
        One head of every layer, where heads were kept.
    normalization : {"none", "sum", "start"}
        Probability, share of the map (each map sums to 1), or multiple of start-of-text's map.
    shared_scale : bool
        One color scale for all runs, steps and tokens shown; else each map has its own.
    measure : str
        What is plotted over the steps, a measure of ``run.bleeding.to_frame()``.
    regions : bool
        Outline the entities' regions.
    opacity : float
        Of attention over the image, 0 to 1.
    smooth : bool
        Interpolate between cells rather than show them.
    colors : {"viridis", "magma", "cividis"}
    speed : float
        Steps a second when playing, up to 60.
    playing : bool
    """

    _esm = "".join((HERE / name).read_text(encoding="utf-8") for name in ("maps.js", "plot.js", "view.js"))
    _css = (HERE / "explorer.css").read_text(encoding="utf-8")

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
    opacity = t.Any(0.75).tag(sync=True)
    smooth = t.Any(False).tag(sync=True)
    colors = t.Any("viridis").tag(sync=True)
    speed = t.Any(8.0).tag(sync=True)
    playing = t.Any(False).tag(sync=True)

    def __init__(self, *runs: Run, budget: int = BUDGET, **settings: Any) -> None:
        if unknown := sorted(settings.keys() - set(SETTINGS)):
            raise SettingError(f"explore() has no setting {', '.join(unknown)}; there are {', '.join(SETTINGS)}.")
        if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 1:
            raise SettingError(f"budget={budget!r}: give the bytes that maps may take, such as {BUDGET}.")
        self._runs = _checked(runs)
        self._payload = describe(self._runs, int(budget))
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

    @t.validate("token", "layer", "size", "head", "normalization", "measure", "colors")
    def _check_choice(self, proposal: Any) -> Any:
        name, value = proposal["trait"].name, proposal["value"]
        value = int(value) if isinstance(value, np.integer) else value
        there = self._meta["choices"]["tokens" if name == "token" else name]
        # A boolean equals 0 or 1, and a list has no hash: neither is ever a choice.
        if isinstance(value, bool) or value not in there:
            if name == "measure" and not there and value == "":
                return value
            raise RefusedError(f"{name}={value!r}: choose one of {', '.join(map(repr, there)) or 'nothing, as yet'}.")
        return value

    @t.validate("step")
    def _check_step(self, proposal: Any) -> int:
        value, steps = proposal["value"], self._meta["choices"]["step"]
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        step = int(value) + (steps[-1] + 1 if value < 0 else 0) if whole else None
        if step is None or step not in steps:
            dense = len(steps) > 1 and steps == list(range(steps[0], steps[-1] + 1))
            there = f"{steps[0]} to {steps[-1]}" if dense else ", ".join(map(str, steps))
            raise RefusedError(f"step={value!r}: there are {there}; negative ones count back from the last.")
        return step

    @t.validate("tokens")
    def _check_tokens(self, proposal: Any) -> list[str]:
        value, there = proposal["value"], self._meta["choices"]["tokens"]
        chosen = [value] if isinstance(value, str) else list(value) if isinstance(value, list | tuple) else [value]
        missing = [each for each in chosen if each not in there]
        if missing or not chosen:
            what = ", ".join(map(repr, missing)) or "an empty list"
            raise RefusedError(f"tokens: {what} is not there; choose one or more of {', '.join(map(repr, there))}.")
        return list(dict.fromkeys(chosen))

    @t.validate("shared_scale", "regions", "smooth", "playing")
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

    # -- looks -----------------------------------------------------------------------------------------------------

    def to_html(self, path: str | Path) -> Path:
        """Write a page that shows the same without Jupyter or Python, and asks for nothing over the network.

        Parameters
        ----------
        path : str or pathlib.Path
            A file that is there is replaced. It is written whole or not at all.

        Returns
        -------
        pathlib.Path
            Absolute.

        Raises
        ------
        OutputError
            The path is a folder, or its folder does not exist or may not be written to.
        """
        state = {name: getattr(self, name) for name in SETTINGS}
        return page.write(path, page.render(self._meta, self._maps, state, str(self._esm), str(self._css)))

    def __repr__(self) -> str:
        names = ", ".join(f"{run['name']} (seed {run['seed']})" for run in self._meta["runs"])
        steps, layers = len(self._meta["choices"]["step"]), len(self._meta["runs"][0]["layers"])
        return f"Explorer of {names}: {steps} steps, {layers} layers, {len(self._maps) / 1e6:.2f} MB of maps"

    def _repr_mimebundle_(self, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """The widget, and a picture of it for places without widgets, such as GitHub."""
        bundle = super()._repr_mimebundle_(**kwargs)
        if bundle is None:
            return None
        data, metadata = bundle
        image, width = still.png(self._runs)
        data["image/png"] = base64.b64encode(image).decode("ascii")
        return data, {**metadata, "image/png": {"width": width}}


def explore(*runs: Run | Sequence[Run], budget: int = BUDGET, **settings: Any) -> Explorer:
    """Look at runs side by side: images, attention of chosen words, regions and measures at every step.

    Parameters
    ----------
    *runs : Run, or sequences of them
        Recorded ones, of the same prompt or of several.
    budget : int
        Bytes of maps that are sent to the browser at most, before they are deflated. Larger maps are shrunk to 32 or 16
        cells a side to fit, then steps are left out; the explorer says so.
    **settings
        How it opens, such as ``tokens=["car"], layer="down", step=-1``: attributes of `Explorer`.

    Returns
    -------
    Explorer
        A widget; ``explore(...).to_html("explorer.html")`` makes a page of it.

    Raises
    ------
    SettingError
        No run, something that is not a run, or a setting that is not there.
    RecordingError
        A run that was not recorded.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> explorer = elakit.explore(run, step=-1)
    >>> explorer.step, explorer.tokens, explorer.layer, explorer.measure
    (1, ['cat', 'lion'], 'up', 'bleed')
    >>> explorer.tokens = ["zebra"]
    Traceback (most recent call last):
    ...
    elakit.widgets.explorer.widget.RefusedError: tokens: 'zebra' is not there; choose one or more of 'a#1', 'cat', ...
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
                "explore() takes runs, and a recording has no image: give "
                "elakit.Run(image, recording.prompt, seed=0, settings={}, recording=recording)."
            )
        if not isinstance(run, Run):
            raise SettingError(
                f"explore() takes runs, not {type(run).__name__}: what elakit.generate or elakit.open_run gives."
            )
        if run.recording is None:
            raise RecordingError(
                f"The {run.label} run with seed {run.seed} was not recorded; generate it with record=True."
            )
    return tuple(runs)
