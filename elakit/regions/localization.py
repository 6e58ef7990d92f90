"""Localization of entities: computation of one region per entity from the entities' attention maps.

:func:`localize` has four stages:

* *Differentiation* compares the maps of the entities with each other, and gives every location a score per entity.
* *Binarization* selects the locations whose score is high enough.
* The selection of components, which is optional, keeps only the largest connected components of each region.
* The *floor* enlarges regions that are too small, so that a neglected entity has a region, too.
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
        receives the attention that no word receives. Required by ``binarization="background"``, and not used by other
        values of `binarization`.
    differentiation : {"argmax", "subtract-max", "subtract-mean", "none"}
        Rule by which an entity's map becomes the entity's scores, one score per location:

        * "argmax": the map where it is the largest of all entities' maps, and 0 elsewhere;
        * "subtract-max": the map minus the largest of the other entities' maps, and at least 0;
        * "subtract-mean": the map minus the mean of the other entities' maps, and at least 0;
        * "none": the map itself.

        If there is only one entity, every rule gives the map itself.
    binarization : {"background", "otsu", "mean-std", "quantile"}
        Rule for the threshold that an entity's score must exceed, so that the location is in the entity's region:

        * "background": `threshold` times the value of `sot` at the location;
        * "otsu": Otsu's threshold of the entity's scores;
        * "mean-std": mean plus standard deviation of the entity's scores;
        * "quantile": quantile `quantile` of the entity's scores.

        If the scores of several entities exceed their thresholds at one location, the location goes to the entity with
        the largest map there, and on a tie to the first entity. With "background", the differentiations "argmax" and
        "none" therefore select the same locations.
    threshold : float
        Share of `sot` that a score must exceed, 0 or more, by default 0.1125; only for "background".
    quantile : float
        Quantile of an entity's scores that a score must exceed, 0 to 1; only for "quantile".
    normalize : bool
        Whether every map, `sot` included, is scaled to 0..1 (min-max) before differentiation. The entities are then
        compared by the shape of their maps and not by the strength.
    subtract_pedestal : bool
        Whether the pedestal of each entity's map, the smallest value, is subtracted before differentiation. Attention
        that a word receives at all locations does not show where the entity is. The default of `threshold` was fitted
        to the paper's figure, which displays the maps without their pedestal. `elakit.ELA` and `Run.regions` subtract
        the pedestal from recorded maps.
    min_area : int, optional
        Smallest area of a region, in locations. Smaller regions are enlarged (see *Floor* in the notes). The default is
        2% of the map, but at least one location: 5 locations at 16 x 16. With 0, an entity may have an empty region.
    smooth : float
        Standard deviation, in locations, of a Gaussian filter that is applied to all maps before anything else; 0
        switches the filter off.
    keep_components : int, optional
        Number of connected components (8-neighborhood) to keep in each region. The largest components are kept; on a
        tie, the components that come first in reading order. By default, all components are kept.
    entities : sequence of str, optional
        Distinct labels of the entities. By default, the labels along the first dimension of a DataArray; without such
        labels, "entity 0", "entity 1" and so on.

    Returns
    -------
    Regions

    Raises
    ------
    SettingError
        An option is unknown or out of range; shapes do not match; values are NaN, infinite or negative; `sot` is
        missing for "background"; labels are repeated or do not match the maps; or the map has too few locations to give
        every region the smallest area.

    Notes
    -----
    The paper states that differentiation and binarization of cross-attention maps locate entities in areas that
    do not overlap. The paper's method figure shows the start-of-text map next to the entities' maps. The exact rule
    and its threshold are not public. The options and defaults here are ours, chosen by how well they reproduce the two
    regions of the figure. The defaults give IoU .80 (cat) and .93 (frog). The threshold is fitted to this one figure,
    and no rule that considers one location at a time reproduces the figure exactly.
    ``python -m benchmarks.localization`` prints the agreement of every rule.

    The figure displays each map scaled to 0..1; a regression restores the scale of the raw maps. Attention sums
    to 1 over the tokens, so the start-of-text map (SoT) is low where the maps of the entities are high. For the
    displayed maps, the regression gives SoT = .995 - .312 cat - 1.022 frog, with R^2 = .996. In units of SoT's
    range, the raw maps are therefore .312 x cat and 1.022 x frog. The lowest raw value of SoT cannot be restored,
    and is taken as 0.

    *Floor.* A region smaller than `min_area` keeps its locations and grows by one location at a time, until it has
    `min_area` locations. The region gets the free location where the entity's score is highest. On a tie, the higher
    value of the entity's map decides, and on a further tie the reading order. If several regions are too small, the
    entity with the highest score at its next location is served first. If no location is free, locations are taken from
    regions larger than `min_area`. On a small map with many entities, the default of `min_area` is an equal share of
    the map for each entity.

    Maps that are constant, zero or equal are allowed. Their regions result from ties and the floor.

    References
    ----------
    Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024,
    PMLR 235:58955-58966. Otsu, "A threshold selection method from gray-level histograms", 1979.

    Examples
    --------
    The cat is on the left and the frog on the right. The second location has attention of both, but more of the frog.
    At the last location, both maps are low and the start-of-text map is high, so the location is background:

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
            f"entities has {number_of(len(names), 'entry')} for {number_of(len(values), 'map')}; give one label per "
            "map."
        )
    if binarization == "background" and sot is None:
        raise SettingError(
            'binarization="background" needs the start-of-text map: pass this map as sot=..., or choose another rule, '
            'such as binarization="otsu".'
        )
    least = _least_area(min_area, len(values), values[0].size)

    background = None
    if sot is not None:
        background = as_array(sot, "sot")
        if background.shape != values.shape[1:]:
            raise SettingError(
                f"sot has shape {background.shape}, but each map has shape {values.shape[1:]}. sot must have the "
                "shape of one map."
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
        Raw probabilities of start-of-text at the same steps and locations, as ``recording.maps("<start>")`` returns
        them. A token dimension of length 1 is dropped. Required by the default of `binarization`.
    **options
        Options of :func:`localize`.

    Returns
    -------
    DataArray, bool (step, entity, y, x)
        Regions, True inside. The coordinates along step, y and x are the coordinates of `maps`, and entity has the
        labels of the entities. The coordinate `floored`, bool (step, entity), is True for each region that was enlarged
        to the smallest area.

    Raises
    ------
    SettingError
        Maps or options are invalid for :func:`localize`, dimensions or steps do not match, or there is no step.

    Examples
    --------
    The maps are rows of four locations. At the first step, only location 0 has attention of the cat, and only location
    1 attention of the frog. At the second step, the locations are 2 and 3:

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
                f"sot has the steps {_shown(sot)}, but maps have the steps {_shown(maps)}. Give both the same steps."
            )
    found = [
        localize(maps.isel(step=i), None if sot is None else sot.isel(step=i), **options)
        for i in range(maps.sizes["step"])
    ]
    if not found:
        raise SettingError("maps contain no complete step. Record a run that finishes at least one step.")
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
    """Return maps with their dimensions in the order (step, entity, y, x).

    Parameters
    ----------
    maps : DataArray
        Maps with the dimensions step, y, x, and entity or token, in any order. A dimension token is renamed to entity.
    what : str
        Name of the maps in error messages.

    Raises
    ------
    SettingError
        The maps are not a DataArray, or have other dimensions.
    """
    if not isinstance(maps, xr.DataArray):
        raise SettingError(
            f"{what} have type {type(maps).__name__}; a DataArray with dimensions (step, token, y, x) is needed. Pass "
            "the maps of a recorded run, such as run.recording.maps('entities')."
        )
    if "token" in maps.dims and "entity" not in maps.dims:
        # Coordinates along token other than its labels (token_index) do not describe entities.
        extra = [n for n, c in maps.coords.items() if n == "entity" or ("token" in c.dims and n != "token")]
        maps = maps.drop_vars(extra).rename(token="entity")
    if set(maps.dims) != {"step", "entity", "y", "x"}:
        raise SettingError(
            f"{what} have dimensions {maps.dims}; (step, token, y, x) are needed. Pass the maps of all steps of a "
            "recorded run, such as run.recording.maps('entities')."
        )
    return maps.transpose("step", "entity", "y", "x")


def step_labels(array: xr.DataArray) -> np.ndarray:
    """Values of the coordinate "step" of an array. Without this coordinate, the steps are numbered from 0."""
    return np.asarray(array["step"].values)


def _shown(array: xr.DataArray) -> str:
    """Steps of an array on one line, for an error message; of more than six steps, the first and last three."""
    return np.array2string(step_labels(array), threshold=6, separator=", ")


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
            f"entities: {', '.join(map(repr, repeated))} {'occurs' if len(repeated) == 1 else 'occur'} more than once. "
            "Give different labels, such as 'car#1' and 'car#2'."
        )
    return names


def _least_area(min_area: int | None, count: int, area: int) -> int:
    """Return the smallest area of a region in locations, for `count` entities on a map of `area` locations.

    The result is `min_area`, if `min_area` is given. The default is 2% of the map, but at least one location, and at
    most an equal share of the map for each entity.

    Raises
    ------
    SettingError
        The map is too small for `count` regions of this area.
    """
    if count > area and min_area != 0:
        raise SettingError(
            f"{count} entities cannot have disjoint regions on a map of {number_of(area, 'location')}. Use larger maps."
        )
    if min_area is None:
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
