"""Bleeding of a run: all measures of its attention maps and regions, in one tidy table.

:func:`measure` applies the functions of :mod:`elakit.measures` to every step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from elakit.errors import SettingError
from elakit.measures.agreement import agreement_iou, auc, pointing_game
from elakit.measures.arrays import as_array, as_masks, distribution
from elakit.measures.leakage import attribute_overlap, binding, bleed, intrusion, leakage, spill, truth_leakage
from elakit.measures.masks import downscale, otsu_masks
from elakit.measures.overlap import (
    astar_overlap,
    dice,
    hellinger,
    iou,
    jensen_shannon,
    overlap_coefficient,
    ruzicka,
    symmetric_kl,
)
from elakit.numbering import plural
from elakit.regions import Regions, step_labels, steps_first

if TYPE_CHECKING:
    from elakit.judge import Verdict

__all__ = ["BACKGROUND", "Bleeding", "measure", "truth_masks"]

BACKGROUND = "background"


@dataclass(frozen=True, eq=False)
class Bleeding:
    """Measures of one run, as returned by :func:`measure`.

    Attributes
    ----------
    leakage : DataArray of float, (step, entity, region)
        Leakage matrix of each step: the share of each entity's attention in each region. The last region is
        "background", or "rest of the image" if an entity has the label "background". Rows sum to 1.
    attribute_leakage : DataArray of float, (step, attribute, region), or None
        Share of each attribute's attention in each region of the entities. The coordinate `owner` names the entity to
        which each attribute belongs. None if :func:`measure` was called without attributes.
    frame : DataFrame
        All measures as a tidy table; :meth:`to_frame` returns a copy and describes the columns.
    truth_leakage : DataArray of float, (step, entity, region), or None
        Share of each entity's attention on the mask of each entity in the finished image, and on the rest of the image.
        None if :func:`measure` was called without `truth`.
    attribute_truth_leakage : DataArray of float, (step, attribute, region), or None
        Share of each attribute's attention on the mask of each entity in the finished image, and on the rest of the
        image. None if :func:`measure` was called without attributes or without `truth`.
    """

    leakage: xr.DataArray
    attribute_leakage: xr.DataArray | None
    frame: pd.DataFrame
    truth_leakage: xr.DataArray | None = None
    attribute_truth_leakage: xr.DataArray | None = None

    def to_frame(self) -> pd.DataFrame:
        """All measures as a tidy table.

        Returns
        -------
        DataFrame
            Each row is one value of one measure at one step. The columns are step (counted from 0), measure, entity,
            other and value. `entity` is the label of the measured entity or attribute. `other` is the label of a
            region, of a second entity, or of the owner: the entity that an attribute belongs to. The table below
            lists the content of both columns for each measure; where an entry is missing, the column contains "".

            ====================================  =============  ======  ===============
            measure                               entity         other   range
            ====================================  =============  ======  ===============
            leakage                               entity         region  0 to 1
            bleed, intrusion, spill               entity                 0 to 1
            iou, dice, overlap_coefficient        first of pair  second  0 to 1
            ruzicka                               first of pair  second  0 to 1
            astar                                 first of pair  second  0 to .5
            symmetric_kl                          first of pair  second  nats, from 0
            jensen_shannon                        first of pair  second  nats, 0 to ln 2
            hellinger                             first of pair  second  0 to 1
            attribute_leakage                     attribute      region  0 to 1
            attribute_bleed, attribute_intrusion  attribute      owner   0 to 1
            attribute_spill                       attribute      owner   0 to 1
            attribute_overlap (Ruzicka)           attribute      entity  0 to 1
            attribute_margin                      attribute      owner   -1 to 1
            truth_iou, truth_auc, pointing        entity                 0 to 1, or NaN
            truth_leakage                         entity         region  0 to 1
            attribute_truth_leakage               attribute      region  0 to 1
            start_mass, end_mass                                         0 to 1
            ====================================  =============  ======  ===============

            A pair is a pair of entities. IoU, Dice and overlap coefficient compare the maps of a pair after each map
            is binarized with Otsu's threshold. The other measures of pairs compare the maps as distributions. One of
            the regions is "background".

            Pointing and the measures with "truth" in their names compare attention with the finished image. These
            measures are absent if :func:`measure` was called without `truth`. For an entity that is not in the image,
            truth_iou, truth_auc and pointing are NaN, and the share of attention on this entity (truth_leakage) is 0.
            For an entity that fills the image, truth_auc is NaN.
        """
        return self.frame.copy()

    def overall(self) -> pd.DataFrame:
        """Mean of every measure over the recorded steps.

        Returns
        -------
        DataFrame
            Columns measure, entity, other and value, as in :meth:`to_frame`. Steps at which a measure is NaN are left
            out of the mean. The mean is NaN if the measure is NaN at every step.
        """
        return self.frame.groupby(["measure", "entity", "other"], sort=False, as_index=False)["value"].mean()

    def _tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Tables that ``print`` shows, as a list of (title, table).

        The values are means over the steps. A row of a table is an entity, a pair of entities, an attribute with its
        entity, or a special token.
        """
        overall = self.overall()
        entities = list(self.leakage["entity"].values)

        def wide(measures: list[str], rows: list[str]) -> pd.DataFrame:
            part = overall[overall["measure"].isin(measures)].set_index([*rows, "measure"])["value"]
            return part.unstack("measure", sort=False)[measures].rename_axis(columns=None)

        matrix = self.leakage.mean("step").to_pandas().rename_axis(index=None, columns=None)
        tables = [
            ("Share of each entity's attention by region (leakage)", matrix),
            (
                "Entities",
                wide(["bleed", "intrusion", "spill"], ["entity"]).reindex(entities).rename_axis(index=None),
            ),
        ]
        if len(entities) > 1:
            pairs = wide(["iou", "ruzicka", "astar", "symmetric_kl", "jensen_shannon"], ["entity", "other"])
            pairs.index = pd.Index([f"{a} | {b}" for a, b in pairs.index])
            tables.append(("Pairs", pairs))
        if self.attribute_leakage is not None:
            bound = wide(["attribute_margin", "attribute_intrusion"], ["entity", "other"])
            bound.index = pd.Index([f"{a} of {b}" for a, b in bound.index])
            tables.append(("Attributes", bound))
        if self.truth_leakage is not None:
            agreement = wide(["truth_iou", "truth_auc", "pointing"], ["entity"]).reindex(entities)
            lies = self.truth_leakage.mean("step").to_pandas().rename(columns=lambda label: f"on {label}")
            tables.append(("Agreement of attention with the image", agreement.join(lies).rename_axis(index=None)))
        masses = overall[overall["measure"].isin(["start_mass", "end_mass"])]
        if len(masses):
            tables.append(
                ("Attention to special tokens", masses.set_index("measure")[["value"]].rename_axis(index=None))
            )
        return tables

    def _title(self) -> str:
        steps = self.leakage.sizes["step"]
        return f"Bleeding, mean over {steps} step{'s' if steps != 1 else ''}"

    def __repr__(self) -> str:
        blocks = [f"{title}\n{table.to_string(float_format='%.3f', na_rep='–')}" for title, table in self._tables()]
        return "\n\n".join([self._title(), *blocks])

    def _repr_html_(self) -> str:
        blocks = [
            f"<p>{escape(title)}</p>\n{table.to_html(float_format='%.3f', na_rep='–', border=0, escape=True)}"
            for title, table in self._tables()
        ]
        return "\n".join([f"<div><strong>{escape(self._title())}</strong>", *blocks, "</div>"])


