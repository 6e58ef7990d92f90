"""Where each entity is: attention maps -> one region an entity, never overlapping (ELA's localization).

Four stages, each an option of :func:`localize`: *differentiation* sets the entities' maps against each other,
*binarization* decides which cells are strong enough, small components may be dropped, and a *floor* on area
gives a neglected entity a region too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import xarray as xr
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from elakit.errors import SettingError
from elakit.measures.arrays import as_array
from elakit.measures.masks import check_disjoint, is_constant, otsu_thresholds

if TYPE_CHECKING:
    import torch

__all__ = ["Binarization", "Differentiation", "Regions", "divide", "localize", "localize_steps"]

Differentiation = Literal["argmax", "subtract-max", "subtract-mean", "none"]
Binarization = Literal["background", "otsu", "mean-std", "quantile"]

DIFFERENTIATIONS: tuple[str, ...] = get_args(Differentiation)
BINARIZATIONS: tuple[str, ...] = get_args(Binarization)

# Middle of the interval (.107 to .118) in which the default rule agrees with the paper's figure to IoU .79
# (cat) and .90 (frog); `python benchmarks/localization.py` prints it.
THRESHOLD = 0.1125
# Share of the map that is an entity's least region (5 cells at 16x16, 1 at 8x8).
FLOOR = 0.02


@dataclass(frozen=True, eq=False)
class Regions:
    """One region an entity, as boolean masks that never overlap.

    Attributes
    ----------
    masks : bool array, (entity, y, x)
        True inside the entity's region. No cell belongs to two entities.
    scores : float array, (entity, y, x)
        The differentiated maps that were binarized, same units as the maps given.
    floored : tuple of bool
        Whether the entity was too weak for a region of its own and was filled up to the least area.
    entities : tuple of str
        Label of each entity, in the order of `masks`.

    Raises
    ------
    SettingError
        If the masks overlap, or the shapes do not belong together.
    """

    masks: np.ndarray
    scores: np.ndarray
    floored: tuple[bool, ...]
    entities: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != np.bool_:
            raise SettingError(
                f"masks are {self.masks.dtype} with shape {self.masks.shape};"
                " regions need booleans of shape (entity, y, x)"
            )
        if self.scores.shape != self.masks.shape:
            raise SettingError(
                f"scores have shape {self.scores.shape}, the masks {self.masks.shape}; they must be equal"
            )
        for what, values in (("floored", self.floored), ("entities", self.entities)):
            if len(values) != len(self.masks):
                raise SettingError(f"{len(values)} {what} for {len(self.masks)} masks; give one for each")
        check_disjoint(self.masks)

    @property
    def background(self) -> np.ndarray:
        """Cells outside every region, bool (y, x)."""
        return np.asarray(~self.masks.any(axis=0))

    def to_xarray(self) -> xr.DataArray:
        """Masks with named dimensions: bool (entity, y, x), with coordinate `floored` along entity."""
        return xr.DataArray(
            self.masks,
            dims=("entity", "y", "x"),
            coords={"entity": list(self.entities), "floored": ("entity", list(self.floored))},
            name="regions",
        )

    def iou(self, other: Regions | np.ndarray) -> np.ndarray:
        """Agreement with other regions of the same entities, in the same order.

        Parameters
        ----------
        other : Regions or bool array, (entity, y, x)

        Returns
        -------
        float array, (entity,)
            Intersection over union, 0 to 1. Two empty regions agree (1).

        Raises
        ------
        SettingError
            If shapes or entities differ.

        Examples
        --------
        >>> regions = localize([[[3., 1., 0.]], [[0., 2., 5.]]], binarization="mean-std")
        >>> regions.iou([[[1, 1, 0]], [[0, 0, 1]]])
        array([0.5, 1. ])
        """
        if isinstance(other, Regions):
            if other.entities != self.entities:
                raise SettingError(
                    f"these are regions of {self.entities}, the others of {other.entities};"
                    " compare regions of the same entities"
                )
            masks = other.masks
        else:
            masks = np.asarray(other).astype(bool)
        if masks.shape != self.masks.shape:
            raise SettingError(f"cannot compare masks of shape {masks.shape} with {self.masks.shape}; resize one first")
        common = (self.masks & masks).sum(axis=(1, 2))
        either = (self.masks | masks).sum(axis=(1, 2))
        return np.where(either == 0, 1.0, common / np.maximum(either, 1))

    def __repr__(self) -> str:
        height, width = self.masks.shape[1:]
        parts = [
            f"{name} {mask.sum()} cells{' (floor)' if floored else ''}"
            for name, mask, floored in zip(self.entities, self.masks, self.floored, strict=True)
        ]
        return f"Regions({height}x{width}: {', '.join(parts)}, background {self.background.sum()})"


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
        Raw cross-attention probabilities, one map an entity; finite and not negative. Tensors may be on any
        device, of any precision, with gradient (which is not followed).
    sot : array, tensor or DataArray, (y, x), optional
        Raw probabilities of the start-of-text token. It holds what no word claims, so it stands for the
        background. Needed by ``binarization="background"``, unused by the others.
    differentiation : {"argmax", "subtract-max", "subtract-mean", "none"}
        How an entity's map is set against the others', giving its scores: the map where it is the largest,
        else 0; the map minus the largest of the others; minus the mean of the others (both cut at 0); or the
        map itself. With one entity all four are the map itself.
    binarization : {"background", "otsu", "mean-std", "quantile"}
        Which cells are kept: score > `threshold` x start-of-text; score > Otsu's threshold of the scores;
        score > mean + standard deviation of the scores; score > the `quantile` of the scores. A cell that
        passes for two entities goes to the one with the larger map, to the first of them on a tie. So with
        "background", "argmax" and "none" are the same rule.
    threshold : float
        Share of the start-of-text map an entity must exceed ("background" only), at least 0.
    quantile : float
        0 to 1 ("quantile" only).
    normalize : bool
        Scale every map, start-of-text included, to 0..1 (min-max) first: entities then compete by shape, not
        by strength.
    subtract_pedestal : bool
        Subtract each entity's smallest value from its map first: attention that a word gets everywhere says
        nothing of its place. The figure's maps are displayed so, hence the threshold was fitted to maps
        without a pedestal; on recorded maps `elakit.ELA` and `Run.regions` switch it on.
    min_area : int, optional
        Least area of a region. By default 2 % of the map, at least one cell (5 cells at 16x16). 0 turns the
        floor off, and an entity may then have an empty region. See Notes.
    smooth : float
        Standard deviation, in cells, of a Gaussian applied to all maps first. 0 is off.
    keep_components : int, optional
        Keep only that many connected components of each region, the largest (8-neighborhood; the earlier in
        reading order on a tie). All are kept by default.
    entities : sequence of str, optional
        Labels. By default those of a DataArray's first dimension, else "entity 0", "entity 1", ...

    Returns
    -------
    Regions

    Raises
    ------
    SettingError
        Unknown option or number out of range; wrong shapes; NaN, infinite or negative values; "background"
        without `sot`; more entities x `min_area` than the map has cells.

    Notes
    -----
    The paper says that differentiation and binarization of cross-attention maps locate entities in areas that
    do not overlap, and its method figure shows the start-of-text map beside the entities'. The exact rule and
    its threshold are not known from the paper: the options and defaults here are ours, chosen by how well
    they reproduce the two regions of that figure. The default gives IoU .80 (cat) and .93 (frog). The
    threshold is fitted on that one figure, and no rule that looks at one cell at a time reproduces it
    exactly. ``python benchmarks/localization.py`` prints the agreement of every rule.

    The figure displays each map scaled to 0..1. Its raw scale is restored by a regression: attention sums to
    1 over the tokens, and the displayed maps indeed satisfy SoT = .995 - .312 cat - 1.022 frog with R^2 =
    .996, so in units of SoT's range the raw maps are .312 x cat and 1.022 x frog. SoT's own lowest value is
    lost and taken as 0.

    *Floor.* A region smaller than `min_area` keeps its cells and is filled up, one cell at a time, with the
    free cell where the entity's score is highest, then where its map is highest, then the first in reading
    order. Where several entities are short, the highest of their candidates is served first. Only when no
    cell is free are cells taken from regions larger than `min_area`. With the default, the floor shrinks on
    maps too small to give every entity that much.

    Maps that are constant, zero or equal are no error: nothing stands out, so regions come from ties and the
    floor.

    References
    ----------
    Zhang et al., "Easing Concept Bleeding in Diffusion via Entity Localization and Anchoring", ICML 2024,
    PMLR 235:58955-58966. Otsu, "A threshold selection method from gray-level histograms", 1979.

    Examples
    --------
    A cat on the left, a frog on the right, and one cell that both want:

    >>> cat  = [[.30, .20, .01, .01]]
    >>> frog = [[.01, .25, .60, .02]]
    >>> sot  = [[.60, .50, .30, .95]]
    >>> regions = localize([cat, frog], sot, entities=["cat", "frog"])
    >>> regions
    Regions(1x4: cat 1 cells, frog 2 cells, background 1)
    >>> regions.masks.astype(int).tolist()
    [[[1, 0, 0, 0]], [[0, 1, 1, 0]]]

    An entity that is neglected everywhere still gets a region:

    >>> localize([cat, frog, [[.0, .0, .0, .005]]], sot).floored
    (False, False, True)
    """
    _check_options(differentiation, binarization, threshold, quantile, min_area, smooth, keep_components)
    values = as_array(maps, "maps")
    if values.ndim != 3 or 0 in values.shape:
        raise SettingError(f"maps have shape {values.shape}; localize wants (entity, y, x), at least one of each")
    names = _names(maps, entities, len(values))
    if len(names) != len(values):
        raise SettingError(f"{len(names)} entity labels for {len(values)} maps; give one label a map")
    if binarization == "background" and sot is None:
        raise SettingError(
            'binarization "background" compares with the start-of-text map: pass sot=..., or choose binarization="otsu"'
        )
    cells = values[0].size
    least = _least_cells(min_area, len(values), cells)

    background = None
    if sot is not None:
        background = as_array(sot, "sot")
        if background.shape != values.shape[1:]:
            raise SettingError(
                f"sot has shape {background.shape}, each entity's map {values.shape[1:]}; they must be equal"
            )
    values, background = _prepare(values, background, smooth, normalize, subtract_pedestal)

    winner = values.argmax(axis=0) == np.arange(len(values))[:, None, None]  # first of equals
    scores = _differentiate(values, winner, differentiation)
    # Every differentiation keeps the order of the entities within a cell, so the largest map settles
    # all conflicts.
    masks = (scores > _thresholds(scores, background, binarization, threshold, quantile)) & winner
    if keep_components is not None:
        masks = np.stack([_largest_components(mask, keep_components) for mask in masks])
    masks, floored = _fill_to_floor(masks, scores, values, least)
    return Regions(masks, scores, floored, names)


