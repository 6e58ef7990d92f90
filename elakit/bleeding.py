"""How much entities bleed into each other: measures on attention maps and on regions.

Plain functions work on arrays whose last two dimensions are (y, x); dimensions before them are carried along,
so a whole run (step, entity, y, x) is measured at once. :func:`measure` puts them together into one tidy
table.

Notation: p_e is an entity's map as a distribution over space (it sums to 1), R_f the region of entity f.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from elakit.measures.agreement import agreement_iou, as_maps, auc, broadcast, pointing_game, same_size, truth_masks
from elakit.errors import SettingError
from elakit.measures.masks import area_mean, as_masks, downscale
from elakit.regions import Regions, as_array, check_disjoint, otsu_masks, step_labels, steps_first

if TYPE_CHECKING:
    from elakit.judge import Verdict

__all__ = [
    "BACKGROUND",
    "Binding",
    "Bleeding",
    "Divergence",
    "MaskOverlap",
    "SoftOverlap",
    "binding",
    "bleed",
    "distribution",
    "divergence",
    "intrusion",
    "leakage",
    "mask_overlap",
    "measure",
    "soft_overlap",
    "spill",
    "truth_leakage",
]

BACKGROUND = "background"
# Least probability of a cell in the Kullback-Leibler divergence: keeps the logarithm finite where half
# precision has rounded to zero.
TINY = 1e-12


class MaskOverlap(NamedTuple):
    """Overlap of two masks, each 0 (apart) to 1."""

    iou: np.ndarray
    dice: np.ndarray
    coefficient: np.ndarray


class SoftOverlap(NamedTuple):
    """Overlap of two maps: `ruzicka` 0 to 1, `astar` 0 to .5."""

    ruzicka: np.ndarray
    astar: np.ndarray


class Divergence(NamedTuple):
    """How unlike two maps are: `symmetric_kl` and `jensen_shannon` in nats, `hellinger` 0 to 1."""

    symmetric_kl: np.ndarray
    jensen_shannon: np.ndarray
    hellinger: np.ndarray


class Binding(NamedTuple):
    """Overlap of each attribute with its `own` entity, the most with an `other`, and the difference."""

    own: np.ndarray
    other: np.ndarray
    margin: np.ndarray


def distribution(maps: Any) -> np.ndarray:
    """Scale maps to sum to 1 over space.

    Parameters
    ----------
    maps : array or tensor, (..., y, x)
        Finite and not negative.

    Returns
    -------
    float64 array, (..., y, x)
        A map of zeros says nothing of place and becomes uniform.

    Raises
    ------
    SettingError
        NaN, infinite or negative values, or no cells.

    Examples
    --------
    >>> distribution([[[1., 3.]], [[0., 0.]]]).tolist()
    [[[0.25, 0.75]], [[0.5, 0.5]]]
    """
    values = as_maps(maps, "maps")
    # Dividing by the largest first keeps sums of subnormal numbers from vanishing or overflowing.
    top = values.max(axis=(-2, -1), keepdims=True)
    values = np.where(top > 0, values / np.where(top > 0, top, 1.0), 1.0)
    return values / values.sum(axis=(-2, -1), keepdims=True)


def leakage(maps: Any, masks: Any) -> np.ndarray:
    """Share of each map's mass in each region and in the background: K[e, f] = sum of p_e over R_f.

    Parameters
    ----------
    maps : array or tensor, (..., entity, y, x)
        Attention maps, on any scale; finite and not negative.
    masks : bool array, (..., region, y, x)
        Regions that do not overlap.

    Returns
    -------
    float array, (..., entity, region + 1)
        The last column is the background (outside every region). Rows sum to 1.

    Raises
    ------
    SettingError
        Overlapping masks, shapes that do not belong together, NaN, infinite or negative values.

    Examples
    --------
    >>> cat, frog = [[6., 2., 1., 1.]], [[0., 0., 4., 1.]]
    >>> leakage([cat, frog], [[[1, 1, 0, 0]], [[0, 0, 1, 0]]])
    array([[0.8, 0.1, 0.1],
           [0. , 0.8, 0.2]])
    """
    p = distribution(maps)
    regions = as_masks(masks, "masks")
    if p.ndim < 3 or regions.ndim < 3:
        raise SettingError(f"maps {p.shape} and masks {regions.shape} need (..., entity, y, x) and (..., region, y, x)")
    same_size(p, regions)
    check_disjoint(regions)
    regions = np.concatenate([regions, ~regions.any(axis=-3, keepdims=True)], axis=-3)
    return _shares(p, regions)


def truth_leakage(maps: Any, masks: Any) -> np.ndarray:
    """Share of each map's mass on each thing in the finished image, and on the rest of it.

    Parameters
    ----------
    maps : array or tensor, (..., entity, y, x)
        Attention maps, on any scale; finite and not negative.
    masks : bool array, (..., thing, y, x)
        Where each thing is in the image, at any resolution. They may overlap, as those of two things fused
        into one do.

    Returns
    -------
    float array, (..., entity, thing + 1)
        The last column is the rest of the image. Rows sum to 1; a thing that is not there has a column of
        zeros.

    Raises
    ------
    SettingError
        Shapes that do not belong together, NaN, infinite or negative values.

    Notes
    -----
    A cell's mass is spread evenly over the pixels it covers, so that a cell that a thing half fills counts by
    half. Pixels that several things share count for each in equal parts, whatever the order of the things.

    Examples
    --------
    Four cells over a picture of eight pixels; the cat fills a cell and a half, the frog the last one:

    >>> cat, frog = [[6., 2., 1., 1.]], [[0., 0., 4., 1.]]
    >>> truth_leakage([cat, frog], [[[1, 1, 1, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0, 1, 1]]])
    array([[0.7, 0.1, 0.2],
           [0. , 0.2, 0.8]])
    """
    p = distribution(maps)
    things = as_masks(masks, "masks")
    if p.ndim < 3 or things.ndim < 3:
        raise SettingError(f"maps {p.shape} and masks {things.shape} need (..., entity, y, x) and (..., thing, y, x)")
    claims = things.sum(axis=-3, keepdims=True)
    parts = np.concatenate([things / np.maximum(claims, 1), claims == 0], axis=-3)
    return _shares(p, area_mean(parts, p.shape[-2:]))


def bleed(matrix: Any, own: Sequence[int] | None = None) -> np.ndarray:
    """Share of each map's mass outside its own region: 1 - K[e, e].

    Parameters
    ----------
    matrix : array, (..., entity, region + 1)
        As :func:`leakage` gives.
    own : sequence of int, optional
        Own region of each row; row e's is e unless said. For attributes: the index of the entity each belongs
        to.

    Returns
    -------
    float array, (..., entity)

    Raises
    ------
    SettingError
        If `own` does not fit the matrix.

    Examples
    --------
    >>> bleed([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]]).round(6)
    array([0.3, 0.2])
    """
    values, index = _own(matrix, own)
    return 1.0 - values[..., np.arange(len(index)), index]


def intrusion(matrix: Any, own: Sequence[int] | None = None) -> np.ndarray:
    """Share of each map's mass in the others' regions: sum of K[e, f] over f != e, without background.

    Parameters, shape of the result and errors as for :func:`bleed`.

    Examples
    --------
    >>> intrusion([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]])
    array([0.2, 0. ])

    An attribute of the second entity:

    >>> intrusion([[0.7, 0.2, 0.1]], own=[1])
    array([0.7])
    """
    values, index = _own(matrix, own)
    others = np.arange(values.shape[-1] - 1) != index[:, None]
    return (values[..., :-1] * others).sum(axis=-1)


def spill(matrix: Any) -> np.ndarray:
    """Share of each map's mass in the background, K[e, background]: float array (..., entity).

    Examples
    --------
    >>> spill([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]])
    array([0.1, 0.2])
    """
    return _matrix(matrix)[..., -1]


def mask_overlap(a: Any, b: Any) -> MaskOverlap:
    """Overlap of masks binarized apart, which may share cells.

    Parameters
    ----------
    a, b : bool arrays, (..., y, x)
        Leading dimensions broadcast.

    Returns
    -------
    MaskOverlap
        `iou` = both / either, `dice` = 2 both / (a + b), `coefficient` = both / the smaller; arrays (...).
        Where nothing is there to overlap (an empty mask) all three are 0.

    Raises
    ------
    SettingError
        Sizes that differ.

    Examples
    --------
    >>> overlap = mask_overlap([[1, 1, 0, 0]], [[0, 1, 1, 1]])
    >>> float(overlap.iou), float(overlap.dice), float(overlap.coefficient)
    (0.25, 0.4, 0.5)
    """
    a, b = as_masks(a, "a"), as_masks(b, "b")
    same_size(a, b)
    a, b = broadcast(a, b)
    both = (a & b).sum(axis=(-2, -1))
    size_a, size_b = a.sum(axis=(-2, -1)), b.sum(axis=(-2, -1))
    return MaskOverlap(
        _ratio(both, size_a + size_b - both),
        _ratio(2 * both, size_a + size_b),
        _ratio(both, np.minimum(size_a, size_b)),
    )


def soft_overlap(a: Any, b: Any) -> SoftOverlap:
    """Overlap of two maps as they are, without thresholds.

    Parameters
    ----------
    a, b : arrays or tensors, (..., y, x)
        Finite and not negative. The scale counts: pass :func:`distribution` of each to compare places and not
        strengths.

    Returns
    -------
    SoftOverlap
        `ruzicka` = sum min(a, b) / sum max(a, b); `astar` = sum min(a, b) / sum (a + b), half a soft Dice;
        arrays (...). Two maps of zeros overlap by 0.

    Raises
    ------
    SettingError
        NaN, infinite or negative values, or sizes that differ.

    References
    ----------
    Agarwal et al., "A-STAR: Test-time Attention Segregation and Retention for Text-to-image Synthesis", 2023
    (`astar`).

    Examples
    --------
    >>> overlap = soft_overlap([[1., 2., 1.]], [[0., 1., 2.]])
    >>> float(overlap.ruzicka), round(float(overlap.astar), 3)
    (0.4, 0.286)
    """
    a, b = as_maps(a, "a"), as_maps(b, "b")
    same_size(a, b)
    a, b = broadcast(a, b)
    # Scaled by the pair's largest value, so that subnormal maps do not underflow.
    top = np.maximum(a.max(axis=(-2, -1), keepdims=True), b.max(axis=(-2, -1), keepdims=True))
    a, b = a / np.where(top > 0, top, 1.0), b / np.where(top > 0, top, 1.0)
    common = np.minimum(a, b).sum(axis=(-2, -1))
    return SoftOverlap(_ratio(common, np.maximum(a, b).sum(axis=(-2, -1))), _ratio(common, (a + b).sum(axis=(-2, -1))))


def divergence(a: Any, b: Any) -> Divergence:
    """How unlike two maps are as distributions over space; their scale does not count.

    Parameters
    ----------
    a, b : arrays or tensors, (..., y, x)
        Finite and not negative; each is scaled to sum to 1 first.

    Returns
    -------
    Divergence
        `symmetric_kl` = (KL(p||q) + KL(q||p)) / 2, with p and q raised to at least 1e-12 in each cell;
        `jensen_shannon` against the mean of both; `hellinger` distance. Arrays (...), all 0 for equal maps.

    Raises
    ------
    SettingError
        NaN, infinite or negative values, or sizes that differ.

    Examples
    --------
    >>> apart = divergence([[1., 0.]], [[0., 5.]])
    >>> bool(np.isclose(apart.jensen_shannon, np.log(2))), float(apart.hellinger)
    (True, 1.0)
    >>> [float(value) for value in divergence([[1., 3.]], [[2., 6.]])]
    [0.0, 0.0, 0.0]
    """
    p, q = distribution(a), distribution(b)
    same_size(p, q)
    p, q = broadcast(p, q)
    high_p, high_q = np.maximum(p, TINY), np.maximum(q, TINY)
    symmetric = 0.5 * ((high_p - high_q) * (np.log(high_p) - np.log(high_q))).sum(axis=(-2, -1))  # no term is negative
    middle = np.log(np.maximum((p + q) / 2, TINY))
    half = [(x * (np.log(np.maximum(x, TINY)) - middle)).sum(axis=(-2, -1)) for x in (p, q)]
    shannon = np.clip(0.5 * (half[0] + half[1]), 0.0, np.log(2))
    hellinger = np.sqrt(np.clip(0.5 * ((np.sqrt(p) - np.sqrt(q)) ** 2).sum(axis=(-2, -1)), 0.0, 1.0))
    return Divergence(symmetric, shannon, hellinger)


def binding(attributes: Any, entities: Any, owners: Sequence[int]) -> Binding:
    """Does each attribute attend where its own entity does, more than where another one does?

    Parameters
    ----------
    attributes : array or tensor, (..., attribute, y, x)
        Attention maps of the attributes, on any scale.
    entities : array or tensor, (..., entity, y, x)
        Attention maps of the entities' nouns, on any scale.
    owners : sequence of int
        Index of the entity that each attribute belongs to.

    Returns
    -------
    Binding
        `own`: Ruzicka overlap of attribute and owner as distributions; `other`: the largest with another
        entity, 0 if there is none; `margin` = own - other, below 0 where the attribute sits with the wrong
        entity. Arrays (..., attribute).

    Raises
    ------
    SettingError
        `owners` that do not fit; NaN, infinite or negative values; sizes that differ.

    Examples
    --------
    The red of "a red car and a blue bird" looks at the bird:

    >>> car, bird = [[4., 0., 0.]], [[0., 2., 2.]]
    >>> float(binding([[[0., 1., 1.]]], [car, bird], owners=[0]).margin[0])
    -1.0
    """
    overlap = _attribute_overlap(attributes, entities)
    index = _owners(owners, *overlap.shape[-2:])
    own = overlap[..., np.arange(len(index)), index]
    others = np.where(np.arange(overlap.shape[-1]) == index[:, None], 0.0, overlap)
    other = others.max(axis=-1)
    return Binding(own, other, own - other)


@dataclass(frozen=True, eq=False)
class Bleeding:
    """Measures of one run; :func:`measure` makes it.

    Attributes
    ----------
    leakage : DataArray, float (step, entity, region)
        The leakage matrix of each step; the last region is "background". Rows sum to 1.
    attribute_leakage : DataArray, float (step, attribute, region), or None
        The same for attributes, in the regions of the entities; coordinate `owner` (attribute).
    frame : DataFrame
        What :meth:`to_frame` gives.
    truth_leakage : DataArray, float (step, entity, region), or None
        As `leakage`, with the entities' places in the finished image for regions; None where the image was
        not judged.
    attribute_truth_leakage : DataArray, float (step, attribute, region), or None
        The same for attributes.
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
            Columns step, measure, entity, other, value. `entity` is the entity or attribute that the value is
            about, `other` the region, entity or owner it is set against; both are "" where a measure has
            none.

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

            Regions include "background". Mask overlap is of the Otsu mask of each map, soft overlap of the
            maps as distributions; see :func:`measure`. The measures called truth, and pointing, set attention
            against the finished image and are there only where it was judged: the first three are NaN for an
            entity that is not in the image (truth_auc also for one that fills it), the leakage onto it is 0.
        """
        return self.frame.copy()

    def overall(self) -> pd.DataFrame:
        """Mean of every measure over all steps measured, each step counting the same.

        Returns
        -------
        DataFrame
            Columns measure, entity, other, value; NaN where a measure is NaN at every step.
        """
        return self.frame.groupby(["measure", "entity", "other"], sort=False, as_index=False)["value"].mean()

    def _tables(self) -> list[tuple[str, pd.DataFrame]]:
        """Titled tables of means over steps: one row an entity, a pair, an attribute."""
        overall = self.overall()
        entities = list(self.leakage["entity"].values)

        def wide(measures: list[str], rows: list[str]) -> pd.DataFrame:
            part = overall[overall["measure"].isin(measures)].set_index([*rows, "measure"])["value"]
            return part.unstack("measure", sort=False)[measures].rename_axis(columns=None)

        matrix = self.leakage.mean("step").to_pandas().rename_axis(index=None, columns=None)
        tables = [
            ("Where each entity's attention lies (leakage)", matrix),
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
            tables.append(("Attention against the image", agreement.join(lies).rename_axis(index=None)))
        masses = overall[overall["measure"].isin(["start_mass", "end_mass"])]
        if len(masses):
            tables.append(("Mass apart from the words", masses.set_index("measure")[["value"]].rename_axis(index=None)))
        return tables

    def _title(self) -> str:
        steps = self.leakage.sizes["step"]
        return f"Bleeding, means over {steps} step{'s' if steps != 1 else ''}"

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
    """Measure the bleeding of a run, step by step.

    Parameters
    ----------
    maps : DataArray, (step, token, y, x)
        Raw attention of the entities, as ``recording.maps("entities")`` gives; labels along token are the
        entities'.
    regions : DataArray, bool (step, entity, y, x), or (entity, y, x) for every step, or Regions
        Regions of the same entities, of the same size; they must not overlap.
    attributes : DataArray, (step, token, y, x), optional
        Raw attention of the attributes, labels along token.
    owners : mapping, optional
        Label of each attribute -> label of the entity it belongs to; needed with `attributes`.
    start, end : DataArray, (step,), optional
        Attention mass on start-of-text, and on end-of-text with padding (means over space, 0 to 1). Reported
        apart.
    truth : Verdict or DataArray, bool (entity, y, x), optional
        Where each entity is in the finished image, at any resolution, as a judge saw it; an empty mask where it
        is not. Attention is then set against the image too.

    Returns
    -------
    Bleeding

    Raises
    ------
    SettingError
        Steps, labels or sizes that do not belong together; overlapping regions; NaN, infinite or negative
        values.

    Notes
    -----
    Mask overlap binarizes each map by itself with Otsu's threshold, because regions never
    overlap. Soft overlap is taken of the maps as distributions, so that it tells of places and not of one
    entity's map being weaker.

    With `truth`, truth_iou, truth_auc and pointing are :func:`elakit.measures.agreement.agreement_iou`,
    :func:`~elakit.measures.agreement.auc` and :func:`~elakit.measures.agreement.pointing_game` of each map against the entity's mask,
    brought to the maps' grid by :func:`~elakit.measures.masks.downscale`; truth_leakage and attribute_truth_leakage are
    :func:`truth_leakage`, which takes the masks as they are.

    Examples
    --------
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

    In the image the frog came to be where the cat's attention was, and the cat is missing:

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
    if BACKGROUND in names:
        raise SettingError(
            f'an entity is labeled "{BACKGROUND}", which names the rest of the image; rename the entity'
        )
    if not len(steps):
        raise SettingError("maps have no step; record at least one full step")
    masks = _regions_of(regions, names, steps)
    values = maps.values
    matrix = leakage(values, masks)
    regions_and_rest = [*names, BACKGROUND]
    dims = ("step", "entity", "region")
    leak = xr.DataArray(
        matrix,
        dims=dims,
        coords={**_along_step(maps), "entity": names, "region": regions_and_rest},
        name="leakage",
    )

    table = _Table(steps)
    table.add("leakage", [(e, r) for e in names for r in regions_and_rest], matrix.reshape(len(steps), -1))
    alone = [(e, "") for e in names]
    table.add("bleed", alone, bleed(matrix))
    table.add("intrusion", alone, intrusion(matrix))
    table.add("spill", alone, spill(matrix))
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
            words = steps_first(attributes, "attributes").values
            attribute_truth = _add_truth_leakage(table, attribute_leak, words, seen)
    for name, mass in (("start_mass", start), ("end_mass", end)):
        if mass is not None:
            table.add(name, [("", "")], _mass(mass, name.split("_")[0], steps)[:, None])
    return Bleeding(leak, attribute_leak, table.frame(), truth_leak, attribute_truth)