def measure(
    maps: xr.DataArray,
    regions: xr.DataArray | Regions,
    attributes: xr.DataArray | None = None,
    owners: Mapping[str, str] | None = None,
    *,
    start: xr.DataArray | None = None,
    end: xr.DataArray | None = None,
    truth: Verdict | xr.DataArray | None = None,
) -> Bleeding:
    """Measure the bleeding in the attention maps of a run, at every step.

    Parameters
    ----------
    maps : DataArray, (step, token, y, x)
        Raw attention to the entities, as ``recording.maps("entities")`` returns it, with the labels of the entities
        along token.
    regions : Regions, or DataArray of bool, (step, entity, y, x) or (entity, y, x)
        Disjoint regions of the same entities, at the size of the maps. Regions without the dimension `step` are used at
        every step.
    attributes : DataArray, (step, token, y, x), optional
        Raw attention to the attributes, with the labels of the attributes along token.
    owners : mapping of str to str, optional
        Label of the entity to which each attribute belongs, by the label of the attribute: ``{"red": "car"}``.
        Required with `attributes`.
    start : DataArray, (step,), optional
        Attention to start-of-text, averaged over the locations, 0 to 1.
    end : DataArray, (step,), optional
        Summed attention to end-of-text and padding, averaged over the locations, 0 to 1.
    truth : Verdict or DataArray of bool, (entity, y, x), optional
        Mask of each entity in the finished image according to a judge, at any resolution. The mask of an absent entity
        is empty. If `truth` is given, attention is also compared with the image.

    Returns
    -------
    Bleeding

    Raises
    ------
    SettingError
        Steps, labels or sizes do not match; regions overlap; or values are NaN, infinite or negative.

    Notes
    -----
    Regions never overlap, so overlap is measured on the maps instead. IoU, Dice and overlap coefficient compare the
    maps of two entities after each map is binarized with Otsu's threshold. The other measures of two entities compare
    maps that are normalized to a sum of 1. These measures depend on where the maps are strong, not on how strong the
    maps are.

    If `truth` is given, each map is compared with the mask of the same entity in the image, resampled to the grid of
    the maps. :func:`~elakit.measures.agreement.agreement_iou` gives truth_iou,
    :func:`~elakit.measures.agreement.auc` gives truth_auc, and :func:`~elakit.measures.agreement.pointing_game` gives
    pointing. :func:`~elakit.measures.leakage.truth_leakage` gives truth_leakage and attribute_truth_leakage, from the
    masks at full resolution.

    Examples
    --------
    The cat has 8 of 10 units of its attention in its own region, the frog has 4 of 5. The printed columns are the
    regions of the cat and the frog, and the background:

    >>> maps = xr.DataArray(
    ...     [[[[6., 2., 1., 1.]], [[0., 0., 4., 1.]]]],
    ...     dims=("step", "token", "y", "x"),
    ...     coords={"token": ["cat", "frog"]},
    ... )
    >>> regions = xr.DataArray(
    ...     [[[True, True, False, False]], [[False, False, True, False]]],
    ...     dims=("entity", "y", "x"),
    ...     coords={"entity": ["cat", "frog"]},
    ... )
    >>> bleeding = measure(maps, regions)
    >>> bleeding.leakage.isel(step=0).values.round(3).tolist()
    [[0.8, 0.1, 0.1], [0.0, 0.8, 0.2]]
    >>> bleeding.to_frame().query("measure == 'bleed'")[["entity", "value"]].round(3).values.tolist()
    [['cat', 0.2], ['frog', 0.2]]

    In the image, the cat is missing, and the frog fills the first two locations. These locations have 8 of 10 units of
    the cat's attention, and none of the frog's. Pointing is NaN for the missing cat. It is 0 for the frog, because the
    location with the most attention to the frog is outside the frog's mask:

    >>> seen = regions.copy(data=[[[False, False, False, False]], [[True, True, False, False]]])
    >>> judged = measure(maps, regions, truth=seen)
    >>> judged.truth_leakage.sel(step=0, region="frog").values.round(3).tolist()
    [0.8, 0.0]
    >>> judged.to_frame().query("measure == 'pointing'")["value"].tolist()
    [nan, 0.0]
    """
    maps = steps_first(maps, "maps")
    names = _labels(maps, "maps")
    steps = step_labels(maps)
    if not len(steps):
        raise SettingError("maps contain no complete step; give maps of at least one step.")
    masks = _regions_of(regions, names, steps)
    values = maps.values
    matrix = leakage(values, masks)
    columns = [*names, _rest_label(names)]
    leak = xr.DataArray(
        matrix,
        dims=("step", "entity", "region"),
        coords={**_along_step(maps), "entity": names, "region": columns},
        name="leakage",
    )

    table = _Table(steps)
    table.add("leakage", [(e, r) for e in names for r in columns], matrix.reshape(len(steps), -1))
    each = [(e, "") for e in names]
    table.add("bleed", each, bleed(matrix))
    table.add("intrusion", each, intrusion(matrix))
    table.add("spill", each, spill(matrix))
    _add_pairs(table, names, values)
    attribute_leak = None
    if attributes is not None:
        attribute_leak = _add_attributes(table, names, values, masks, steps, attributes, owners)
    truth_leak, attribute_truth = None, None
    if truth is not None:
        seen = truth_masks(truth, names, values.shape[-2:])
        _add_agreement(table, names, values, seen)
        truth_leak = _add_truth_leakage(table, leak, values, seen)
        if attributes is not None and attribute_leak is not None:
            attribute_values = steps_first(attributes, "attributes").values
            attribute_truth = _add_truth_leakage(table, attribute_leak, attribute_values, seen)
    for name, mass in (("start_mass", start), ("end_mass", end)):
        if mass is not None:
            table.add(name, [("", "")], _mass(mass, name.split("_")[0], steps)[:, None])
    return Bleeding(
        leakage=leak,
        attribute_leakage=attribute_leak,
        frame=table.frame(),
        truth_leakage=truth_leak,
        attribute_truth_leakage=attribute_truth,
    )


