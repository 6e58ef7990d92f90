"""Statistics of the attention maps of an image, such as the maxima, margins and spread of the entities' maps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.ndimage import label

# Statistics of each entity; "others" is the maximum of the other entities' maps at each location, "rest" the attention
# to start-of-text, end-of-text and padding. An entity wins a location if its map is above the others there.
_OF_ENTITY = (
    "peak",
    "mean",
    "log_peak",
    "won",  # share of the map (after its minimum is subtracted) in the locations that the entity wins
    "won_scaled",  # the same with each map scaled to a maximum of 1
    "locations_won",
    "lead",  # mean margin over the others in the sixteenth of the locations where it is largest
    "lead_over_rest",
    "peak_won",  # maximum among the locations that the entity wins, and among those that it loses
    "peak_lost",
    "spread",
    "entropy",
    "top_tenth",  # share of the map in its strongest tenth of the locations
    "above_rest",
    "components",  # connected components above two fifths of the range
)
# Statistics of the image: of the two entities that are closest, of the rest, of the sum of all entities' maps, and of
# the attribute that is bound worst.
_OF_IMAGE = ("correlation", "common", "distance", "rest_mean", "rest_min", "joint_components", "bound", "misbound")
MAP_STATISTICS = (*(f"{name}_{which}" for which in ("min", "max", "first", "last") for name in _OF_ENTITY), *_OF_IMAGE)
_TINY = 1e-9


def map_statistics(entities: np.ndarray, rest: np.ndarray, attributes: np.ndarray, owners: Sequence[int]) -> np.ndarray:
    """Statistics of the attention maps of one step, such as maxima, margins and spread, as features of a predictor.

    Parameters
    ----------
    entities : ndarray, float, (entity, y, x)
        Raw attention to the entities.
    rest : ndarray, float, (y, x)
        Sum of the raw attention to start-of-text, end-of-text and padding.
    attributes : ndarray, float, (attribute, y, x)
        Raw attention to the attributes; may be empty, of shape (0, y, x).
    owners : sequence of int
        Index of the entity to which each attribute belongs.

    Returns
    -------
    ndarray, float, (len(MAP_STATISTICS),)
        Values in the order of `MAP_STATISTICS`. A statistic of each entity gives four values: the minimum and the
        maximum over the entities ("_min", "_max"), and the values for the first and the last entity of the prompt
        ("_first", "_last"). A causal text encoder treats the first and the last entity differently.

    Notes
    -----
    An entity wins a location if its map is above the maps of all other entities there. If there is only one entity, it
    wins every location. The distribution of a map is computed by subtracting the map's minimum and scaling the
    result to a sum of 1. The center of a map is the mean location, weighted by the distribution. The overlap of two
    maps is computed from their distributions: the smaller of the two values is taken at each location, and summed over
    the locations. A distance of 1 is the whole height or width of the image.

    Statistics of each entity:

    * "peak", "mean", "log_peak": maximum of the map, mean of the map, and logarithm of the maximum;
    * "won": sum of the map's distribution over the locations that the entity wins;
    * "won_scaled": like "won", but each map is scaled to 0..1 before the winner of a location is determined;
    * "locations_won": share of the locations that the entity wins;
    * "lead": margin of the map over the largest of the other maps. The margin is averaged over the sixteenth of the
      locations with the largest margins, but at least over four locations. If there is only one entity, "lead" is the
      maximum of the map;
    * "lead_over_rest": "lead" divided by the mean of `rest`;
    * "peak_won", "peak_lost": maximum of the map in the locations that the entity wins, and in all other locations;
    * "spread": root mean square distance of the locations from the center, weighted by the distribution;
    * "entropy": entropy of the distribution, in nats;
    * "top_tenth": sum of the distribution over the tenth of the locations where it is largest;
    * "above_rest": share of the locations where the map is above `rest`;
    * "components": number of connected components of the locations where the map, scaled to 0..1, is above 0.4.

    Statistics of the image:

    * "correlation": largest correlation between the maps of two entities; -1 if there is only one entity;
    * "common": largest overlap of the maps of two entities; 0 if there is only one entity;
    * "distance": smallest distance between the centers of two entities' maps; 1 if there is only one entity;
    * "rest_mean", "rest_min": mean and minimum of `rest`;
    * "joint_components": number of connected components of the locations where the sum of all entities' maps is above
      40% of its maximum;
    * "bound": overlap of an attribute's map with its own entity's map, minus the largest overlap with the map of
      another entity. The smallest value over the attributes is used; 1 if there are no attributes;
    * "misbound": largest overlap of an attribute's map with the map of an entity that the attribute does not describe;
      0 if there are no attributes, or only one entity.

    Examples
    --------
    The first entity has attention of 0.5 in the leftmost of four columns, the second entity 0.25 in the rightmost:

    >>> left, right = np.zeros((2, 4, 4))
    >>> left[:, 0], right[:, 3] = 0.5, 0.25
    >>> values = map_statistics(np.stack([left, right]), np.full((4, 4), 0.1), np.zeros((0, 4, 4)), [])
    >>> found = dict(zip(MAP_STATISTICS, values))
    >>> [round(float(found[name]), 2) for name in ("peak_min", "won_min", "common", "distance", "components_max")]
    [0.25, 1.0, 0.0, 0.75, 1.0]
    """
    y, x = np.mgrid[: rest.shape[0], : rest.shape[1]] / np.array(rest.shape)[:, None, None]
    shares = [_share(one) for one in entities]
    centers = [np.array([(p * y).sum(), (p * x).sum()]) for p in shares]
    rows = []
    for i, (one, p, center) in enumerate(zip(entities, shares, centers, strict=True)):
        others = np.delete(entities, i, 0)
        against = others.max(0) if len(others) else np.full_like(one, -1.0)
        scaled = np.max([_scaled(other) for other in others], 0) if len(others) else against
        won = one > against
        strongest = np.sort((one - against).ravel())[::-1]
        lead = strongest[: max(4, one.size // 16)].mean() if len(others) else one.max()
        rows.append(
            [
                one.max(),
                one.mean(),
                np.log(one.max() + 1e-6),
                p[won].sum(),
                p[_scaled(one) > scaled].sum(),
                won.mean(),
                lead,
                lead / (rest.mean() + 1e-6),
                one.max(where=won, initial=0.0),
                one.max(where=~won, initial=0.0),
                np.sqrt((p * ((y - center[0]) ** 2 + (x - center[1]) ** 2)).sum()),
                -(p * np.log(p + 1e-12)).sum(),
                np.sort(p.ravel())[::-1][: one.size // 10].sum(),
                (one > rest).mean(),
                label(_scaled(one) > 0.4)[1],
            ]
        )
    each = np.array(rows)
    pairs = [(i, j) for i in range(len(entities)) for j in range(i)]
    closest = [
        max((_correlation(entities[i], entities[j]) for i, j in pairs), default=-1.0),
        max((np.minimum(shares[i], shares[j]).sum() for i, j in pairs), default=0.0),
        min((np.hypot(*(centers[i] - centers[j])) for i, j in pairs), default=1.0),
        rest.mean(),
        rest.min(),
        label(entities.sum(0) > 0.4 * entities.sum(0).max())[1],
    ]
    bound, misbound = [1.0], [0.0]
    for attribute, owner in zip(attributes, owners, strict=True):
        common = [np.minimum(_share(attribute), p).sum() for p in shares]
        wrong = max((value for i, value in enumerate(common) if i != owner), default=0.0)
        bound.append(common[owner] - wrong)
        misbound.append(wrong)
    return np.array([*each.min(0), *each.max(0), *each[0], *each[-1], *closest, min(bound), max(misbound)])


def _share(values: np.ndarray) -> np.ndarray:
    """Distribution of a map over its locations: subtract the map's minimum, then scale the values to a sum of 1."""
    above = values - values.min()
    return above / (above.sum() + _TINY)


def _scaled(values: np.ndarray) -> np.ndarray:
    above = values - values.min()
    return above / (above.max() + _TINY)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (np.sqrt((a**2).sum() * (b**2).sum()) + _TINY))
