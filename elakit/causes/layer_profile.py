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
        A recorded run. If the run was recorded with ``RecordSpec(heads="all")``, each head is measured. By default, the
        mean over the heads is measured.

    Returns
    -------
    pandas.DataFrame
        One row per layer, head, step and value of a measure, with these columns:

        - layer: name of the layer.
        - place: part of the network, such as "up".
        - order: position of the layer in the forward pass, counted from 0.
        - head: index of the head, or "mean".
        - step: denoiser call, counted from 0.
        - measure: name of the measure, one of `MEASURES`.
        - entity: label of the entity or attribute that is measured.
        - other: for "ruzicka", label of the second entity; for measures of attributes, label of the attribute's own
          entity; otherwise "".
        - value: value of the measure.

    Raises
    ------
    RecordingError
        The run was not recorded, or the tokens of its entities and attributes were not recorded.

    Notes
    -----
    The maps of every layer are resized to ``run.regions`` and compared with these regions. The measures show where a
    layer attends. They do not show which regions would be localized in the layer itself.

    Examples
    --------
    Seven layers of picture-world are recorded. The prompt has no attributes, so no measure of attributes appears:

    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=2, progress=False)
    >>> table = profile(run)
    >>> table["layer"].nunique(), table["measure"].unique().tolist()
    (7, ['bleed', 'intrusion', 'spill', 'ruzicka'])

    Bleed is a share, so its mean in each part of the network is between 0 and 1:

    >>> table.query("measure == 'bleed'").groupby("place")["value"].mean().between(0, 1).all()
    np.True_
    """
    if run.recording is None:
        raise RecordingError("This run was not recorded. Generate it again with record=True.")
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
