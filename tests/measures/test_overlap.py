"""Overlap and divergence of masks and maps, compared with answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worked_example import CAT, FROG

from elakit.errors import SettingError
from elakit.measures.arrays import distribution
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

OF_MASKS = (iou, dice, overlap_coefficient)
OF_MAPS = (ruzicka, astar_overlap)
DIVERGENCES = (symmetric_kl, jensen_shannon, hellinger)

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
values = st.floats(0, 1e3, allow_subnormal=True)


@st.composite
def pairs(draw, elements=values, dtype=float):
    shape = draw(shapes)
    return draw(arrays(dtype, shape, elements=elements)), draw(arrays(dtype, shape, elements=elements))


def test_overlap_of_masks_worked_by_hand():
    a = [[1, 1, 1, 0], [1, 0, 0, 0]]  # area 4
    b = [[0, 1, 1, 0], [0, 1, 1, 1]]  # area 5, of which 2 are shared
    assert iou(a, b) == pytest.approx(2 / 7)
    assert dice(a, b) == pytest.approx(4 / 9)
    assert overlap_coefficient(a, b) == pytest.approx(2 / 4)


@pytest.mark.parametrize("function", OF_MASKS)
def test_overlap_with_an_empty_mask_is_zero(function):
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    assert function(empty, empty) == function(empty, full) == 0
    assert function(full, full) == 1


def test_overlap_of_maps_worked_by_hand():
    # min 0+1+2+0+0+0+1+0 = 4; max 8+4+4+1+4+2+2+1 = 26; sum 20+10 = 30
    assert ruzicka(CAT, FROG) == pytest.approx(4 / 26)
    assert astar_overlap(CAT, FROG) == pytest.approx(4 / 30)
    assert (ruzicka(CAT, CAT), astar_overlap(CAT, CAT)) == pytest.approx((1, 0.5))
    assert ruzicka(CAT * 0, FROG * 0) == astar_overlap(CAT * 0, FROG * 0) == 0


@given(pairs(elements=st.booleans(), dtype=bool))
@settings(max_examples=50, deadline=None)
def test_overlap_of_masks_is_symmetric_and_ordered(masks):
    a, b = masks
    assert all(function(a, b) == function(b, a) for function in OF_MASKS)
    assert 0 <= iou(a, b) <= dice(a, b) <= overlap_coefficient(a, b) <= 1


@given(pairs())
@settings(max_examples=50, deadline=None)
def test_overlap_of_maps_is_symmetric_and_bounded(maps):
    a, b = maps
    assert all(function(a, b) == function(b, a) for function in OF_MAPS)
    assert 0 <= ruzicka(a, b) <= 1
    assert 0 <= astar_overlap(a, b) <= 0.5


def test_leading_dimensions_broadcast():
    matrix = ruzicka(np.stack([CAT, FROG])[:, None], np.stack([CAT, FROG])[None])
    np.testing.assert_allclose(matrix, [[1, 4 / 26], [4 / 26, 1]])


def test_divergences_worked_by_hand():
    p, q = [[0.5, 0.5]], [[0.25, 0.75]]
    # Half of (.25 ln 2) + (-.25 ln(2/3)) = .125 ln 3
    assert symmetric_kl(p, q) == pytest.approx(0.125 * np.log(3))
    expected = 0.5 * (
        0.5 * np.log(0.5 / 0.375) + 0.5 * np.log(0.5 / 0.625)
        + 0.25 * np.log(0.25 / 0.375) + 0.75 * np.log(0.75 / 0.625)
    )  # fmt: skip
    assert jensen_shannon(p, q) == pytest.approx(expected)
    assert hellinger(p, q) == pytest.approx(np.sqrt(1 - np.sqrt(0.125) - np.sqrt(0.375)))


def test_disjoint_maps_reach_the_largest_divergence():
    a, b = [[1.0, 0.0]], [[0.0, 1.0]]
    assert jensen_shannon(a, b) == pytest.approx(np.log(2))
    assert hellinger(a, b) == 1
    assert 10 < symmetric_kl(a, b) < np.inf


@given(pairs())
@settings(max_examples=100, deadline=None)
def test_divergences_are_symmetric_not_negative_and_zero_for_equal_maps(maps):
    a, b = maps
    differ = np.abs(distribution(a) - distribution(b)).max() > 1e-3
    for function in DIVERGENCES:
        assert function(a, b) >= 0
        assert function(a, b) == pytest.approx(function(b, a), abs=1e-12)
        assert function(a, a) == 0
        assert not differ or function(a, b) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ruzicka(CAT, CAT.T), "Resize"),
        (lambda: iou(np.zeros((2, 1, 1), bool), np.zeros((3, 1, 1), bool)), "leading dimensions"),
        (lambda: iou(CAT, CAT > 1), "boolean masks"),
        (lambda: hellinger(3.0, CAT), "shape"),
        (lambda: symmetric_kl(CAT + np.inf, CAT), "NaN or infinite"),
    ],
)
def test_invalid_arrays_are_refused_with_a_reason(call, message):
    with pytest.raises(SettingError, match=message):
        call()