# --- parts of measure ---------------------------------------------------------------------------------------


class _Table:
    """Collects measures and makes the tidy table of them."""

    def __init__(self, steps: np.ndarray) -> None:
        self.steps = steps
        self.parts: list[pd.DataFrame] = []

    def add(self, name: str, about: list[tuple[str, str]], values: np.ndarray) -> None:
        """Values (step, len(about)) of a measure; each column is about (entity, other)."""
        count = len(about)
        if not count:
            return
        self.parts.append(
            pd.DataFrame(
                {
                    "step": np.repeat(self.steps, count),
                    "measure": name,
                    "entity": [entity for entity, _ in about] * len(self.steps),
                    "other": [other for _, other in about] * len(self.steps),
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
    apart = otsu_masks(values)
    masks = mask_overlap(apart[:, first], apart[:, second])
    p = distribution(values)
    soft = soft_overlap(p[:, first], p[:, second])
    unlike = divergence(p[:, first], p[:, second])
    for name, result in (
        ("iou", masks.iou),
        ("dice", masks.dice),
        ("overlap_coefficient", masks.coefficient),
        ("ruzicka", soft.ruzicka),
        ("astar", soft.astar),
        ("symmetric_kl", unlike.symmetric_kl),
        ("jensen_shannon", unlike.jensen_shannon),
        ("hellinger", unlike.hellinger),
    ):
        table.add(name, pairs, result)


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
            f"attributes have steps {step_labels(attributes)}, maps {steps}; give the same steps of both"
        )
    if attributes.shape[-2:] != values.shape[-2:]:
        raise SettingError(
            f"attributes are {attributes.shape[-2:]} cells, maps {values.shape[-2:]}; take one size of both"
        )
    if missing := [word for word in words if word not in (owners or {})]:
        raise SettingError(
            f"attributes {missing} have no owner; pass owners={{attribute: entity}} with entities of {names}"
        )
    assert owners is not None
    if strange := sorted({owners[word] for word in words} - set(names)):
        raise SettingError(f"owners name {strange}, which are no entities of the maps; the entities are {names}")
    own = [names.index(owners[word]) for word in words]

    matrix = leakage(attributes.values, masks)
    overlap = _attribute_overlap(attributes.values, values)
    owned = [(word, owners[word]) for word in words]
    regions_and_rest = [*names, BACKGROUND]
    table.add("attribute_leakage", [(w, r) for w in words for r in regions_and_rest], matrix.reshape(len(steps), -1))
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
            "region": regions_and_rest,
            "owner": ("attribute", [owners[word] for word in words]),
        },
        name="attribute_leakage",
    )


