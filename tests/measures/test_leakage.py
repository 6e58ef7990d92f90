"""Leakage of attention maps into regions, compared with answers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from worked_example import CAT, CAT_REGION, FROG, FROG_REGION, MATRIX

from elakit.errors import SettingError
from elakit.measures.leakage import binding, bleed, intrusion, leakage, spill, truth_leakage

shapes = st.tuples(st.integers(1, 4), st.integers(1, 4))
values = st.floats(0, 1e3, allow_subnormal=True)


@st.composite
def maps_and_masks(draw):
    shape = draw(shapes)
    count = draw(st.integers(1, 4))
    maps = draw(arrays(float, (count, *shape), elements=values))
    owner = draw(arrays(int, shape, elements=st.integers(-1, count - 1)))  # -1 is background
    return maps, owner[None] == np.arange(count)[:, None, None]


def test_leakage_worked_by_hand():
    matrix = leakage([CAT, FROG], [CAT_REGION, FROG_REGION])
    np.testing.assert_allclose(matrix, MATRIX)
    np.testing.assert_allclose(bleed(matrix), [0.2, 0.4])
    np.testing.assert_allclose(intrusion(matrix), [0.15, 0.1])
    np.testing.assert_allclose(spill(matrix), [0.05, 0.3])


def test_leakage_of_the_papers_figure():
    folder = Path(__file__).parents[2] / "data" / "paper"
    maps, masks = (
        np.stack([np.loadtxt(folder / f"fig_{kind}_{name}.csv", delimiter=",") for name in ("cat", "frog")])
        for kind in ("maps", "mask")
    )
    # Mass inside the figure's masks. Leakage does not depend on a map's scale, so the displayed maps can be used.
    np.testing.assert_allclose(1 - bleed(leakage(maps, masks)), [0.525, 0.916], atol=6e-4)


def test_steps_are_carried_along():
    steps = np.stack([[CAT, FROG], [FROG, CAT]])
    matrix = leakage(steps, np.stack([CAT_REGION, FROG_REGION]))
    assert matrix.shape == (2, 2, 3)
    np.testing.assert_allclose(matrix[1], [MATRIX[1], MATRIX[0]])
    np.testing.assert_allclose(bleed(matrix), [[0.2, 0.4], [0.9, 0.85]])


def test_a_map_of_zeros_counts_as_uniform():
    matrix = leakage([CAT * 0, FROG], [CAT_REGION, FROG_REGION])
    np.testing.assert_allclose(matrix[0], [3 / 8, 2 / 8, 3 / 8])


@given(maps_and_masks())
@settings(max_examples=100, deadline=None)
def test_rows_sum_to_one_and_bleed_is_intrusion_plus_spill(case):
    maps, masks = case
    matrix = leakage(maps, masks)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, atol=1e-12)
    assert (matrix >= 0).all()
    np.testing.assert_allclose(bleed(matrix), intrusion(matrix) + spill(matrix), atol=1e-12)


@given(maps_and_masks(), st.floats(1e-3, 1e3))
@settings(max_examples=50, deadline=None)
def test_leakage_does_not_depend_on_scale(case, scale):
    maps, masks = case
    if maps.max() > 0 and maps[maps > 0].min() < 1e-290:
        maps = np.where(maps < 1e-290, 0, maps)  # subnormal numbers lose digits when scaled
    np.testing.assert_allclose(leakage(maps * scale, masks), leakage(maps, masks), atol=1e-12)


@given(maps_and_masks(), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_permuting_the_entities_permutes_the_matrix(case, random):
    maps, masks = case
    order = list(range(len(maps)))
    random.shuffle(order)
    straight = leakage(maps, masks)
    np.testing.assert_allclose(leakage(maps[order], masks[order]), straight[order][:, [*order, len(order)]], atol=1e-12)


def test_bfloat16_tensors_with_gradients_are_accepted():
    maps = torch.tensor(np.stack([CAT, FROG]), dtype=torch.bfloat16, requires_grad=True)
    masks = torch.tensor(np.stack([CAT_REGION, FROG_REGION]))
    np.testing.assert_allclose(leakage(maps, masks), MATRIX)


def test_leakage_onto_the_image_equals_leakage_onto_its_downscaled_masks():
    # The regions as things in an image of 4 x 12 pixels; a location covers two rows and three columns.
    image = np.stack([CAT_REGION, FROG_REGION]).repeat(2, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(truth_leakage([CAT, FROG], image), MATRIX)
    # Moved by a pixel, each row loses a third of its first location and gains a third of the one after its last: the
    # cat has 8 * 2/3 + 4 + 2/3 in the upper row and 4 * 2/3 + 0 in the lower, of 20.
    moved = np.roll(image, 1, axis=2)
    assert truth_leakage([CAT, FROG], moved)[0, 0] == pytest.approx((12 + 2 / 3) / 20)


def test_things_fused_into_a_hybrid_share_its_attention():
    body, tail = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool), np.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)
    # Both masks contain the body (16 of the cat's 20, 3 of the frog's 10); only the frog's contains the tail.
    fused = np.stack([body, body | tail])
    matrix = truth_leakage([CAT, FROG], fused)
    np.testing.assert_allclose(matrix, [[0.4, 0.5, 0.1], [0.15, 0.55, 0.3]])
    np.testing.assert_allclose(truth_leakage([CAT, FROG], fused[::-1]), matrix[:, [1, 0, 2]])


def test_leakage_onto_an_absent_entity_is_zero():
    np.testing.assert_allclose(
        truth_leakage([CAT, FROG], [CAT_REGION & False, CAT_REGION]), [[0, 0.8, 0.2], [0, 0.1, 0.9]]
    )


@given(maps_and_masks(), st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_rows_sum_to_one_on_any_image(case, seed, high, wide):
    maps, _ = case
    things = np.random.default_rng(seed).random((3, high, wide)) < 0.4
    matrix = truth_leakage(maps, things)
    np.testing.assert_allclose(matrix.sum(axis=-1), 1, atol=1e-12)
    assert matrix.min() >= 0


# --- attributes ---------------------------------------------------------------------------------------------


def test_binding_margin_is_positive_for_the_right_owner_and_negative_for_the_wrong_one():
    car = np.array([[2.0, 2.0, 0.0, 0.0]])
    bird = np.array([[0.0, 0.0, 3.0, 3.0]])
    red = np.array([[1.0, 0.0, 1.0, 0.0]])  # half with each: min .5, max 1.5
    blue = np.array([[0.0, 0.0, 1.0, 1.0]])  # on the bird
    bound = binding([red, blue], [car, bird], owners=[0, 1])
    np.testing.assert_allclose(bound.own, [1 / 3, 1])
    np.testing.assert_allclose(bound.other, [1 / 3, 0])
    np.testing.assert_allclose(bound.margin, [0, 1])
    np.testing.assert_allclose(binding([blue], [car, bird], owners=[0]).margin, [-1])
    # With one entity there is no other one.
    np.testing.assert_allclose(binding([red], [car], owners=[0]).margin, [1 / 3])


def test_intrusion_of_attributes_is_relative_to_their_owners_region():
    matrix = leakage([FROG, CAT], [CAT_REGION, FROG_REGION])  # maps of two attributes
    np.testing.assert_allclose(intrusion(matrix, own=[0, 0]), [0.6, 0.15])
    np.testing.assert_allclose(bleed(matrix, own=[0, 0]), [0.9, 0.2])


# --- named dimensions ---------------------------------------------------------------------------------------


def test_dimensions_of_a_data_array_are_read_by_name():
    maps = xr.DataArray([[CAT, FROG]], dims=("step", "token", "y", "x"))
    masks = xr.DataArray([CAT_REGION, FROG_REGION], dims=("entity", "y", "x"))
    for order in (("step", "token", "x", "y"), ("y", "token", "x", "step"), ("x", "y", "step", "token")):
        for mask_order in (("entity", "x", "y"), ("y", "x", "entity")):
            matrix = leakage(maps.transpose(*order), masks.transpose(*mask_order))
            np.testing.assert_allclose(matrix, [MATRIX])
    transposed = maps.isel(step=0).transpose("x", "y", "token")
    np.testing.assert_allclose(truth_leakage(transposed, masks.transpose("x", "entity", "y")), MATRIX)


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: leakage([CAT, FROG], [CAT_REGION, CAT_REGION]), "3 locations belong to more than one region"),
        (lambda: leakage(CAT, CAT_REGION), "maps must be"),
        (lambda: leakage([CAT], [CAT_REGION[:, :3]]), "Resize"),
        (lambda: leakage([CAT], [CAT]), "boolean masks"),
        (lambda: leakage([CAT * np.nan], [CAT_REGION]), "NaN"),
        (lambda: leakage([-CAT], [CAT_REGION]), "never negative"),
        (lambda: leakage(np.ones((2, 1, 2, 4)), np.zeros((3, 1, 2, 4), bool)), "leading dimensions"),
        (lambda: leakage(xr.DataArray([CAT], dims=("entity", "y", "column")), [CAT_REGION]), "both y and x"),
        (lambda: leakage(np.ma.masked_greater([CAT], 7), [CAT_REGION]), "1 value is masked"),
        (lambda: leakage([np.ma.masked_less(CAT, 1), FROG], [CAT_REGION, FROG_REGION]), "2 values are masked"),
        (lambda: truth_leakage([CAT], CAT_REGION), "maps must be"),
        (lambda: truth_leakage([CAT], [CAT]), "boolean masks"),
        (lambda: truth_leakage(np.ones((2, 1, 2, 4)), np.zeros((3, 1, 2, 4), bool)), "leading dimensions"),
        (lambda: bleed([[0.5, 0.3, 0.2]]), "own="),
        (lambda: bleed([[0.5, 0.3, 0.2]], own=[2]), r"a list of length 1\. For each row, give an index from 0 to 1"),
        (lambda: bleed([0.5, 0.3]), "leakage matrix has shape"),
        (lambda: binding([CAT], [CAT, FROG], owners=[0, 1]), "owners"),
        (lambda: binding(CAT, [CAT], owners=[0]), "attributes must be"),
    ],
)
def test_invalid_arrays_are_refused_with_a_reason(call, message):
    with pytest.raises(SettingError, match=message):
        call()


def test_a_masked_array_without_masked_values_is_accepted():
    np.testing.assert_allclose(leakage(np.ma.array([CAT, FROG]), [CAT_REGION, FROG_REGION]), MATRIX)