def divide(maps: np.ndarray | torch.Tensor, free: np.ndarray | None = None) -> np.ndarray:
    """Divide an image between its entities: strips of equal width, in the order in which attention has the entities.

    Early in a run a map says little of where its entity's edges will be, but already which entity is to be left of
    which. Strips run across the longer side, so that square images are divided from left to right.

    Parameters
    ----------
    maps : array or tensor, (entity, y, x)
        Raw probabilities; the lowest of each map is subtracted first.
    free : bool array, (y, x), optional
        Cells that are there to be divided; by default all.

    Returns
    -------
    bool array, (entity, y, x)
        Every free cell is in one mask. With fewer free columns (or rows) than entities some are empty.

    Raises
    ------
    SettingError
        Maps are not finite, negative or of another shape.

    Examples
    --------
    The lion is a little more to the left, so it gets the left half:

    >>> cat, lion = [[.2, .2, .3, .3]], [[.1, .4, .1, .1]]
    >>> divide(np.array([cat, lion])).astype(int).tolist()
    [[[0, 0, 1, 1]], [[1, 1, 0, 0]]]
    """
    values = as_array(maps, "maps")
    if values.ndim != 3 or 0 in values.shape:
        raise SettingError(f"maps have shape {values.shape}; divide wants (entity, y, x), at least one of each")
    wide = values.shape[2] >= values.shape[1]
    cells = np.ones(values.shape[1:], bool) if free is None else np.asarray(free, bool)
    if not wide:
        values, cells = values.swapaxes(1, 2), cells.T
    along = (values - values.min((1, 2), keepdims=True)).sum(1)  # (entity, x)
    mass = along.sum(1)
    places = np.arange(values.shape[2]) + 0.5
    # an entity without a place of its own belongs in the middle
    centers = np.where(mass > 0, along @ places / np.where(mass > 0, mass, 1), places.mean())
    order = np.argsort(centers, kind="stable")
    widths = cells.sum(0)
    middle = (widths.cumsum() - widths / 2) / max(1, widths.sum())  # of each column, in shares of the free cells
    strip = np.minimum((middle * len(values)).astype(int), len(values) - 1)
    masks = np.zeros(values.shape, bool)
    for nth, entity in enumerate(order):
        masks[entity] = cells & (strip == nth)
    return masks if wide else masks.swapaxes(1, 2)