def truth_masks(truth: Verdict | xr.DataArray, entities: Sequence[str], size: tuple[int, int]) -> np.ndarray:
    """Masks of the entities in the finished image, in the order of `entities` and at the resolution of `truth`.

    The labels and the aspect ratio of the masks are checked: both must be the same as those of the maps.

    Parameters
    ----------
    truth : Verdict or DataArray of bool, (entity, y, x)
        Masks at any resolution. The mask of an entity that is not in the image is empty. Any object with the attributes
        `masks` and `entities` is read like a Verdict.
    entities : sequence of str
        Labels of the entities of the maps.
    size : (int, int)
        Rows and columns of the maps, used only to check the aspect ratio of the masks, up to rounding. The masks are
        not resized.

    Returns
    -------
    bool array, (entity, y, x)
        The masks, with the rows and columns of `truth`.

    Raises
    ------
    SettingError
        `truth` is neither a Verdict nor a DataArray with the dimensions (entity, y, x); the entities of `truth` are not
        those of the maps; a mask has values other than 0 and 1; or the aspect ratios of masks and maps differ.

    Examples
    --------
    The frog is in the right half of the image, the cat in the left half. The masks are returned with the cat first:

    >>> seen = xr.DataArray([[[0, 1]], [[1, 0]]], dims=("entity", "y", "x"), coords={"entity": ["frog", "cat"]})
    >>> truth_masks(seen, ["cat", "frog"], (4, 8)).astype(int).tolist()
    [[[1, 0]], [[0, 1]]]
    """
    if hasattr(truth, "masks") and hasattr(truth, "entities"):
        truth = xr.DataArray(truth.masks, dims=("entity", "y", "x"), coords={"entity": list(truth.entities)})
    if not isinstance(truth, xr.DataArray):
        raise SettingError(
            f"truth has type {type(truth).__name__}; give a Verdict, or masks as xr.DataArray(masks, "
            'dims=("entity", "y", "x"), coords={"entity": labels}).'
        )
    if set(truth.dims) != {"entity", "y", "x"}:
        raise SettingError(
            f"truth has the dimensions ({', '.join(map(str, truth.dims))}); give one mask per entity of the finished "
            "image, with the dimensions (entity, y, x) and without steps."
        )
    default = [f"entity {i}" for i in range(truth.sizes["entity"])]
    labels = [str(label) for label in truth["entity"].values] if "entity" in truth.coords else default
    if sorted(labels) != sorted(entities):
        raise SettingError(
            f"truth has the entities {labels}, but maps have {list(entities)}; give one mask for each entity of the "
            "maps."
        )
    masks = as_masks(truth, "truth")[[labels.index(label) for label in entities]]
    (rows, columns), (high, wide) = size, masks.shape[-2:]
    # Each side of a map is its image's, divided and rounded to a whole number.
    if abs(rows - columns * high / max(wide, 1)) >= 1 and abs(columns - rows * wide / max(high, 1)) >= 1:
        raise SettingError(
            f"truth has {high} x {wide} pixels (y, x), but maps have {rows} x {columns} locations, so the aspect "
            "ratios differ; give masks of the whole image."
        )
    return masks


