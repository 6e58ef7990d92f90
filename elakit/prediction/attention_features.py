"""Features of a run's attention, from which failures are predicted.

The features are computed at several points of the run: after 10%, 20%, 30%, 50% and 100% of the steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from elakit.attention import Recording
from elakit.errors import RecordingError, SettingError
from elakit.prediction.map_statistics import MAP_STATISTICS, map_statistics
from elakit.run import Run

# Shares of a run's steps after which a failure can be predicted.
SHARES = (0.1, 0.2, 0.3, 0.5, 1.0)

# Measures of `elakit.Bleeding.to_frame`, and the function that selects the worst of the entities, pairs or attributes.
_WORST: dict[str, Callable[..., Any]] = {
    "bleed": np.max,
    "intrusion": np.max,
    "spill": np.max,
    "iou": np.max,
    "ruzicka": np.max,
    "hellinger": np.min,
    "symmetric_kl": np.min,
    "attribute_intrusion": np.max,
    "attribute_spill": np.max,
    "attribute_margin": np.min,
    "start_mass": np.max,
    "end_mass": np.max,
}
# Values for prompts without pairs or attributes: those of an image without bleeding.
_ABSENT = {"hellinger": 1.0, "symmetric_kl": 10.0, "attribute_margin": 1.0}
_ON_MAPS = ("peak", "peak_ratio", "mass", "mass_ratio", "area", "area_ratio", "concentration")
QUANTITIES = (*_WORST, *(f"{name}_mean" for name in ("bleed", "intrusion", "spill")), *_ON_MAPS)
_ABOUT = ("entities", "attributes")
# Maps that `map_statistics` describes: those of the decoder at the size of the analysis, at the last step and averaged
# over the second half of the steps; those of the encoder at that size and the coarser ones of the decoder, at the last
# step.
_GRIDS = ("decoder", "settled", "encoder", "coarse")
# Each quantity at the last step and its mean over the steps until then, and the statistics of the maps.
FEATURES = (
    *_ABOUT,
    *(f"{name}_{when}" for name in QUANTITIES for when in ("last", "mean")),
    *(f"{grid}_{name}" for grid in _GRIDS for name in MAP_STATISTICS),
)


def features(run: Run) -> pd.DataFrame:
    """Compute features of a run's attention at several points of the run. Failures are predicted from the features.

    The points are shares of the run's steps: 0.1, 0.2, 0.3, 0.5 and 1.0 (`SHARES`). Each share is rounded up to whole
    steps. If a run has four steps, for example, the share 0.1 is the first step.

    Parameters
    ----------
    run : Run
        A recorded run. The features at a point use only the attention of the steps until then, and not the judge.

    Returns
    -------
    pandas.DataFrame
        Table of numbers, with one row per share that the run has reached (index "share") and one column per name in
        `FEATURES`.

    Raises
    ------
    SettingError
        The prompt names no entity.
    RecordingError
        The run was not recorded, or has no recorded step.

    Notes
    -----
    *Counts.* "entities" and "attributes" are the numbers of entities and attributes in the prompt.

    *Measures.* These features are computed from maps that are averaged over the decoder's layers at 16 x 16, or at the
    nearest size. A model without a decoder uses all layers. Each measure gives two features: the value at the last step
    until the point ("_last"), and the mean over all steps until the point ("_mean").

    * The measures of bleeding, such as "bleed", come from `elakit.Bleeding`. If a measure has several values at a step,
      such as one per entity, the worst value is used, because one bad value suffices to make an image fail.
      "bleed_mean", "intrusion_mean" and "spill_mean" are means over the entities instead.
    * "peak" is the maximum of an entity's map, "mass" the mean of the map, and "area" the area of the entity's region
      as a share of the map. "concentration" is the share of the map's attention in the most attended tenth of the
      locations. Of these four measures, the smallest value over the entities is used.
    * "peak_ratio", "mass_ratio" and "area_ratio" are the smallest value over the entities, divided by the largest.

    *Statistics.* The remaining features are the values of `elakit.prediction.map_statistics.map_statistics` for four
    sets of maps:

    * "decoder": the decoder's maps at the last step until the point;
    * "encoder": the encoder's maps at this step;
    * "coarse": the decoder's maps of the next smaller size at this step;
    * "settled": the decoder's maps, averaged over the second half of the steps until the point.

    A set that the model or the recording lacks is replaced by the set "decoder".

    Examples
    --------
    >>> import elakit
    >>> run = elakit.generate(elakit.load("picture-world"), "a [cat] and a [lion]", steps=4, progress=False)
    >>> table = features(run)
    >>> table.shape == (len(SHARES), len(FEATURES)), table.index.tolist()
    (True, [0.1, 0.2, 0.3, 0.5, 1.0])
    >>> table["entities"].tolist()
    [2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if not run.prompt.entities:
        raise SettingError("The prompt names no entity; mark the entities with brackets: 'a [red car]'.")
    series, grids = _per_step(run), _grids(run)
    numbers = {entity.label: i for i, entity in enumerate(run.prompt.entities)}
    so_far = series.expanding().mean()
    about = [len(run.prompt.entities), sum(len(entity.attributes) for entity in run.prompt.entities)]
    rows = {}
    for share, step in _reached(run).items():
        pairs = zip(series.iloc[step], so_far.iloc[step], strict=True)
        rows[share] = [*about, *(value for pair in pairs for value in pair)]
        for name in _GRIDS:
            grid = grids.get(name, grids["decoder"])
            steps = slice((step + 1) // 2 if name == "settled" else step, step + 1)
            entities, rest, attributes = (part[steps].mean(0) for part in (grid.entities, grid.rest, grid.attributes))
            rows[share].extend(map_statistics(entities, rest, attributes, [numbers[owner] for owner in grid.owners]))
    table = pd.DataFrame.from_dict(rows, orient="index", columns=list(FEATURES), dtype=float)
    return table.rename_axis("share")


@dataclass(frozen=True)
class _Grid:
    """Attention maps of a run at all recorded steps, averaged over layers.

    `entities`, (step, entity, y, x), has the maps of the entities. `attributes`, (step, attribute, y, x), has the maps
    of the attributes. `rest`, (step, y, x), is the summed attention to start-of-text, end-of-text and padding. `owners`
    has one entity label per attribute: the label of the entity that the attribute describes.
    """

    entities: np.ndarray
    rest: np.ndarray
    attributes: np.ndarray
    owners: tuple[str, ...]


def _grids(run: Run) -> dict[str, _Grid]:
    """Return the attention maps of a recorded run as a dict with the keys "decoder", "encoder" and "coarse".

    The maps of "decoder" and "encoder" have the size of `Run.entity_maps`. The maps of "coarse" are the decoder's maps
    of the next smaller size, or of the same size if the recording has no smaller size. A key is missing if the model or
    the recording lacks the maps.
    """
    recording = run.recording
    assert recording is not None
    size = max(run.entity_maps().shape[-2:])
    coarse = max((max(each) for each in recording.sizes_of(recording.decoder) if max(each) < size), default=size)
    wanted = {"decoder": (recording.decoder, size), "encoder": ("down", size), "coarse": (recording.decoder, coarse)}
    found = {}
    for name, (layers, side) in wanted.items():
        with suppress(RecordingError):
            found[name] = _grid(recording, layers, side)
    return found


def _grid(recording: Recording, layers: str, size: int) -> _Grid:
    entities = recording.maps("entities", layers, size).values
    ends = [token for token in ("<start>", "<end>") if token in recording.tokens]
    attributes, owners = np.zeros((len(entities), 0, *entities.shape[-2:])), ()
    if any(entity.attributes for entity in recording.prompt.entities):
        maps = recording.maps("attributes", layers, size)
        attributes, owners = maps.values, tuple(maps.entity.values.tolist())
    return _Grid(entities, recording.maps(ends, layers, size).values.sum(1), attributes, owners)


def _reached(run: Run) -> dict[float, int]:
    """Find the last recorded step within each share of the run's steps.

    Returns a dict. The keys are the shares in `SHARES` that the run has reached. The values are indices into the
    recorded steps (`Recording.steps`).
    """
    assert run.recording is not None
    calls = run.recording.steps
    total = run.recording.tree.attrs.get("expected") or calls[-1] + 1
    stride = calls[1] - calls[0] if len(calls) > 1 else 1
    reached = {}
    for share in SHARES:
        end = math.ceil(share * total - 1e-9)
        within = sum(call < end for call in calls)
        if within and end <= calls[-1] + stride:
            reached[share] = within - 1
    return reached


def _per_step(run: Run) -> pd.DataFrame:
    """Table of measures of a run's attention: one row per recorded step, one column per name in `QUANTITIES`."""
    maps = run.entity_maps().values  # (step, entity, y, x)
    regions = run.regions.values
    frame = run.measure().to_frame()
    columns: dict[str, Any] = {}
    for name, worst in _WORST.items():
        values = frame.loc[frame["measure"] == name].groupby("step", sort=True)["value"].agg(worst)
        columns[name] = values.to_numpy() if len(values) else np.full(len(maps), _ABSENT.get(name, 0.0))
    for name in ("bleed", "intrusion", "spill"):
        columns[f"{name}_mean"] = frame.loc[frame["measure"] == name].groupby("step", sort=True)["value"].mean()
    peaks, masses, areas = maps.max((2, 3)), maps.mean((2, 3)), regions.mean((2, 3))
    for name, values in (("peak", peaks), ("mass", masses), ("area", areas)):
        columns[name] = values.min(1)
        columns[f"{name}_ratio"] = values.min(1) / np.maximum(values.max(1), 1e-12)
    values = np.sort(maps.reshape(*maps.shape[:2], -1), axis=2)
    strongest = max(values.shape[2] // 10, 1)
    columns["concentration"] = (values[..., -strongest:].sum(2) / np.maximum(values.sum(2), 1e-12)).min(1)
    return pd.DataFrame({name: np.asarray(columns[name], float) for name in QUANTITIES})