def _add_agreement(table: _Table, names: list[str], values: np.ndarray, seen: np.ndarray) -> None:
    alone = [(name, "") for name in names]
    cells = downscale(seen, values.shape[-2:])
    for name, function in (("truth_iou", agreement_iou), ("truth_auc", auc), ("pointing", pointing_game)):
        table.add(name, alone, function(values, cells))


def _add_truth_leakage(table: _Table, leak: xr.DataArray, values: np.ndarray, seen: np.ndarray) -> xr.DataArray:
    """The leakage of entities or attributes again, with what is in the image for regions."""
    matrix = truth_leakage(values, seen)
    name = str(leak.name).replace("leakage", "truth_leakage")
    rows, regions = (leak[leak.dims[i]].values.tolist() for i in (1, 2))
    table.add(name, [(row, region) for row in rows for region in regions], matrix.reshape(len(matrix), -1))
    return leak.copy(data=matrix).rename(name)


def _attribute_overlap(attributes: Any, entities: Any) -> np.ndarray:
    """Ruzicka overlap of every attribute with every entity as distributions, (..., attribute, entity)."""
    words, things = distribution(attributes), distribution(entities)
    if words.ndim < 3 or things.ndim < 3:
        raise SettingError(
            f"attributes {words.shape} and entities {things.shape} need (..., attribute or entity, y, x)"
        )
    return np.asarray(soft_overlap(words[..., :, None, :, :], things[..., None, :, :, :]).ruzicka)