def localize_steps(maps: xr.DataArray, sot: xr.DataArray | None = None, **options: Any) -> xr.DataArray:
    """Find the regions of every step, each step by itself.

    Parameters
    ----------
    maps : DataArray, (step, token, y, x)
        Raw probabilities, one map an entity and step, as ``recording.maps("entities")`` gives. The token
        dimension may also be called entity.
    sot : DataArray, (step, y, x), optional
        Start-of-text probabilities of the same steps; a token dimension of length one is dropped.
    **options
        As for :func:`localize`.

    Returns
    -------
    DataArray, bool (step, entity, y, x)
        Coordinates along step are kept; coordinate `floored` (step, entity) says which regions came from the
        floor.

    Raises
    ------
    SettingError
        As :func:`localize`, and if dimensions or steps do not belong together.

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
            raise SettingError(f"sot is a {type(sot).__name__}; localize_steps wants a DataArray (step, y, x)")
        if sot.sizes.get("token") == 1:
            sot = sot.isel(token=0)
        if set(sot.dims) != {"step", "y", "x"}:
            raise SettingError(f"sot has dimensions {sot.dims}; localize_steps wants (step, y, x)")
        if not np.array_equal(step_labels(sot), step_labels(maps)):
            raise SettingError(
                f"sot has steps {step_labels(sot)}, maps {step_labels(maps)}; give the same steps of both"
            )
    found = [
        localize(maps.isel(step=i), None if sot is None else sot.isel(step=i), **options)
        for i in range(maps.sizes["step"])
    ]
    if not found:
        raise SettingError("maps have no step; record at least one full step")
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


# --- shared with elakit.bleeding ----------------------------------------------------------------------------


def steps_first(maps: xr.DataArray, what: str) -> xr.DataArray:
    """Maps as (step, entity, y, x), whether their second dimension is called token or entity."""
    if not isinstance(maps, xr.DataArray):
        raise SettingError(
            f"{what} are a {type(maps).__name__}; a DataArray with dimensions (step, token, y, x) is needed"
        )
    if "token" in maps.dims and "entity" not in maps.dims:
        # Coordinates along token other than its labels (token_index) say nothing of entities.
        extra = [n for n, c in maps.coords.items() if n == "entity" or ("token" in c.dims and n != "token")]
        maps = maps.drop_vars(extra).rename(token="entity")
    if set(maps.dims) != {"step", "entity", "y", "x"}:
        raise SettingError(f"{what} have dimensions {maps.dims}; (step, token, y, x) are needed")
    return maps.transpose("step", "entity", "y", "x")


def step_labels(array: xr.DataArray) -> np.ndarray:
    """Step coordinate of an array; 0, 1, 2, ... if it has none."""
    return np.asarray(array["step"].values)


# --- stages -------------------------------------------------------------------------------------------------


def _prepare(
    values: np.ndarray, background: np.ndarray | None, smooth: float, normalize: bool, subtract_pedestal: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    stack = values if background is None else np.concatenate([values, background[None]])
    if smooth:
        stack = gaussian_filter(stack, sigma=(0, smooth, smooth), mode="reflect")
    if normalize:
        low = stack.min(axis=(1, 2), keepdims=True)
        span = stack.max(axis=(1, 2), keepdims=True) - low
        stack = (stack - low) / np.where(span > 0, span, 1.0)  # a constant map becomes 0
    entities, rest = stack[: len(values)], None if background is None else stack[-1]
    if subtract_pedestal:
        entities = entities - entities.min(axis=(1, 2), keepdims=True)
    return entities, rest


def _differentiate(values: np.ndarray, winner: np.ndarray, how: str) -> np.ndarray:
    """Scores (entity, y, x), never negative."""
    count = len(values)
    if how == "none" or count == 1:
        return values
    if how == "argmax":
        return np.where(winner, values, 0.0)
    if how == "subtract-max":
        first, second = np.sort(values, axis=0)[[-1, -2]]
        rivals = np.where(winner, second, first)
    else:
        rivals = (values.sum(axis=0) - values) / (count - 1)
    return np.maximum(values - rivals, 0.0)


def _thresholds(
    scores: np.ndarray, background: np.ndarray | None, how: str, threshold: float, quantile: float
) -> np.ndarray:
    """What a score must exceed, broadcastable to (entity, y, x)."""
    if how == "background":
        assert background is not None  # localize has refused it
        return threshold * background[None]
    if how == "otsu":
        return otsu_thresholds(scores)
    if how == "mean-std":
        tops = scores.mean(axis=(1, 2), keepdims=True) + scores.std(axis=(1, 2), keepdims=True)
        return np.where(is_constant(scores), scores.max(axis=(1, 2), keepdims=True), tops)
    return np.quantile(scores, quantile, axis=(1, 2), keepdims=True)


def _largest_components(mask: np.ndarray, keep: int) -> np.ndarray:
    parts, count = label(mask, connectivity=2, return_num=True)
    if count <= keep:
        return mask
    sizes = np.bincount(parts.ravel())[1:]
    kept = 1 + np.argsort(-sizes, kind="stable")[:keep]
    return np.isin(parts, kept)


def _fill_to_floor(
    masks: np.ndarray, scores: np.ndarray, values: np.ndarray, least: int
) -> tuple[np.ndarray, tuple[bool, ...]]:
    """Give every entity at least `least` cells, keeping regions apart; localize's notes give the rule."""
    count = len(masks)
    held = masks.reshape(count, -1).copy()
    missing = np.maximum(least - held.sum(axis=1), 0)
    floored = tuple(bool(m) for m in missing)
    flat_scores, flat_values = scores.reshape(count, -1), values.reshape(count, -1)
    # lexsort is stable: equal cells stay in reading order.
    order = {e: np.lexsort((-flat_values[e], -flat_scores[e])) for e in range(count) if missing[e]}
    while missing.any():
        available = np.asarray(~held.any(axis=0))
        if not available.any():
            available = held[held.sum(axis=1) > least].any(axis=0)
        offers = []
        for e in (int(i) for i in np.flatnonzero(missing)):
            cell = order[e][available[order[e]].argmax()]
            offers.append((flat_scores[e, cell], flat_values[e, cell], -e, int(cell)))
        _, _, minus, cell = max(offers)
        held[:, cell] = False
        held[-minus, cell] = True
        missing[-minus] -= 1
    return held.reshape(masks.shape), floored


