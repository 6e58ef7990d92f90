"""Features of a run's attention for the prediction of failures, computed after several shares of its steps."""

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
    """Features of a run's attention, from which failures are predicted, after each share of the steps in `SHARES`.

    Parameters
    ----------
    run : Run
        A recorded run. The features after a share of the steps use neither the judge nor later steps.

    Returns
    -------
    pandas.DataFrame
        Numbers, with one row per share that the run has reached (index "share") and the columns `FEATURES`. A share of
        the steps is rounded up to whole steps: of four steps, the share 0.1 is the first step.

    Raises
    ------
    SettingError
        The prompt names no entity.
    RecordingError
        The run was not recorded, or has no recorded step.

    Notes
    -----
    "entities" and "attributes" are the numbers of entities and attributes in the prompt.

    The next features are measures of bleeding and measures of the entities' maps. The maps are means over the decoder's
    layers at 16 x 16, or the nearest size. If a measure of bleeding has several values (one per entity, pair or
    attribute), the worst is used, because one bad value suffices to make an image fail; bleed, intrusion and spill are
    also averaged over entities. "peak" is the smallest of the maxima of the entities' maps, and "peak_ratio" is "peak"
    divided by the largest of these maxima. "mass" and "mass_ratio" are the same for the mean attention, "area" and
    "area_ratio" for the area of the region. "concentration" is the share of a map's attention in the most attended
    tenth of its locations, the minimum over entities. Each of these measures is given at the last step of the share
    ("_last") and as a mean over all steps until then ("_mean").

    The remaining features are the statistics of `elakit.prediction.map_statistics` for four sets of maps. Three sets
    are maps at the last step of the share: the decoder's maps ("decoder"), the encoder's maps ("encoder"), and the
    decoder's maps of the next smaller size ("coarse"). The fourth set is the mean of the decoder's maps over the second
    half of the steps until then ("settled"). A set that the model or the recording lacks is replaced by "decoder".

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
    """Maps of a run: entities (step, entity, y, x), rest (step, y, x), attributes (step, attribute, y, x).

    "rest" is the attention to start-of-text, end-of-text and padding; `owners` has the entity of each attribute.
    """

    entities: np.ndarray
    rest: np.ndarray
    attributes: np.ndarray
    owners: tuple[str, ...]


def _grids(run: Run) -> dict[str, _Grid]:
    """Sets of maps by name; sets that the model or the recording lacks are left out."""
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
    """Index of the last recorded step within each share that the run has reached, by share."""
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
    """Table of the measures `QUANTITIES`, with one row per recorded step."""
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
