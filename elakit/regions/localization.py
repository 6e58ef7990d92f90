"""Localization of entities: computation of one region per entity from the entities' attention maps.

Four stages, each an option of :func:`localize`: *differentiation* compares the maps of the entities with each other,
*binarization* decides which locations are strong enough, small components may be removed, and a *floor* on the area
gives a neglected entity a region, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr

from elakit import checks
from elakit.errors import SettingError
from elakit.measures.arrays import as_array
from elakit.numbering import number_of
from elakit.regions import rules
from elakit.regions.result import Regions

if TYPE_CHECKING:
    import torch

Differentiation = Literal["argmax", "subtract-max", "subtract-mean", "none"]
Binarization = Literal["background", "otsu", "mean-std", "quantile"]

DIFFERENTIATIONS: tuple[str, ...] = get_args(Differentiation)
BINARIZATIONS: tuple[str, ...] = get_args(Binarization)

# Middle of the interval (.107 to .118) in which the default rule agrees with the paper's figure to IoU .79
# (cat) and .90 (frog); `python -m benchmarks.localization` prints it.
THRESHOLD = 0.1125
# Least area of a region as a share of the map: 5 locations at 16x16, 1 at 8x8.
FLOOR = 0.02


def localize(
    maps: np.ndarray | torch.Tensor | xr.DataArray | Sequence[Any],
    sot: np.ndarray | torch.Tensor | xr.DataArray | Sequence[Any] | None = None,
    *,
    differentiation: Differentiation = "argmax",
    binarization: Binarization = "background",
    threshold: float = THRESHOLD,
    quantile: float = 0.8,
    normalize: bool = False,
    subtract_pedestal: bool = False,
    min_area: int | None = None,
    smooth: float = 0.0,
    keep_components: int | None = None,
    entities: Sequence[str] | None = None,
) -> Regions:
    """Find a region for each entity from the entities' attention maps.

    Parameters
    ----------
    maps : array, tensor or DataArray, (entity, y, x)
        Raw cross-attention probabilities, one map per entity; finite and not negative. Tensors may be on any
        device and of any precision; gradients are not followed.
    sot : array, tensor or DataArray, (y, x), optional
        Raw probabilities of the start-of-text token, or another map that stands for the background. Start-of-text
        receives the attention that no word receives. Required by ``binarization="background"``, and not used by the
        other rules.
    differentiation : {"argmax", "subtract-max", "subtract-mean", "none"}
        Rule for the scores of an entity, from its map and those of the other entities: "argmax" gives its map where
        that is the largest, else 0; "subtract-max" and "subtract-mean" give its map minus the largest or the mean of
        the others, at least 0; "none" gives its map. With one entity, all four give its map.
    binarization : {"background", "otsu", "mean-std", "quantile"}
        Rule for the locations of an entity's region: those whose score exceeds `threshold` times the value of `sot` at
        the same location ("background"), Otsu's threshold of the entity's scores ("otsu"), their mean plus standard
        deviation ("mean-std"), or their `quantile` ("quantile"). A location that passes for two entities is assigned to
        the one with the larger map, or to the first of them on a tie. With "background", "argmax" and "none" are
        therefore the same rule.
    threshold : float
        Share of `sot` that a score must exceed, 0 or more, by default 0.1125; only for "background".
    quantile : float
        Quantile of an entity's scores that a score must exceed, 0 to 1; only for "quantile".
    normalize : bool
        Whether every map, `sot` included, is scaled to 0..1 (min-max) before differentiation, so that entities are
        compared by the shape of their maps and not by their strength.
    subtract_pedestal : bool
        Whether the smallest value of each entity's map (its pedestal) is subtracted before differentiation, because
        attention that a word receives everywhere does not show its location. The maps of the paper's figure, to which
        the threshold was fitted, are displayed without this pedestal; `elakit.ELA` and `Run.regions` subtract it from
        recorded maps.
    min_area : int, optional
        Smallest area of a region, in locations. By default 2% of the map, at least one location (5 at 16x16). 0
        switches the floor off, so that an entity may have an empty region. See Notes.
    smooth : float
        Standard deviation, in locations, of a Gaussian filter that is applied to all maps before anything else; 0
        switches it off.
    keep_components : int, optional
        Number of connected components (8-neighborhood) to keep in each region: the largest ones, and on a tie those
        that come first in reading order. All are kept by default.
    entities : sequence of str, optional
        Distinct labels of the entities. By default those of a DataArray's first dimension, else "entity 0",
        "entity 1", ...

    Returns
    -------
    Regions

    Raises
    ------
    SettingError
        An option is unknown or out of range; shapes do not match; values are NaN, infinite or negative; `sot` is
        missing for "background"; labels are repeated or do not match the maps; or the map has too few locations for
        one region of the least area per entity.

    Notes
    -----
    The paper states that differentiation and binarization of cross-attention maps locate entities in areas that
    do not overlap, and its method figure shows the start-of-text map next to the entities' maps. The exact rule and
    its threshold are not public: the options and defaults here are ours, chosen by how well they reproduce the two
    regions of that figure. The default gives IoU .80 (cat) and .93 (frog). The threshold is fitted to that one
    figure, and no rule that considers one location at a time reproduces it exactly.
    ``python -m benchmarks.localization`` prints the agreement of every rule.

    The figure displays each map scaled to 0..1; a regression restores the scale of the raw maps. Attention sums
    to 1 over the tokens, so the start-of-text map (SoT) is low where the maps of the entities are high. For the
    displayed maps, the regression gives SoT = .995 - .312 cat - 1.022 frog, with R^2 = .996. In units of SoT's
    range, the raw maps are therefore .312 x cat and 1.022 x frog. The lowest raw value of SoT cannot be restored,
    and is taken as 0.

    *Floor.* A region smaller than `min_area` keeps its locations and grows by one location at a time, until it has
    `min_area` locations. It gets the free location where the entity's score is highest; on a tie, the one of these
    where the entity's map is highest; on a further tie, the first in reading order. If several regions are too small,
    the next location goes to the entity whose candidate has the highest score. Only if no location is free are
    locations taken from regions larger than `min_area`. On maps too small for 2% per entity, the default of `min_area`
    is an equal share of the map for each entity.

    Maps that are constant, zero or equal are allowed. Their regions result from ties and the floor.

    References
    ----------
    Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024,
    PMLR 235:58955-58966. Otsu, "A threshold selection method from gray-level histograms", 1979.

    Examples
    --------
    A cat on the left, a frog on the right, and one location with attention of both:

    >>> cat  = [[.30, .20, .01, .01]]
    >>> frog = [[.01, .25, .60, .02]]
    >>> sot  = [[.60, .50, .30, .95]]
    >>> regions = localize([cat, frog], sot, entities=["cat", "frog"])
    >>> regions
    Regions(1x4: cat 1 location, frog 2 locations, background 1)
    >>> regions.masks.astype(int).tolist()
    [[[1, 0, 0, 0]], [[0, 1, 1, 0]]]

    An entity that is neglected everywhere still gets a region:

    >>> localize([cat, frog, [[.0, .0, .0, .005]]], sot).floored
    (False, False, True)
    """
    _check_options(differentiation, binarization, threshold, quantile, min_area, smooth, keep_components)
    values = as_array(maps, "maps")
    if values.ndim != 3 or 0 in values.shape:
        raise SettingError(f"maps have shape {values.shape}: give an array (entity, y, x) that is not empty.")
    names = _names(maps, entities, len(values))
    if len(names) != len(values):
        raise SettingError(
            f"entities has {number_of(len(names), 'entry')} for {number_of(len(values), 'map')}; give one per map."
        )
    if binarization == "background" and sot is None:
        raise SettingError(
            'binarization="background" compares the entities\' maps with the start-of-text map: pass it as sot=..., or '
            'choose another rule, such as binarization="otsu".'
        )
    least = _least_area(min_area, len(values), values[0].size)

    background = None
    if sot is not None:
        background = as_array(sot, "sot")
        if background.shape != values.shape[1:]:
            raise SettingError(
                f"sot has shape {background.shape}, but each map has {values.shape[1:]}. Give maps of one size."
            )
    values, background = rules.prepare(values, background, smooth, normalize, subtract_pedestal)

    winner = values.argmax(axis=0) == np.arange(len(values))[:, None, None]  # the first on a tie
    scores = rules.differentiate(values, winner, differentiation)
    # Every differentiation keeps the order of the entities at a location, so the largest map settles all conflicts.
    masks = (scores > rules.thresholds(scores, background, binarization, threshold, quantile)) & winner
    if keep_components is not None:
        masks = np.stack([rules.largest_components(mask, keep_components) for mask in masks])
    masks, floored = rules.fill_to_floor(masks, scores, values, least)
    return Regions(masks, scores, floored, names)


def localize_steps(maps: xr.DataArray, sot: xr.DataArray | None = None, **options: Any) -> xr.DataArray:
    """Find the regions of every step, each step independently.

    Parameters
    ----------
    maps : DataArray, (step, token, y, x)
        Raw probabilities, one map per entity and step, as ``recording.maps("entities")`` returns them. The token
        dimension may also be called entity.
    sot : DataArray, (step, y, x), optional
        Start-of-text probabilities of the same steps and size, as ``recording.maps("<start>")`` returns them; a token
        dimension of length one is dropped.
    **options
        Options of :func:`localize`.

    Returns
    -------
    DataArray, bool (step, entity, y, x)
        Coordinates along step, y and x are kept. The coordinate `floored`, bool (step, entity), marks the regions that
        were enlarged to the least area.

    Raises
    ------
    SettingError
        The same as for :func:`localize`; dimensions or steps do not match; or there is no step.

    Examples
    --------
    >>> maps = xr.DataArray(np.eye(4).reshape(2, 2, 1, 4), dims=("step", "token", "y", "x"))
    >>> maps = maps.assign_coords(token=["cat", "frog"])
    >>> regions = localize_steps(maps, binarization="otsu")
    >>> regions.dims, regions.sel(entity="frog").values.astype(int).tolist()
    (('step', 'entity', 'y', 'x'), [[[0, 1, 0, 0]], [[0, 0, 0, 1]]])
    """
    maps = steps_first(maps, "maps")
    if sot is not None:
        if not isinstance(sot, xr.DataArray):
            raise SettingError(
                f"sot has type {type(sot).__name__}; localize_steps needs a DataArray (step, y, x), such as "
                "run.recording.maps('<start>')."
            )
        if sot.sizes.get("token") == 1:
            sot = sot.isel(token=0)
        if set(sot.dims) != {"step", "y", "x"}:
            raise SettingError(
                f"sot has dimensions {sot.dims}; localize_steps needs (step, y, x). Pass the start-of-text maps of a "
                "recorded run: run.recording.maps('<start>')."
            )
        if not np.array_equal(step_labels(sot), step_labels(maps)):
            raise SettingError(
                f"sot has steps {step_labels(sot)}, but maps have {step_labels(maps)}; pass both with the same steps."
            )
    found = [
        localize(maps.isel(step=i), None if sot is None else sot.isel(step=i), **options)
        for i in range(maps.sizes["step"])
    ]
    if not found:
        raise SettingError("maps contain no complete step; record at least one.")
    along_step = {name: c for name, c in maps.coords.items() if c.dims == ("step",)}
    along_space = {name: c for name, c in maps.coords.items() if c.dims and set(c.dims) <= {"y", "x"}}
    return xr.DataArray(
        np.stack([regions.masks for regions in found]),
        dims=("step", "entity", "y", "x"),
        coords={
            **along_step,
            **along_space,
            "entity": list(found[0].entities),
            "floored": (("step", "entity"), np.array([regions.floored for regions in found])),
        },
        name="regions",
    )


def steps_first(maps: xr.DataArray, what: str) -> xr.DataArray:
    """Maps with the dimensions (step, entity, y, x), from maps whose entity dimension may be called token.

    Raises
    ------
    SettingError
        The maps are not a DataArray with the dimensions step, y, x, and entity or token; `what` is the name of the maps
        in the message.
    """
    if not isinstance(maps, xr.DataArray):
        raise SettingError(
            f"{what} are a {type(maps).__name__}; a DataArray with dimensions (step, token, y, x) is needed. Pass the "
            "maps of a recorded run, such as run.recording.maps('entities')."
        )
    if "token" in maps.dims and "entity" not in maps.dims:
        # Coordinates along token other than its labels (token_index) do not describe entities.
        extra = [n for n, c in maps.coords.items() if n == "entity" or ("token" in c.dims and n != "token")]
        maps = maps.drop_vars(extra).rename(token="entity")
    if set(maps.dims) != {"step", "entity", "y", "x"}:
        raise SettingError(
            f"{what} have dimensions {maps.dims}; (step, token, y, x) are needed. Pass the maps of a recorded run, "
            "such as run.recording.maps('entities'), before a step is selected or steps are averaged."
        )
    return maps.transpose("step", "entity", "y", "x")


def step_labels(array: xr.DataArray) -> np.ndarray:
    """Values of an array's coordinate "step"; 0, 1, 2, ... if it has none."""
    return np.asarray(array["step"].values)