# --- arguments ----------------------------------------------------------------------------------------------


def _names(maps: Any, entities: Sequence[str] | None, count: int) -> tuple[str, ...]:
    if entities is not None:
        if isinstance(entities, str):
            raise SettingError(f"entities is the text {entities!r}; give a list of labels, such as [{entities!r}]")
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
            f"entity labels {repeated} occur twice; every entity needs its own, such as 'car#1' and 'car#2'"
        )
    return names


def _least_cells(min_area: int | None, count: int, cells: int) -> int:
    if min_area is None:
        if count > cells:
            raise SettingError(f"{count} entities cannot have apart regions on a map of {cells} cells; use larger maps")
        return min(max(1, round(FLOOR * cells)), cells // count)
    if min_area * count > cells:
        raise SettingError(
            f"min_area={min_area} for {count} entities needs {min_area * count} cells of {cells};"
            f" at most {cells // count} are possible"
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
    for name, value, allowed in (
        ("differentiation", differentiation, DIFFERENTIATIONS),
        ("binarization", binarization, BINARIZATIONS),
    ):
        if value not in allowed:
            raise SettingError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, allowed))}")
    if not _is_number(threshold) or threshold < 0:
        raise SettingError(f"threshold={threshold!r}; it is a share of the start-of-text map, a number of at least 0")
    if not _is_number(quantile) or not 0 <= quantile <= 1:
        raise SettingError(f"quantile={quantile!r}; choose a number from 0 to 1")
    if not _is_number(smooth) or smooth < 0:
        raise SettingError(f"smooth={smooth!r}; it is a standard deviation in cells, a number of at least 0 (0 is off)")
    if min_area is not None and (not _is_whole(min_area) or min_area < 0):
        raise SettingError(f"min_area={min_area!r}; choose a whole number of at least 0, or None for 2 % of the map")
    if keep_components is not None and (not _is_whole(keep_components) or keep_components < 1):
        raise SettingError(f"keep_components={keep_components!r}; choose a whole number of at least 1, or None for all")


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float | np.integer | np.floating)
        and not isinstance(value, bool)
        and bool(np.isfinite(value))
    )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
