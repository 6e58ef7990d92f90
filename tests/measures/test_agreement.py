"""Downscaling of masks and agreement of maps with masks, compared with answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elakit.errors import SettingError
from elakit.measures.agreement import agreement_iou, auc, pointing_game
from elakit.measures.masks import coverage, downscale

MEASURES = (agreement_iou, auc, pointing_game)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def map_and_mask(draw):
    """A map with many ties, and a mask of its size."""
    shape = draw(shapes)
    return draw(arrays(float, shape, elements=st.integers(0, 6))), draw(arrays(bool, shape))


# --- downscaling -------------------------------------------------------------------------------------------


def test_locations_that_are_mostly_covered_are_kept():
    mask = np.zeros((4, 8), bool)
    mask[:2, :3] = True  # covers the first location of 2 x 2 pixels and half of the second
    mask[2:, 5:] = True  # in the second row half of the third and all of the fourth
    np.testing.assert_array_equal(coverage(mask, (2, 4)), [[1, 0.5, 0, 0], [0, 0, 0.5, 1]])
    np.testing.assert_array_equal(downscale(mask, (2, 4)), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_sizes_need_not_divide():
    # Locations of 1.5 x 1.5 pixels: each covers a quarter of the middle pixel, of its own area of 2.25.
    center = np.zeros((3, 3), bool)
    center[1, 1] = True
    np.testing.assert_allclose(coverage(center, (2, 2)), np.full((2, 2), 1 / 9))
    np.testing.assert_array_equal(downscale(center, (2, 2)), [[1, 0], [0, 0]])  # first of equals
    # Five pixels on two locations; the third pixel is cut in half: 2.5 of 2.5 and 0.5 of 2.5.
    np.testing.assert_allclose(coverage([[1, 1, 1, 0, 0]], (1, 2)), [[1, 0.2]])


def test_a_mask_smaller_than_a_location_is_kept():
    glasses = np.zeros((3, 64, 64), bool)
    glasses[0, 29, 21] = True
    glasses[1, 0, 3:6] = True  # one pixel in the first location, two in the second
    small = downscale(glasses, (16, 16))
    assert np.argwhere(small).tolist() == [[0, 7, 5], [1, 0, 1]]  # the third mask is empty


@given(arrays(bool, shapes), shapes)
@settings(max_examples=60, deadline=None)
def test_coverage_keeps_the_area_and_only_empty_masks_stay_empty(mask, size):
    covered = coverage(mask, size)
    assert covered.mean() == pytest.approx(mask.mean())
    assert covered.min() >= 0
    assert covered.max() <= 1
    assert downscale(mask, size).any() == mask.any()


@given(arrays(bool, shapes), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_downscaling_inverts_enlarging(mask, down, across):
    large = np.kron(mask, np.ones((down, across), bool))
    np.testing.assert_array_equal(downscale(large, mask.shape), mask)


# --- measures -----------------------------------------------------------------------------------------------

# The car covers six locations. The Otsu mask of the map has four, three of them on the car.
CAR = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], bool)
MAP = np.array([[8.0, 9.0, 8.0, 0.0], [1.0, 8.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])


def test_agreement_worked_by_hand():
    assert agreement_iou(MAP, CAR) == pytest.approx(3 / 7)  # intersection 3, union 4 + 6 - 3
    # On the car 9 8 8 1 0 0, beside it 8 1 1 1 0 0: of 36 pairs 9 wins 6; each 8 wins 5 and ties one; 1 wins 2 and
    # ties 3; each 0 ties 2: (6 + 11 + 3.5 + 2) of 36.
    assert auc(MAP, CAR) == pytest.approx(22.5 / 36)
    assert pointing_game(MAP, CAR) == 1
    assert pointing_game(MAP, ~CAR) == 0


def test_tied_maxima_share_the_point():
    values = [[5.0, 5.0, 1.0, 5.0]]
    assert pointing_game(values, [[1, 0, 1, 0]]) == pytest.approx(1 / 3)
    assert pointing_game(np.zeros((1, 4)), [[1, 0, 1, 0]]) == 0.5


def test_a_constant_map_scores_as_chance():
    flat = np.full((3, 4), 0.2)
    assert auc(flat, CAR) == 0.5
    assert agreement_iou(flat, CAR) == 0


def test_agreement_with_an_empty_mask_is_nan():
    for measure in MEASURES:
        assert np.isnan(measure(MAP, CAR & False))
    full = CAR | True
    assert np.isnan(auc(MAP, full))  # no location beside the mask
    assert pointing_game(MAP, full) == 1
    assert agreement_iou(MAP, full) == pytest.approx(4 / 12)


@given(arrays(bool, shapes))
@settings(max_examples=40, deadline=None)
def test_attention_on_the_thing_and_nowhere_else_is_perfect(mask):
    scores = [float(measure(mask.astype(float), mask)) for measure in MEASURES]
    if mask.any() and not mask.all():
        assert scores == [1, 1, 1]
        assert [float(measure(1.0 - mask, mask)) for measure in MEASURES] == [0, 0, 0]


@given(map_and_mask())
@settings(max_examples=80, deadline=None)
def test_auc_is_the_share_of_pairs_in_the_right_order(case):
    values, mask = case
    inside, outside = values[mask][:, None], values[~mask][None]
    if mask.any() and not mask.all():
        assert auc(values, mask) == pytest.approx(((inside > outside) + 0.5 * (inside == outside)).mean())
        assert auc(values, ~mask) == pytest.approx(1 - auc(values, mask))


@given(map_and_mask(), st.sampled_from([np.exp, np.cbrt, lambda v: 1e-6 * v**3 + 2, lambda v: 1e4 * v]))
@settings(max_examples=60, deadline=None)
def test_only_the_order_of_attention_counts_for_auc_and_peak(case, monotone):
    values, mask = case
    for measure in (auc, pointing_game):
        np.testing.assert_array_equal(measure(monotone(values), mask), measure(values, mask))


@given(map_and_mask())
@settings(max_examples=60, deadline=None)
def test_scores_are_shares_and_do_not_depend_on_strength(case):
    values, mask = case
    for measure in MEASURES:
        score = measure(values, mask)
        assert np.isnan(score) or 0 <= score <= 1
        np.testing.assert_array_equal(measure(values * 2, mask), score)
    if mask.any() and (values == values.max()).sum() == 1:
        assert pointing_game(values, mask) in (0, 1)


def test_steps_and_entities_are_carried_along():
    maps = np.stack([[MAP, MAP.T.reshape(3, 4)], [CAR * 1.0, CAR * 1.0]])  # (step, entity, y, x)
    masks = np.stack([CAR, CAR & False])
    for measure in MEASURES:
        scores = measure(maps, masks)
        assert scores.shape == (2, 2)
        np.testing.assert_array_equal(scores[0, 0], measure(MAP, CAR))
        np.testing.assert_array_equal(scores[1], [1, np.nan])


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize(
    ("maps", "masks", "says"),
    [
        (MAP, CAR.T, "must be equal.*Resize"),
        (MAP * np.nan, CAR, "NaN"),
        (-MAP, CAR, "never negative"),
        (MAP, MAP, "boolean masks"),
        (MAP[0], CAR, "maps: the shape is .* must be"),
        (np.stack([MAP] * 2), np.stack([CAR] * 3), "leading dimensions"),
    ],
)
def test_invalid_arrays_are_refused_with_a_reason(measure, maps, masks, says):
    with pytest.raises(SettingError, match=says):
        measure(maps, masks)


@pytest.mark.parametrize("size", [(0, 4), (4,), (2.5, 2)])
def test_an_invalid_size_is_refused(size):
    with pytest.raises(SettingError, match="rows and columns"):
        downscale(CAR, size)
    with pytest.raises(SettingError, match="at least one location"):
        downscale(np.zeros((2, 0, 4), bool), (2, 2))