def _regions_of(regions: xr.DataArray | Regions, names: list[str], steps: np.ndarray) -> np.ndarray:
    """Masks (step or nothing, entity, y, x) in the order of `names`."""
    if isinstance(regions, Regions):
        regions = regions.to_xarray()
    if not isinstance(regions, xr.DataArray):
        raise SettingError(f"regions are a {type(regions).__name__}; give Regions, or a DataArray (step, entity, y, x)")
    if set(regions.dims) not in ({"step", "entity", "y", "x"}, {"entity", "y", "x"}):
        raise SettingError(f"regions have dimensions {regions.dims}; (step, entity, y, x) or (entity, y, x) are needed")
    found = _labels(regions, "regions")
    if sorted(found) != sorted(names):
        raise SettingError(f"regions are of {found}, maps of {names}; both need the same entities")
    if "step" in regions.dims and not np.array_equal(step_labels(regions), steps):
        raise SettingError(f"regions have steps {step_labels(regions)}, maps {steps}; give the same steps of both")
    regions = regions.isel(entity=[found.index(name) for name in names]).transpose(..., "entity", "y", "x")
    return np.asarray(regions.values)


def _labels(array: xr.DataArray, what: str) -> list[str]:
    if "entity" in array.coords:
        names = [str(name) for name in array["entity"].values]
    else:
        names = [f"entity {i}" for i in range(array.sizes["entity"])]
    if len(set(names)) < len(names):
        raise SettingError(f"{what} have the labels {names}; each must be there once")
    return names


