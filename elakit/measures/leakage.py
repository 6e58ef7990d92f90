"""Leakage: the share of each map's attention in each region.

The *leakage matrix* K has one row per map and one column per region. K[e, f] is the share of the attention of entity e
that lies in the region of entity f. The last column of K is the background, everything outside the regions.

- *bleed* of entity e is 1 - K[e, e], the share outside its own region.
- *intrusion* of entity e is the sum of K[e, f] over all other entities f, the share in the other regions.
- *spill* of entity e is K[e, background], the share in the background.

Bleed is the sum of intrusion and spill.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from elakit.errors import SettingError
from elakit.measures.arrays import area_mean, as_array, as_masks, distribution, same_size
from elakit.measures.masks import check_disjoint
from elakit.measures.overlap import ruzicka
from elakit.numbering import an_index, number_of

__all__ = ["Binding", "attribute_overlap", "binding", "bleed", "intrusion", "leakage", "spill", "truth_leakage"]


class Binding(NamedTuple):
    """Overlap of attributes with entities, as returned by :func:`binding`.

    The overlap of an attribute with an entity is the similarity of their attention maps.

    Attributes
    ----------
    own : ndarray, (..., attribute)
        Overlap of each attribute with its own entity, 0 to 1.
    other : ndarray, (..., attribute)
        Largest overlap of each attribute with another entity, 0 to 1; 0 if there is no other entity.
    margin : ndarray, (..., attribute)
        Difference own - other, -1 to 1.
    """

    own: np.ndarray
    other: np.ndarray
    margin: np.ndarray


def leakage(maps: Any, masks: Any) -> np.ndarray:
    """Leakage matrix: share of each map's attention in each region and in the background.

    Parameters
    ----------
    maps : array, tensor or DataArray, (..., entity, y, x)
        Attention maps, on any scale; finite and not negative. The dimensions of a DataArray may be in any order.
    masks : bool array or DataArray, (..., region, y, x)
        Masks of the regions. The regions must be disjoint.

    Returns
    -------
    float array, (..., entity, region + 1)
        Shares, one row per map. The last column is the background (outside every region). Rows sum to 1.

    Raises
    ------
    SettingError
        Masks overlap or have values other than 0 and 1, shapes do not match, or values are NaN, infinite or negative.

    Examples
    --------
    The region of the cat is the first two locations, and the region of the frog is the third location. The cat's map
    sums to 10, and the frog's map to 5:

    >>> cat, frog = [[6., 2., 1., 1.]], [[0., 0., 4., 1.]]
    >>> leakage([cat, frog], [[[1, 1, 0, 0]], [[0, 0, 1, 0]]])
    array([[0.8, 0.1, 0.1],
           [0. , 0.8, 0.2]])
    """
    p = distribution(maps)
    regions = as_masks(masks, "masks")
    if p.ndim < 3 or regions.ndim < 3:
        raise SettingError(
            f"maps have shape {p.shape} and masks {regions.shape}; maps must be (..., entity, y, x), and masks "
            "(..., region, y, x). Give a single map or mask as a list of one."
        )
    same_size(p, regions)
    check_disjoint(regions)
    regions = np.concatenate([regions, ~regions.any(axis=-3, keepdims=True)], axis=-3)
    return _shares(p, regions)


def truth_leakage(maps: Any, masks: Any) -> np.ndarray:
    """Share of each map's attention on each thing in the finished image, and on the rest of the image.

    Parameters
    ----------
    maps : array, tensor or DataArray, (..., entity, y, x)
        Attention maps, on any scale; finite and not negative.
    masks : bool array or DataArray, (..., thing, y, x)
        Mask of each thing in the image, at any resolution. Masks may overlap, as the masks of a hybrid do.

    Returns
    -------
    float array, (..., entity, thing + 1)
        Shares, one row per map. The last column is the rest of the image. Rows sum to 1. The column of an absent thing,
        whose mask is empty, is zero.

    Raises
    ------
    SettingError
        A mask has values other than 0 and 1, shapes do not match, or values are NaN, infinite or negative.

    Notes
    -----
    The attention of a location is spread evenly over the pixels that it covers, so a location half filled by a thing
    counts by half. The attention of a pixel that several things share is divided equally among them.

    Examples
    --------
    Four locations cover an image of eight pixels, two pixels per location. The cat fills three pixels, which are one
    and a half locations, and the frog fills the last location:

    >>> cat, frog = [[6., 2., 1., 1.]], [[0., 0., 4., 1.]]
    >>> truth_leakage([cat, frog], [[[1, 1, 1, 0, 0, 0, 0, 0]], [[0, 0, 0, 0, 0, 0, 1, 1]]])
    array([[0.7, 0.1, 0.2],
           [0. , 0.2, 0.8]])
    """
    p = distribution(maps)
    things = as_masks(masks, "masks")
    if p.ndim < 3 or things.ndim < 3:
        raise SettingError(
            f"maps have shape {p.shape} and masks {things.shape}; maps must be (..., entity, y, x), and masks "
            "(..., thing, y, x). Give a single map as [map], and a single mask as [mask]."
        )
    claims = things.sum(axis=-3, keepdims=True)
    parts = np.concatenate([things / np.maximum(claims, 1), claims == 0], axis=-3)
    return _shares(p, area_mean(parts, p.shape[-2:]))


def bleed(matrix: Any, own: Sequence[int] | None = None) -> np.ndarray:
    """Share of each map's attention outside its own region.

    For entity e, the share is 1 - K[e, e], where K is the leakage matrix. K[e, e] is the share inside the own region.

    Parameters
    ----------
    matrix : array, (..., entity, region + 1)
        Leakage matrix, the result of :func:`leakage`: one row per map, and the background as the last column.
    own : sequence of int, optional
        Index of each row's own region. By default, row e has the region e. If the rows are attributes, give the index
        of the entity that each attribute belongs to.

    Returns
    -------
    float array, (..., entity)

    Raises
    ------
    SettingError
        `own` does not match the matrix, or the matrix has the wrong shape or values that are NaN, infinite or negative.

    Examples
    --------
    The shares inside the own regions are 0.7 and 0.8:

    >>> bleed([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]]).round(6)
    array([0.3, 0.2])
    """
    values, index = _own(matrix, own)
    return 1.0 - values[..., np.arange(len(index)), index]


def intrusion(matrix: Any, own: Sequence[int] | None = None) -> np.ndarray:
    """Share of each map's attention in the regions of other entities; the background does not count.

    For entity e, the share is the sum of K[e, f] over all other entities f, where K is the leakage matrix.

    Parameters
    ----------
    matrix : array, (..., entity, region + 1)
        Leakage matrix, the result of :func:`leakage`: one row per map, and the background as the last column.
    own : sequence of int, optional
        Index of each row's own region. By default, row e has the region e. If the rows are attributes, give the index
        of the entity that each attribute belongs to.

    Returns
    -------
    float array, (..., entity)

    Raises
    ------
    SettingError
        `own` does not match the matrix, or the matrix has the wrong shape or values that are NaN, infinite or negative.

    Examples
    --------
    The first entity has the share 0.2 in the region of the second entity:

    >>> intrusion([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]])
    array([0.2, 0. ])

    An attribute that belongs to the second entity has the share 0.7 in the region of the first entity:

    >>> intrusion([[0.7, 0.2, 0.1]], own=[1])
    array([0.7])
    """
    values, index = _own(matrix, own)
    others = np.arange(values.shape[-1] - 1) != index[:, None]
    return (values[..., :-1] * others).sum(axis=-1)


def spill(matrix: Any) -> np.ndarray:
    """Share of each map's attention in the background, the last column of the leakage matrix.

    Parameters
    ----------
    matrix : array, (..., entity, region + 1)
        Leakage matrix, the result of :func:`leakage`: one row per map, and the background as the last column.

    Returns
    -------
    float array, (..., entity)

    Raises
    ------
    SettingError
        The matrix has the wrong shape, or values that are NaN, infinite or negative.

    Examples
    --------
    >>> spill([[0.7, 0.2, 0.1], [0.0, 0.8, 0.2]])
    array([0.1, 0.2])
    """
    return _matrix(matrix)[..., -1]


def binding(attributes: Any, entities: Any, owners: Sequence[int]) -> Binding:
    """Attribute binding: how much more an attribute overlaps with its own entity than with any other entity.

    The overlap is the Ruzicka similarity of two maps, sum min(a, b) / sum max(a, b). Before the comparison, each map is
    scaled to sum to 1.

    Parameters
    ----------
    attributes : array, tensor or DataArray, (..., attribute, y, x)
        Attention maps of the attributes, on any scale.
    entities : array, tensor or DataArray, (..., entity, y, x)
        Attention maps of the entities' nouns, on any scale.
    owners : sequence of int
        Index of the entity that each attribute belongs to.

    Returns
    -------
    Binding
        Overlap of each attribute with its own entity (`own`), its largest overlap with another entity (`other`), and
        the difference own - other (`margin`). A negative `margin` means that another entity overlaps more.

    Raises
    ------
    SettingError
        `owners` do not match the maps, sizes differ, or values are NaN, infinite or negative.

    Examples
    --------
    In "a red car and a blue bird", "red" belongs to the car. The map of "red" has the overlap 0 with the car's map and
    1 with the bird's map:

    >>> car, bird = [[4., 0., 0.]], [[0., 2., 2.]]
    >>> float(binding([[[0., 1., 1.]]], [car, bird], owners=[0]).margin[0])
    -1.0
    """
    overlap = attribute_overlap(attributes, entities)
    index = _owners(("owners", "attribute", "entity"), owners, *overlap.shape[-2:])
    own = overlap[..., np.arange(len(index)), index]
    others = np.where(np.arange(overlap.shape[-1]) == index[:, None], 0.0, overlap)
    other = others.max(axis=-1)
    return Binding(own, other, own - other)


def attribute_overlap(attributes: Any, entities: Any) -> np.ndarray:
    """Overlap of every attribute with every entity: the similarity of their attention maps.

    The overlap is the Ruzicka similarity of two maps, sum min(a, b) / sum max(a, b). Before the comparison, each map is
    scaled to sum to 1.

    Parameters
    ----------
    attributes : array, tensor or DataArray, (..., attribute, y, x)
        Attention maps of the attributes, on any scale.
    entities : array, tensor or DataArray, (..., entity, y, x)
        Attention maps of the entities' nouns, on any scale.

    Returns
    -------
    float array, (..., attribute, entity)
        Overlap, from 0 (no common location) to 1 (equal maps after scaling).

    Raises
    ------
    SettingError
        Sizes differ, or values are NaN, infinite or negative.

    Examples
    --------
    The map of the attribute has no location in common with the first entity, and is half the map of the second entity:

    >>> attribute_overlap([[[0., 1., 1.]]], [[[4., 0., 0.]], [[0., 2., 2.]]]).tolist()
    [[0.0, 1.0]]
    """
    of_attributes, of_entities = distribution(attributes), distribution(entities)
    if of_attributes.ndim < 3 or of_entities.ndim < 3:
        raise SettingError(
            f"attributes have shape {of_attributes.shape} and entities {of_entities.shape}; attributes must be "
            "(..., attribute, y, x), and entities (..., entity, y, x). Give a single map as [map]."
        )
    return np.asarray(ruzicka(of_attributes[..., :, None, :, :], of_entities[..., None, :, :, :]))


def _shares(p: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """Mass of each distribution in each part of the image: an array (..., entity, part).

    ``p`` has the distributions, (..., entity, y, x). ``parts``, (..., part, y, x), has the share of each location that
    belongs to each part; for masks, the shares are 0 and 1.
    """
    try:
        return np.einsum("...eyx,...ryx->...er", p, parts.astype(np.float64))
    except ValueError:
        raise SettingError(
            f"The leading dimensions, all but the last three, are {p.shape[:-3]} in maps and {parts.shape[:-3]} in "
            "masks; they must match. Give masks with three dimensions, or with the leading dimensions of maps."
        ) from None


def _matrix(matrix: Any) -> np.ndarray:
    values = as_array(matrix, "leakage matrix")
    if values.ndim < 2 or values.shape[-1] < 2:
        raise SettingError(
            f"The leakage matrix has shape {values.shape}; it needs one row per entity, one column per region, and a "
            "last column for the background. Pass the result of elakit.measures.leakage.leakage."
        )
    return values


def _own(matrix: Any, own: Sequence[int] | None) -> tuple[np.ndarray, np.ndarray]:
    values = _matrix(matrix)
    rows, columns = values.shape[-2:]
    if own is None:
        if rows != columns - 1:
            raise SettingError(
                f"The leakage matrix has {number_of(rows, 'row')}, but {number_of(columns - 1, 'region')}, so the "
                "region of each row is unknown. Pass own=[...], a list with the index of each row's region."
            )
        return values, np.arange(rows)
    return values, _owners(("own", "row", "region"), own, rows, columns - 1)


def _owners(names: tuple[str, str, str], owners: Sequence[int], rows: int, count: int) -> np.ndarray:
    index = np.asarray(owners)
    if index.shape != (rows,) or index.dtype.kind not in "iu" or ((index < 0) | (index >= count)).any():
        name, row, owner = names
        raise SettingError(
            f"{name}={index.tolist()}: give the index of each {row}'s {owner}, as a list of length {rows}. For each "
            f"{row}, give {an_index(count)}."
        )
    return index