def _names(maps: Any, entities: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if entities is not None:
        if isinstance(entities, str):
            raise SettingError(f"entities is the text {entities!r}; give a list of labels, such as [{entities!r}].")
        names = tuple(str(name) for name in entities)
    else:
        names = ()
        if isinstance(maps, xr.DataArray):
            first = next((dim for dim in maps.dims if dim not in ("y", "x")), None)
            if first in maps.coords:
                names = tuple(str(name) for name in maps.coords[first].values)
        names = names or tuple(f"entity {i}" for i in range(count))
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SettingError(
            f"entity labels {repeated} occur more than once; every entity needs its own, such as 'car#1' and 'car#2'."
        )
    return names


def _least_area(min_area: int | None, count: int, area: int) -> int:
    """Smallest area of a region, in locations: `min_area`, or its default for `count` entities on a map of `area`."""
    if min_area is None:
        if count > area:
            raise SettingError(
                f"{count} entities cannot have disjoint regions on a map of {number_of(area, 'location')}. Use larger "
                "maps."
            )
        return min(max(1, round(FLOOR * area)), area // count)
    if min_area * count > area:
        raise SettingError(
            f"min_area={min_area} for {number_of(count, 'entity')} needs {min_area * count} locations, but the map has "
            f"{area}. Give at most {area // count}."
        )
    return min_area


def _check_options(
    differentiation: str,
    binarization: str,
    threshold: float,
    quantile: float,
    min_area: int | None,
    smooth: float,
    keep_components: int | None,
) -> None:
    checks.choice(differentiation, "differentiation", DIFFERENTIATIONS)
    checks.choice(binarization, "binarization", BINARIZATIONS)
    checks.real_number(threshold, "threshold", 0)
    checks.share(quantile, "quantile")
    checks.real_number(smooth, "smooth", 0)
    if min_area is not None:
        checks.whole_number(min_area, "min_area", 0)
    if keep_components is not None:
        checks.whole_number(keep_components, "keep_components", 1)