# --- parts of measure ---------------------------------------------------------------------------------------


class _Table:
    """Collector of the measures of a run, as rows of a tidy table; `Bleeding.to_frame` describes the columns.

    Parameters
    ----------
    steps : ndarray, int
        Numbers of the denoising steps, counted from 0.
    """

    def __init__(self, steps: np.ndarray) -> None:
        self.steps = steps
        self.parts: list[pd.DataFrame] = []

    def add(self, name: str, keys: list[tuple[str, str]], values: np.ndarray) -> None:
        """Add the values of the measure ``name`` to the table.

        ``values`` has the shape (step, len(keys)). Each key is a pair: the content of the columns entity and other.
        """
        count = len(keys)
        if not count:
            return
        self.parts.append(
            pd.DataFrame(
                {
                    "step": np.repeat(self.steps, count),
                    "measure": name,
                    "entity": [entity for entity, _ in keys] * len(self.steps),
                    "other": [other for _, other in keys] * len(self.steps),
                    "value": np.asarray(values, dtype=np.float64).ravel(),
                }
            )
        )

    def frame(self) -> pd.DataFrame:
        return pd.concat(self.parts, ignore_index=True)


def _add_pairs(table: _Table, names: list[str], values: np.ndarray) -> None:
    first, second = np.triu_indices(len(names), k=1)
    if not len(first):
        return
    pairs = [(names[i], names[j]) for i, j in zip(first, second, strict=True)]
    masks, p = otsu_masks(values), distribution(values)
    for name, function in (("iou", iou), ("dice", dice), ("overlap_coefficient", overlap_coefficient)):
        table.add(name, pairs, function(masks[:, first], masks[:, second]))
    for name, function in (
        ("ruzicka", ruzicka),
        ("astar", astar_overlap),
        ("symmetric_kl", symmetric_kl),
        ("jensen_shannon", jensen_shannon),
        ("hellinger", hellinger),
    ):
        table.add(name, pairs, function(p[:, first], p[:, second]))


