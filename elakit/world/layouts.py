"""Layouts of scenes: the places of one to four things, and the relations between two things."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from elakit.world.vocabulary import ANIMALS

# Layouts of two things. "free": apart, anywhere. "occluded": one partly behind the other. "worn": a crown or a bow on
# the head, glasses on the face. "on": on a bench, a chair, a suitcase or a car.
PAIR_LAYOUTS = ("row", "column", "diagonal", "free", "occluded", "large and small", "worn", "on")
THREE_LAYOUTS = {"row": 0.3, "column": 0.15, "triangle": 0.35, "free": 0.2}
FOUR_LAYOUTS = {"grid": 0.6, "free": 0.4}
RELATIONS = ("left of", "right of", "above", "below", "in front of", "behind", "on", "under", "wearing", "worn by")

WORN = ("crown", "glasses", "bow")
SUPPORTS = ("bench", "chair", "suitcase", "car")
SUPPORTED = (*ANIMALS, "apple", "backpack", "balloon", "bow", "bowl", "clock", "crown", "glasses")
LEAST_SEEN = {"worn": 0.4, "on": 0.4, "occluded": 0.45}  # share of a thing that must remain visible; .7 elsewhere
LEAST_WORN = 0.2  # side of a worn thing's square: smaller ones cannot be made out
MOST_SEEN_BEHIND = 0.88  # if a larger share of the thing behind is visible, it is not noticeably occluded


@dataclass(frozen=True)
class Place:
    """Position, size and pose of a sprite (a square image of one drawing) in a scene.

    Attributes
    ----------
    x, y : float
        Center of the sprite, as shares of the scene's side.
    scale : float
        Side of the sprite, as a share of the scene's side.
    flip : bool
        True if the sprite is mirrored from left to right.
    angle : float
        Rotation in degrees, counterclockwise.
    """

    x: float
    y: float
    scale: float
    flip: bool = False
    angle: float = 0.0


@dataclass(frozen=True)
class Shape:
    """Extent of a drawing, and positions of its head and eyes, as shares of the side of its square image.

    Attributes
    ----------
    ink : tuple of float
        (left, top, right, bottom) of the opaque pixels.
    head, eyes : tuple of float or None
        Position and width of the top of the head (`head`) and of the eyes (`eyes`), each as (x, y, width); see
        `elakit.world.art.Drawing`. None if the drawing has no such position.
    """

    ink: tuple[float, float, float, float]
    head: tuple[float, float, float] | None = None
    eyes: tuple[float, float, float] | None = None


def posed(place: Place, rng: np.random.Generator, mirrored: float = 0.5) -> Place:
    """Copy of a place, mirrored with probability `mirrored`, and rotated by up to 8 degrees with probability 0.3."""
    angle = float(rng.uniform(-8, 8)) if rng.random() < 0.3 else 0.0
    return replace(place, flip=bool(rng.random() < mirrored), angle=angle)


def fits(layout: str, first: str, second: str) -> bool:
    """True if two things can be placed in a layout, in this order.

    `layout` is one of `PAIR_LAYOUTS`; `first` and `second` are the nouns of the things. Only two layouts restrict the
    nouns. In the layout "worn", the first thing must be an animal, and the second a crown, glasses or a bow. In the
    layout "on", the first thing must be able to stand on a support, and the second must be a support, such as a bench.

    Examples
    --------
    >>> fits("worn", "bear", "crown"), fits("worn", "crown", "bear"), fits("on", "cat", "bench")
    (True, False, True)
    """
    if layout == "worn":
        return first in ANIMALS and second in WORN
    if layout == "on":
        return first in SUPPORTED and second in SUPPORTS
    return True


def single_place(sizes: tuple[float, float], rng: np.random.Generator) -> Place:
    """Random place inside the scene for a single thing.

    `sizes` are the smallest and the largest size that the thing may have, as shares of the scene's side.
    """
    return _anywhere(float(rng.uniform(*sizes)), rng)


def pair_places(
    layout: str, shapes: tuple[Shape, Shape], rng: np.random.Generator, mirrored: float = 0.5
) -> tuple[Place, Place] | None:
    """Random places for two things in a layout.

    Parameters
    ----------
    layout : str
        One of `PAIR_LAYOUTS`. In the layout "on", the first thing stands on the second.
    shapes : tuple of Shape
        Extents of the two drawings. Only the layout "on" depends on them.
    rng : numpy.random.Generator
    mirrored : float
        Probability that a thing is mirrored.

    Returns
    -------
    tuple of Place, or None
        Place of the first thing and place of the second thing. None for the layout "worn": use `worn_places` instead.
    """
    if layout == "worn":
        return None  # placed by `worn_places`, which needs to know what is worn
    if layout == "on":
        return _on(shapes, rng, mirrored)
    if layout == "large and small":
        return _large_and_small(rng, mirrored)
    if layout == "free":
        return _apart((rng.uniform(0.3, 0.5), rng.uniform(0.3, 0.5)), rng, mirrored)
    a, b = rng.uniform(0.34, 0.5, 2)
    if layout == "row":
        y, near = 0.5 + rng.uniform(-0.14, 0.14), rng.uniform(-0.02, 0.03)
        centers = [(x + rng.uniform(-0.02, 0.02), y + rng.uniform(-0.06, 0.06)) for x in (0.25 - near, 0.75 + near)]
    elif layout == "column":
        x, near = 0.5 + rng.uniform(-0.2, 0.2), rng.uniform(-0.02, 0.02)
        centers = [(x + rng.uniform(-0.06, 0.06), y + rng.uniform(-0.02, 0.02)) for y in (0.26 - near, 0.74 + near)]
    elif layout == "diagonal":
        rise = rng.choice([-1, 1]) * rng.uniform(0.19, 0.24)
        centers = [(0.27 + rng.uniform(-0.02, 0.02), 0.5 - rise), (0.73 + rng.uniform(-0.02, 0.02), 0.5 + rise)]
    else:  # occluded
        a, b = rng.uniform(0.42, 0.62, 2)
        angle, apart = rng.uniform(0, 2 * np.pi), rng.uniform(0.42, 0.62) * (a + b) / 2
        x, y = 0.5 + rng.uniform(-0.1, 0.1, 2)
        step = apart / 2 * np.array([np.cos(angle), np.sin(angle)])
        return (
            posed(_inside(x - step[0], y - step[1], a), rng, mirrored),
            posed(_inside(x + step[0], y + step[1], b), rng, mirrored),
        )
    (x, y), (x_other, y_other) = centers if int(rng.integers(2)) == 0 else centers[::-1]
    return (
        posed(Place(x, y, float(a)), rng, mirrored),
        posed(Place(x_other, y_other, float(b)), rng, mirrored),
    )


def worn_places(
    item: str, shapes: tuple[Shape, Shape], rng: np.random.Generator, mirrored: float = 0.5
) -> tuple[Place, Place] | None:
    """Random places for an animal and the thing that it wears: a crown or a bow on the head, glasses over the eyes.

    Parameters
    ----------
    item : str
        Noun of the thing, one of `WORN`.
    shapes : tuple of Shape
        Extents of the drawings of the animal and of the thing.
    rng : numpy.random.Generator
    mirrored : float
        Probability that the animal is mirrored.

    Returns
    -------
    tuple of Place, or None
        Place of the animal and place of the thing. None if the two do not fit into the scene, or if the animal's
        `Shape` has no position for the thing: `eyes` for glasses, `head` for a crown or a bow.
    """
    wearer, worn = shapes
    anchor = wearer.eyes if item == "glasses" else wearer.head
    if anchor is None:
        return None
    left, top, right, bottom = worn.ink
    # the worn thing's width in shares of the wearer's side; a crown's lower edge overlaps the head
    share = {"glasses": 1.0, "crown": 0.9, "bow": 0.7}[item] * anchor[2] / (right - left)
    least, most = max(0.45, LEAST_WORN / share), 0.8 / max(1.0, share)
    if least > most:
        return None
    scale, flip = float(rng.uniform(least, most)), bool(rng.random() < mirrored)
    x, y = anchor[0] - 0.5, anchor[1] - 0.5
    if item == "crown":
        y -= ((bottom - 0.5) - 0.25 * (bottom - top)) * share
    elif item == "glasses":
        y -= ((top + bottom) / 2 - 0.5) * share
    else:
        x += float(rng.choice([-0.3, 0.0, 0.3])) * anchor[2]
        y += 0.05 * anchor[2]
    if flip:
        x = -x
    offset = np.array([x - ((left + right) / 2 - 0.5) * share, y]) * scale
    # the union of both squares stays inside the image
    half = np.array([scale, share * scale]) / 2
    low = np.array([max(half[0], half[1] - offset[0]), max(half[0], half[1] - offset[1])])
    high = np.array([min(1 - half[0], 1 - half[1] - offset[0]), min(1 - half[0], 1 - half[1] - offset[1])])
    if (low > high).any():
        return None
    center = low + (high - low) * rng.random(2)
    return (
        Place(x=float(center[0]), y=float(center[1]), scale=scale, flip=flip),
        Place(float(center[0] + offset[0]), float(center[1] + offset[1]), float(share * scale)),
    )


def group_places(layout: str, count: int, rng: np.random.Generator, mirrored: float = 0.5) -> list[Place] | None:
    """Random places for three or four things in a layout; which thing gets which place is random, too.

    Parameters
    ----------
    layout : str
        A key of `THREE_LAYOUTS` or of `FOUR_LAYOUTS`.
    count : int
        Number of things: 3 or 4.
    rng : numpy.random.Generator
    mirrored : float
        Probability that a thing is mirrored.

    Returns
    -------
    list of Place, or None
        One place per thing. None if the layout is "free" and 200 random trials did not yield enough places that hardly
        overlap.
    """
    if layout == "free":
        places: list[Place] = []
        for _ in range(200):
            place = _anywhere(float(rng.uniform(0.26, 0.38)), rng)
            if all(_clear(place, other) for other in places):
                places.append(place)
            if len(places) == count:
                return [posed(place, rng, mirrored) for place in places]
        return None
    if layout in ("row", "column"):
        along = np.array([0.19, 0.5, 0.81]) + rng.uniform(-0.015, 0.015, 3)
        across = rng.uniform(0.3, 0.7) + rng.uniform(-0.1, 0.1, 3)
        centers = np.stack([along, across] if layout == "row" else [across, along], 1)
        scales = rng.uniform(0.28, 0.34, 3)
    elif layout == "triangle":
        y, way = 0.5 + rng.uniform(-0.02, 0.02), rng.choice([-1, 1])
        centers = np.array(
            [(0.26, y + way * 0.22), (0.74, y + way * 0.22), (0.5 + rng.uniform(-0.15, 0.15), y - way * 0.23)]
        )
        if rng.random() < 0.3:
            centers = centers[:, ::-1]
        scales = rng.uniform(0.34, 0.42, 3)
    else:  # grid
        centers = np.array([(x, y) for x in (0.26, 0.74) for y in (0.26, 0.74)]) + rng.uniform(-0.03, 0.03, (4, 2))
        scales = rng.uniform(0.32, 0.4, 4)
    order = rng.permutation(count)
    placed = [Place(float(centers[i, 0]), float(centers[i, 1]), float(scales[i])) for i in order]
    return [posed(place, rng, mirrored) for place in placed]


def relation_of(first: np.ndarray, second: np.ndarray) -> str | None:
    """Relation of the first thing to the second in the image plane, if their masks make it clear.

    Parameters
    ----------
    first, second : ndarray, bool, (size, size)
        Masks of the two things.

    Returns
    -------
    str or None
        "left of" or "right of" if the bounding boxes of the masks are side by side, "above" or "below" if one box is
        above the other. None if the relation is not clear.

    Notes
    -----
    The main direction is the direction, horizontal or vertical, in which the centers of the boxes are farther apart.
    The relation is clear if two conditions hold. In the main direction, the boxes overlap by at most a tenth of the
    smaller box's extent. In the other direction, the centers are at most half as far apart as in the main direction.

    Examples
    --------
    >>> left, right = np.zeros((2, 16, 16), bool)
    >>> left[5:9, 1:5], right[6:10, 9:14] = True, True
    >>> relation_of(left, right), relation_of(right, left), relation_of(left, left)
    ('left of', 'right of', None)
    """
    spans = []
    for mask in (first, second):
        rows, columns = np.nonzero(mask)
        spans.append(((columns.min(), columns.max() + 1), (rows.min(), rows.max() + 1)))
    shift = [(b[0] + b[1] - a[0] - a[1]) / 2 for a, b in zip(*spans, strict=True)]
    axis = int(abs(shift[1]) > abs(shift[0]))
    low, high = sorted((spans[0][axis], spans[1][axis]), key=sum)
    slack = 0.1 * min(low[1] - low[0], high[1] - high[0])
    if low[1] - high[0] > slack or abs(shift[1 - axis]) > 0.5 * abs(shift[axis]):
        return None
    return (("left of", "right of"), ("above", "below"))[axis][int(shift[axis] < 0)]


def _on(shapes: tuple[Shape, Shape], rng: np.random.Generator, mirrored: float) -> tuple[Place, Place]:
    """Random places of a thing and of the support on which the thing stands.

    `shapes` are the shapes of the thing and of the support.

    The thing's lower edge is below the support's upper edge by a tenth of the support's height.
    """
    upper, lower = shapes
    scale, small = float(rng.uniform(0.48, 0.6)), float(rng.uniform(0.3, 0.42))
    x = float(rng.uniform(0.32, 0.68))
    height = (lower.ink[3] - lower.ink[1]) * scale
    y = float(rng.uniform(0.64, 0.74))
    top = y + (lower.ink[1] - 0.5) * scale
    seat = top + height * 0.1
    return (
        _inside(x + float(rng.uniform(-0.08, 0.08)), seat - (upper.ink[3] - 0.5) * small, small),
        Place(x=x, y=y, scale=scale, flip=bool(rng.random() < mirrored)),
    )


def _large_and_small(rng: np.random.Generator, mirrored: float) -> tuple[Place, Place]:
    places = _apart((rng.uniform(0.55, 0.66), rng.uniform(0.22, 0.3)), rng, mirrored)
    return places if rng.random() < 0.5 else (places[1], places[0])


def _apart(scales: tuple[float, float], rng: np.random.Generator, mirrored: float) -> tuple[Place, Place]:
    while True:
        first, second = (_anywhere(float(scale), rng) for scale in scales)
        if _clear(first, second):
            return posed(first, rng, mirrored), posed(second, rng, mirrored)


def _clear(a: Place, b: Place) -> bool:
    """True if the squares of two places hardly overlap or do not overlap at all.

    In at least one of the directions x and y, their overlap must be less than a tenth of the mean of their sides.
    """
    return max(abs(a.x - b.x), abs(a.y - b.y)) > 0.9 * (a.scale + b.scale) / 2


def _anywhere(scale: float, rng: np.random.Generator) -> Place:
    margin = scale / 2
    return Place(float(rng.uniform(margin, 1 - margin)), float(rng.uniform(margin, 1 - margin)), scale)


def _inside(x: float, y: float, scale: float) -> Place:
    """Place of the size `scale` inside the scene, with its center as near to (x, y) as possible.

    All values are shares of the scene's side, as in `Place`.
    """
    margin = scale / 2
    return Place(float(np.clip(x, margin, 1 - margin)), float(np.clip(y, margin, 1 - margin)), float(scale))
