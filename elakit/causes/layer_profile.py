"""Bleeding by layer and head: the measures of `elakit.bleeding` for each part of the network."""

from __future__ import annotations

import numpy as np
import pandas as pd
import xarray as xr

from elakit.attention.recording import Recording
from elakit.bleeding import measure
from elakit.errors import RecordingError
from elakit.measures.arrays import resize
from elakit.run import Run

# Measures of each layer; `elakit.Bleeding.to_frame` explains them.
MEASURES = (
    "bleed", "intrusion", "spill", "ruzicka", "attribute_bleed", "attribute_intrusion", "attribute_spill",
    "attribute_margin",
)  # fmt: skip


def profile(run: Run) -> pd.DataFrame:
    """Measures of bleeding for each layer, head and step.

    Parameters
    ----------
    run : Run
        A recorded run. The measures are those of the mean over the heads, or of each head that was recorded with
        ``RecordSpec(heads="all")``.

    Returns
    -------
    pandas.DataFrame
        Columns layer, place (the part of the network, such as "up"), order (in the forward pass), head ("mean", or a
        number), step (counted from 0), measure (one of `MEASURES`), entity, other, value. Entity and other are as in
        `elakit.Bleeding.to_frame`.

    Raises
    ------
    RecordingError
        The run was not recorded, or was recorded without the tokens of its entities and their attributes.

    Notes
    -----
    Every layer is compared with the same regions, ``run.regions``, and its maps are resized to them. The measures show
    where a layer attends, not which regions would be localized in it.

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> table = profile(run)
    >>> table["layer"].nunique(), table["measure"].unique().tolist()
    (7, ['bleed', 'intrusion', 'spill', 'ruzicka'])
    >>> table.query("measure == 'bleed'").groupby("place")["value"].mean().between(0, 1).all()
    np.True_
    """
    if run.recording is None:
        raise RecordingError("This run was not recorded; generate it with record=True to see its attention.")
    regions = run.regions
    size = regions.sizes["y"], regions.sizes["x"]
    parts = []
    for order, layer in enumerate(run.recording.layers):
        part = run.recording.sel(layer=layer)
        place = str(part.nodes()[0]["place"].item())
        for head in part.heads(layer) or ("mean",):
            table = _of_layer(part if head == "mean" else part.sel(head=head), regions, size)
            parts.append(table.assign(layer=layer, place=place, order=order, head=head))
    found = pd.concat(parts).sort_values(["order", "head", "step"], kind="stable", ignore_index=True)
    return found[["layer", "place", "order", "head", "step", "measure", "entity", "other", "value"]]


def _of_layer(recording: Recording, regions: xr.DataArray, size: tuple[int, int]) -> pd.DataFrame:
    def maps(tokens: str) -> xr.DataArray:
        found = recording.maps(tokens)
        coords = {name: along for name, along in found.coords.items() if name not in ("y", "x")}
        return xr.DataArray(resize(found.values.astype(np.float64), size), dims=found.dims, coords=coords)

    attributes, owners = None, None
    if any(entity.attributes for entity in recording.prompt.entities):
        attributes = maps("attributes")
        owners = dict(zip(attributes.token.values.tolist(), attributes.entity.values.tolist(), strict=True))
    table = measure(maps("entities"), regions, attributes, owners).to_frame()
    return table[table["measure"].isin(MEASURES)]