def _add_attributes(
    table: _Table,
    names: list[str],
    values: np.ndarray,
    masks: np.ndarray,
    steps: np.ndarray,
    attributes: xr.DataArray,
    owners: Mapping[str, str] | None,
) -> xr.DataArray | None:
    attributes = steps_first(attributes, "attributes")
    words = _labels(attributes, "attributes")
    if not words:
        return None
    if not np.array_equal(step_labels(attributes), steps):
        raise SettingError(
            f"attributes have {_steps_text(step_labels(attributes))}, but maps have {_steps_text(steps)}; give the "
            "same steps of both."
        )
    if attributes.shape[-2:] != values.shape[-2:]:
        raise SettingError(
            f"attributes have size {attributes.shape[-2:]}, but maps have {values.shape[-2:]}; give both at one size, "
            "for instance with the same `size` in recording.maps."
        )
    if missing := [word for word in words if word not in (owners or {})]:
        raise SettingError(
            f"owners has no entity for {', '.join(map(repr, missing))}; pass owners={{{missing[0]!r}: entity, ...}}, "
            f"where each entity is one of {', '.join(map(repr, names))}."
        )
    assert owners is not None
    if unknown := sorted({owners[word] for word in words} - set(names)):
        raise SettingError(
            f"owners contains {', '.join(map(repr, unknown))}; give entities of the maps: "
            f"{', '.join(map(repr, names))}."
        )
    own = [names.index(owners[word]) for word in words]

    matrix = leakage(attributes.values, masks)
    overlap = attribute_overlap(attributes.values, values)
    owned = [(word, owners[word]) for word in words]
    columns = [*names, _rest_label(names)]
    table.add("attribute_leakage", [(w, r) for w in words for r in columns], matrix.reshape(len(steps), -1))
    table.add("attribute_bleed", owned, bleed(matrix, own))
    table.add("attribute_intrusion", owned, intrusion(matrix, own))
    table.add("attribute_spill", owned, spill(matrix))
    table.add("attribute_overlap", [(w, e) for w in words for e in names], overlap.reshape(len(steps), -1))
    table.add("attribute_margin", owned, binding(attributes.values, values, own).margin)
    return xr.DataArray(
        matrix,
        dims=("step", "attribute", "region"),
        coords={
            **_along_step(attributes),
            "attribute": words,
            "region": columns,
            "owner": ("attribute", [owners[word] for word in words]),
        },
        name="attribute_leakage",
    )


