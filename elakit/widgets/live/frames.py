"""Frames: the data of a partial or finished run that the live panel shows after a step.

A frame has the image, the maps of the tokens, the regions, and the losses of the run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from elakit.errors import ElakitError
from elakit.plot.image_figures import LOSSLESS_SIDE, data_uri
from elakit.plot.style import entity_colors
from elakit.run import Run
from elakit.widgets.shared.quantize import quantize


@dataclass(frozen=True)
class Frame:
    """Data of a run that is sent to the browser after a step.

    Attributes
    ----------
    about : dict
        All data except the maps and regions, as values that JSON can represent: the last completed step, the image,
        labels and scales of the maps, losses, the judge's verdict, and more.
    maps : bytes
        The maps in the order of ``about["maps"]``, followed by the regions. Each map has one byte per location. The
        regions together have one byte per location: 0 outside every region, 1 in the region of the first entity, 2 in
        the region of the second, and so on.
    """

    about: dict[str, Any]
    maps: bytes


def frame(run: Run, step: int, steps: int, *, finished: bool = False) -> Frame:
    """Create the frame that shows a run after a step.

    Parameters
    ----------
    run : Run
        The partial or finished run.
    step : int
        Index of the last completed step, counted from 0.
    steps : int
        Number of steps of the run.
    finished : bool
        True if the run is complete. The frame of a complete run also has the judge's verdict, if there is a judge.

    Returns
    -------
    Frame

    Examples
    --------
    The frame has the maps of two words, and the regions, each with 16 x 16 locations:

    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [red car]", steps=1, progress=False)
    >>> shown = frame(run, 0, 1)
    >>> [each["label"] for each in shown.about["maps"]], len(shown.maps) == (2 + 1) * 16 * 16
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
            {"label": label, "owner": entity, "color": colors.get(entity), "scale": float(top)}
            for label, entity, top in zip(labels, owners, tops, strict=True)
        ],
        "entities": [{"label": label, "color": color} for label, color in colors.items()],
        "outlined": owner is not None,
        "verdict": str(run.verdict) if finished and run.verdict is not None else "",
        "losses": [[int(row["step"]), float(row["loss"])] for row in run.guidance.rows] if run.guidance else [],
    }
    owners_of = owner if owner is not None else np.zeros(levels.shape[1:], np.uint8)
    return Frame(about, levels.tobytes() + owners_of.tobytes())


def _attention(run: Run) -> tuple[xr.DataArray, np.ndarray | None]:
    """Maps and regions of a run at its last recorded step.

    Returns
    -------
    maps : DataArray (token, y, x)
        Maps of the entities, followed by the maps of their attributes. The array has no tokens, and the shape
        (0, 1, 1), if no step or no entity was recorded.
    owner : ndarray, uint8, (y, x), or None
        0 at the locations outside every region, 1 in the region of the first entity, 2 in the region of the second,
        and so on. None if no step or no entity was recorded.
    """
    if run.recording is None or not run.recording.steps:
        return _no_maps(), None
    recording = run.recording.sel(step=-1)
    last = replace(run, recording=recording)
    try:
        maps = last.entity_maps().isel(step=0)
    except ElakitError:  # no entity was recorded
        return _no_maps(), None
    regions = last.regions.isel(step=0).values
    owner = (regions * np.arange(1, len(regions) + 1, dtype=np.uint8)[:, None, None]).max(0)
    if any(entity.attributes for entity in run.prompt.entities):
        size = max(maps.sizes["y"], maps.sizes["x"])
        attributes = recording.maps("attributes", recording.decoder, size).isel(step=0)
        maps = xr.concat([maps, attributes], "token", join="override", coords="minimal", compat="override")
    return maps, owner


def _no_maps() -> xr.DataArray:
    return xr.DataArray(
        np.zeros((0, 1, 1), np.float32),
        dims=("token", "y", "x"),
        coords={"token": np.zeros(0, str), "entity": ("token", np.zeros(0, str))},
    )
