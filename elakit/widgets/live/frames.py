"""A run as it is after a step, as the stage shows it: image, token maps, regions and losses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from elakit.errors import ElakitError
from elakit.generation import Run
from elakit.plot.images import LOSSLESS_SIDE, data_uri
from elakit.plot.style import entity_colors
from elakit.widgets.explorer.packing import quantize


@dataclass(frozen=True)
class Frame:
    """What goes to the browser after a step.

    Attributes
    ----------
    about : dict
        As JSON: step, steps, image, the maps' labels and scales, losses.
    maps : bytes
        One a cell: the maps in the order of ``about["maps"]``, then the entity of each cell (0: none).
    """

    about: dict[str, Any]
    maps: bytes


def frame(run: Run, step: int, steps: int, *, finished: bool = False) -> Frame:
    """A run after a step.

    Parameters
    ----------
    run : Run
        As far as it is.
    step, steps : int
        The one that was made last, counted from 0, and how many there are to be.
    finished : bool
        Whether the image is the finished one.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [red car]", steps=1, progress=False)
    >>> shown = frame(run, 0, 1)
    >>> [each["label"] for each in shown.about["maps"]], len(shown.maps) == 3 * 16 * 16
    (['car', 'red'], True)
    """
    maps, owner = _attention(run)
    colors = entity_colors([entity.label for entity in run.prompt.entities])
    levels, tops = quantize(maps.values)
    labels = [str(label) for label in maps.token.values]
    owners = [str(label) for label in maps.entity.values]
    about = {
        "step": step,
        "steps": steps,
        "finished": finished,
        "image": data_uri(run.image, 512),
        "alt": f"Image of “{run.prompt.text}” after {step + 1} of {steps} steps, seed {run.seed}.",
        "width": run.image.width,
        "height": run.image.height,
        "coarse": max(run.image.size) < LOSSLESS_SIDE,
        "rows": maps.sizes["y"],
        "columns": maps.sizes["x"],
        "maps": [
            {"label": label, "owner": whose, "color": colors.get(whose), "scale": float(top)}
            for label, whose, top in zip(labels, owners, tops, strict=True)
        ],
        "entities": [{"label": label, "color": color} for label, color in colors.items()],
        "outlined": owner is not None,
        "losses": [[int(row["step"]), float(row["loss"])] for row in run.guidance.rows] if run.guidance else [],
    }
    cells = owner if owner is not None else np.zeros(levels.shape[1:], np.uint8)
    return Frame(about, levels.tobytes() + cells.tobytes())


def _attention(run: Run) -> tuple[xr.DataArray, np.ndarray | None]:
    """Maps (token, y, x) of entities and attributes at the last step, and the entity of each cell (y, x), from 1."""
    if run.recording is None or not run.recording.steps:
        return _nothing(), None
    recording = run.recording.sel(step=-1)
    last = replace(run, recording=recording, _derived={})
    try:
        maps = last.entity_maps().isel(step=0)
    except ElakitError:  # no entity was recorded
        return _nothing(), None
    regions = last.regions.isel(step=0).values
    owner = (regions * np.arange(1, len(regions) + 1, dtype=np.uint8)[:, None, None]).max(0)
    if any(entity.attributes for entity in run.prompt.entities):
        size = max(maps.sizes["y"], maps.sizes["x"])
        said = recording.maps("attributes", recording.decoder, size).isel(step=0)
        maps = xr.concat([maps, said], "token", join="override", coords="minimal", compat="override")
    return maps, owner


def _nothing() -> xr.DataArray:
    return xr.DataArray(
        np.zeros((0, 1, 1), np.float32),
        dims=("token", "y", "x"),
        coords={"token": np.zeros(0, str), "entity": ("token", np.zeros(0, str))},
    )