def _add_agreement(table: _Table, names: list[str], values: np.ndarray, seen: np.ndarray) -> None:
    each = [(name, "") for name in names]
    masks = downscale(seen, values.shape[-2:])
    for name, function in (("truth_iou", agreement_iou), ("truth_auc", auc), ("pointing", pointing_game)):
        table.add(name, each, function(values, masks))


def _add_truth_leakage(table: _Table, leak: xr.DataArray, values: np.ndarray, seen: np.ndarray) -> xr.DataArray:
    """Compute the share of attention on each entity's mask in the finished image, and add the values to a table.

    Parameters
    ----------
    table : _Table
        Table to which the values are added, as "truth_leakage" or "attribute_truth_leakage".
    leak : DataArray, (step, entity or attribute, region)
        `Bleeding.leakage` or `Bleeding.attribute_leakage`. Only the name, the dimensions and the labels of this array
        are used, not the values.
    values : ndarray, (step, entity or attribute, y, x)
        Attention to the entities or attributes of `leak`.
    seen : bool array, (entity, y, x)
        Mask of each entity in the finished image, from `truth_masks`. These masks take the place of the regions.

    Returns
    -------
    DataArray, (step, entity or attribute, region)
        The computed shares, as `Bleeding.truth_leakage` or `Bleeding.attribute_truth_leakage` contains them.
    """
    matrix = truth_leakage(values, seen)
    name = str(leak.name).replace("leakage", "truth_leakage")
    rows, regions = (leak[leak.dims[i]].values.tolist() for i in (1, 2))
    table.add(name, [(row, region) for row in rows for region in regions], matrix.reshape(len(matrix), -1))
    return leak.copy(data=matrix).rename(name)