def _along_step(array: xr.DataArray) -> dict[Any, Any]:
    return {name: c for name, c in array.coords.items() if c.dims == ("step",)}


def _mass(mass: xr.DataArray, what: str, steps: np.ndarray) -> np.ndarray:
    if not isinstance(mass, xr.DataArray) or mass.dims != ("step",):
        got = mass.dims if isinstance(mass, xr.DataArray) else type(mass).__name__
        raise SettingError(
            f"{what} is {got}; a DataArray with dimension (step,) is needed: take the mean over the others"
        )
    if not np.array_equal(step_labels(mass), steps):
        raise SettingError(f"{what} has steps {step_labels(mass)}, maps {steps}; give the same steps of both")
    return as_array(mass.values, what)


# --- arguments ----------------------------------------------------------------------------------------------


def _shares(p: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Mass of each distribution (..., entity, y, x) in each part (..., part, y, x) of space."""
    try:
        return np.einsum("...eyx,...ryx->...er", p, parts.astype(np.float64))
    except ValueError:
        raise SettingError(
            f"leading dimensions of maps {p.shape[:-3]} and masks {parts.shape[:-3]} do not belong together"
        ) from None


def _ratio(part: Any, whole: Any) -> Any:
    """part / whole, and 0 where whole is 0."""
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 0.0)[()]


def _matrix(matrix: Any) -> np.ndarray:
    values = as_array(matrix, "leakage matrix")
    if values.ndim < 2 or values.shape[-1] < 2:
        raise SettingError(f"leakage matrix has shape {values.shape}; it needs (..., entity, region + background)")
    return values


def _own(matrix: Any, own: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    values = _matrix(matrix)
    rows, columns = values.shape[-2:]
    if own is None:
        if rows != columns - 1:
            raise SettingError(f"{rows} rows and {columns - 1} regions: say each row's own region with own=[...]")
        return values, np.arange(rows)
    return values, _owners(own, rows, columns - 1)


def _owners(owners: Sequence[int], rows: int, count: int) -> np.ndarray:
    index = np.asarray(owners)
    if index.shape != (rows,) or index.dtype.kind not in "iu" or ((index < 0) | (index >= count)).any():
        raise SettingError(f"owners {list(owners)} do not fit: {rows} indices from 0 to {count - 1} are needed")
    return index