def _regions_of(regions: xr.DataArray | Regions, names: list[str], steps: np.ndarray) -> np.ndarray:
    """Check the regions, and return them as an array with the entities in the order of `names`.

    Parameters
    ----------
    regions : Regions, or DataArray of bool, (step, entity, y, x) or (entity, y, x)
        Region of each entity.
    names : list of str
        Labels of the entities of the maps. The regions must have the same entities.
    steps : ndarray, (step,)
        Numbers of the steps of the maps. If the regions have the dimension `step`, they must have the same numbers.

    Returns
    -------
    ndarray, (step, entity, y, x) or (entity, y, x)
        The regions, with the dimension `step` only if `regions` has this dimension.
    """
    if isinstance(regions, Regions):
        regions = regions.to_xarray()
    if not isinstance(regions, xr.DataArray):
        raise SettingError(
            f"regions have type {type(regions).__name__}; give Regions or a DataArray (step, entity, y, x), such as "
            "elakit.regions.localize_steps(maps) returns."
        )
    if set(regions.dims) not in ({"step", "entity", "y", "x"}, {"entity", "y", "x"}):
        raise SettingError(
            f"regions have the dimensions ({', '.join(map(str, regions.dims))}); give (step, entity, y, x) or "
            "(entity, y, x), such as elakit.regions.localize_steps(maps) returns."
        )
    found = _labels(regions, "regions")
    if sorted(found) != sorted(names):
        raise SettingError(
            f"regions have the entities {found}, but maps have {names}; give one region for each entity of the maps."
        )
    if "step" in regions.dims and not np.array_equal(step_labels(regions), steps):
        raise SettingError(
            f"regions have {_steps_text(step_labels(regions))}, but maps have {_steps_text(steps)}; give the same "
            "steps of both."
        )
    regions = regions.isel(entity=[found.index(name) for name in names]).transpose(..., "entity", "y", "x")
    return np.asarray(regions.values)


def _labels(array: xr.DataArray, what: str) -> list[str]:
    if "entity" in array.coords:
        names = [str(name) for name in array["entity"].values]
    else:
        names = [f"entity {i}" for i in range(array.sizes["entity"])]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SettingError(
            f"{what} have the label {twice!r} more than once; give each map or region a label of its own, such as "
            f"'{twice}#1' and '{twice}#2'."
        )
    return names


def _steps_text(steps: np.ndarray) -> str:
    """Steps as text, in which ranges of consecutive numbers are joined: "steps 0-4, 10"."""
    numbers = steps.dtype.kind in "iuf"
    groups = np.split(steps, np.flatnonzero(np.diff(steps) != 1) + 1 if numbers else range(1, len(steps)))
    texts = [f"{group[0]}-{group[-1]}" if len(group) > 1 else f"{group[0]}" for group in groups if len(group)]
    return f"{plural('step', len(steps))} {', '.join(texts)}" if texts else "no steps"


def _rest_label(names: list[str]) -> str:
    """Label of the last region: "background", or "rest of the image" if an entity has the label "background"."""
    return BACKGROUND if BACKGROUND not in names else "rest of the image"


def _along_step(array: xr.DataArray) -> dict[Any, Any]:
    return {name: c for name, c in array.coords.items() if c.dims == ("step",)}


def _mass(mass: xr.DataArray, what: str, steps: np.ndarray) -> np.ndarray:
    if not isinstance(mass, xr.DataArray) or mass.dims != ("step",):
        if isinstance(mass, xr.DataArray) and "step" in mass.dims:
            got, remedy = f"has dimensions {mass.dims}", "take the mean over the other dimensions"
        else:
            got = f"has dimensions {mass.dims}" if isinstance(mass, xr.DataArray) else f"has type {type(mass).__name__}"
            remedy = "give one value per step"
        raise SettingError(f"{what} {got}; a DataArray with the single dimension step is needed: {remedy}.")
    if not np.array_equal(step_labels(mass), steps):
        raise SettingError(
            f"{what} has {_steps_text(step_labels(mass))}, but maps have {_steps_text(steps)}; give the same steps of "
            "both."
        )
    return as_array(mass.values, what)
