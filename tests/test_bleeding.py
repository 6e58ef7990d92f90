"""Measures of bleeding, against answers worked out by hand."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elakit.bleeding import (
    binding,
    bleed,
    distribution,
    divergence,
    intrusion,
    leakage,
    mask_overlap,
    measure,
    soft_overlap,
    spill,
    truth_leakage,
)
from elakit.errors import SettingError
from elakit.regions import localize, localize_steps

# Two 2x4 maps and their regions. Cat: 20 in all, 16 at home, 3 in the frog's region, 1 in the background.
# Frog: 10 in all, 6 at home, 1 in the cat's region, 3 in the background.
CAT = np.array([[8.0, 4.0, 2.0, 0.0], [4.0, 0.0, 1.0, 1.0]])
FROG = np.array([[0.0, 1.0, 4.0, 1.0], [0.0, 2.0, 2.0, 0.0]])
CAT_REGION = np.array([[1, 1, 0, 0], [1, 0, 0, 0]], bool)
FROG_REGION = np.array([[0, 0, 1, 0], [0, 0, 1, 0]], bool)
MATRIX = [[0.8, 0.15, 0.05], [0.1, 0.6, 0.3]]

maps_2d = st.tuples(st.integers(1, 4), st.integers(1, 4))
values = st.floats(0, 1e3, allow_subnormal=True)


@st.composite
def maps_and_masks(draw):
    shape = draw(maps_2d)
    count = draw(st.integers(1, 4))
    maps = draw(arrays(float, (count, *shape), elements=values))
    owner = draw(arrays(int, shape, elements=st.integers(-1, count - 1)))  # -1 is background
    return maps, owner[None] == np.arange(count)[:, None, None]


@st.composite
def two(draw, elements=values, dtype=float):
    shape = draw(maps_2d)
    return draw(arrays(dtype, shape, elements=elements)), draw(arrays(dtype, shape, elements=elements))


# --- leakage ------------------------------------------------------------------------------------------------


def test_leakage_worked_by_hand():
    matrix = leakage([CAT, FROG], [CAT_REGION, FROG_REGION])
    np.testing.assert_allclose(matrix, MATRIX)
    np.testing.assert_allclose(bleed(matrix), [0.2, 0.4])
    np.testing.assert_allclose(intrusion(matrix), [0.15, 0.1])
    np.testing.assert_allclose(spill(matrix), [0.05, 0.3])


def test_leakage_of_the_papers_figure():
    folder = Path(__file__).parents[1] / "data" / "paper"
    maps, masks = (
        np.stack([np.loadtxt(folder / f"fig_{kind}_{name}.csv", delimiter=",") for name in ("cat", "frog")])
        for kind in ("maps", "mask")
    )
    # Mass inside the figure's own masks. Leakage ignores a map's scale, so the displayed maps will do.
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
def test_leakage_does_not_depend_on_strength(case, scale):
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


def test_tensors_are_taken_as_they_come():
    maps = torch.tensor(np.stack([CAT, FROG]), dtype=torch.bfloat16, requires_grad=True)
    masks = torch.tensor(np.stack([CAT_REGION, FROG_REGION]))
    np.testing.assert_allclose(leakage(maps, masks), MATRIX)


def test_leakage_onto_the_image_is_that_onto_its_cells():
    # The regions as things in a picture of 4 x 12 pixels, two rows and three columns a cell.
    image = np.stack([CAT_REGION, FROG_REGION]).repeat(2, axis=1).repeat(3, axis=2)
    np.testing.assert_allclose(truth_leakage([CAT, FROG], image), MATRIX)
    # Moved a pixel to the right, each row loses a third of its first cell and gains a third of the one after its last:
    # the cat has 8 * 2/3 + 4 + 2/3 in the upper row and 4 * 2/3 + 0 in the lower, of 20.
    moved = np.roll(image, 1, axis=2)
    assert truth_leakage([CAT, FROG], moved)[0, 0] == pytest.approx((12 + 2 / 3) / 20)


def test_things_fused_into_one_share_its_attention():
    body, tail = np.array([[1, 1, 0, 0], [1, 1, 0, 0]], bool), np.array([[0, 0, 1, 0], [0, 0, 0, 0]], bool)
    # Both are seen on the body (16 of the cat's 20 are there, 3 of the frog's 10), the frog also on the tail.
    fused = np.stack([body, body | tail])
    matrix = truth_leakage([CAT, FROG], fused)
    np.testing.assert_allclose(matrix, [[0.4, 0.5, 0.1], [0.15, 0.55, 0.3]])
    np.testing.assert_allclose(truth_leakage([CAT, FROG], fused[::-1]), matrix[:, [1, 0, 2]])


def test_nothing_lies_on_what_is_missing():
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


# --- overlap ------------------------------------------------------------------------------------------------


def test_mask_overlap_worked_by_hand():
    a = [[1, 1, 1, 0], [1, 0, 0, 0]]  # 4 cells
    b = [[0, 1, 1, 0], [0, 1, 1, 1]]  # 5 cells, 2 of them shared
    overlap = mask_overlap(a, b)
    assert overlap.iou == pytest.approx(2 / 7)
    assert overlap.dice == pytest.approx(4 / 9)
    assert overlap.coefficient == pytest.approx(2 / 4)


def test_an_empty_mask_overlaps_nothing():
    empty, full = np.zeros((2, 2), bool), np.ones((2, 2), bool)
    for other in (empty, full):
        assert tuple(mask_overlap(empty, other)) == (0, 0, 0)
    assert tuple(mask_overlap(full, full)) == (1, 1, 1)


def test_soft_overlap_worked_by_hand():
    # min 0+1+2+0+0+0+1+0 = 4; max 8+4+4+1+4+2+2+1 = 26; sum 20+10 = 30
    overlap = soft_overlap(CAT, FROG)
    assert overlap.ruzicka == pytest.approx(4 / 26)
    assert overlap.astar == pytest.approx(4 / 30)
    assert tuple(soft_overlap(CAT, CAT)) == pytest.approx((1, 0.5))
    assert tuple(soft_overlap(CAT * 0, FROG * 0)) == (0, 0)


@given(two(elements=st.booleans(), dtype=bool))
@settings(max_examples=50, deadline=None)
def test_mask_overlap_is_symmetric_and_between_0_and_1(masks):
    a, b = masks
    assert tuple(mask_overlap(a, b)) == tuple(mask_overlap(b, a))
    iou, dice, coefficient = mask_overlap(a, b)
    assert 0 <= iou <= dice <= coefficient <= 1


@given(two())
@settings(max_examples=50, deadline=None)
def test_soft_overlap_is_symmetric_and_bounded(maps):
    a, b = maps
    assert tuple(soft_overlap(a, b)) == tuple(soft_overlap(b, a))
    assert 0 <= soft_overlap(a, b).ruzicka <= 1
    assert 0 <= soft_overlap(a, b).astar <= 0.5


# --- divergence ---------------------------------------------------------------------------------------------


def test_divergence_worked_by_hand():
    p, q = [[0.5, 0.5]], [[0.25, 0.75]]
    # Half of (.25 ln 2) + (-.25 ln(2/3)) = .125 ln 3
    unlike = divergence(p, q)
    assert unlike.symmetric_kl == pytest.approx(0.125 * np.log(3))
    shannon = 0.5 * (
        0.5 * np.log(0.5 / 0.375) + 0.5 * np.log(0.5 / 0.625)
        + 0.25 * np.log(0.25 / 0.375) + 0.75 * np.log(0.75 / 0.625)
    )  # fmt: skip
    assert unlike.jensen_shannon == pytest.approx(shannon)
    assert unlike.hellinger == pytest.approx(np.sqrt(1 - np.sqrt(0.125) - np.sqrt(0.375)))


def test_maps_apart_are_as_unlike_as_can_be():
    unlike = divergence([[1.0, 0.0]], [[0.0, 1.0]])
    assert unlike.jensen_shannon == pytest.approx(np.log(2))
    assert unlike.hellinger == 1
    assert np.isfinite(unlike.symmetric_kl)
    assert unlike.symmetric_kl > 10


@given(two())
@settings(max_examples=100, deadline=None)
def test_divergence_is_never_negative_and_zero_for_equal_maps(maps):
    a, b = maps
    for one_way, other_way in zip(divergence(a, b), divergence(b, a), strict=True):
        assert one_way >= 0
        assert one_way == pytest.approx(other_way, abs=1e-12)
    assert tuple(divergence(a, a)) == (0, 0, 0)
    if np.abs(distribution(a) - distribution(b)).max() > 1e-3:
        assert min(divergence(a, b)) > 0


# --- attributes ---------------------------------------------------------------------------------------------


def test_binding_tells_the_right_owner_from_the_wrong_one():
    car = np.array([[2.0, 2.0, 0.0, 0.0]])
    bird = np.array([[0.0, 0.0, 3.0, 3.0]])
    red = np.array([[1.0, 0.0, 1.0, 0.0]])  # torn: with each, min .5, max 1.5
    blue = np.array([[0.0, 0.0, 1.0, 1.0]])  # on the bird
    bound = binding([red, blue], [car, bird], owners=[0, 1])
    np.testing.assert_allclose(bound.own, [1 / 3, 1])
    np.testing.assert_allclose(bound.other, [1 / 3, 0])
    np.testing.assert_allclose(bound.margin, [0, 1])
    np.testing.assert_allclose(binding([blue], [car, bird], owners=[0]).margin, [-1])
    # Alone in the prompt there is no other to leak to.
    np.testing.assert_allclose(binding([red], [car], owners=[0]).margin, [1 / 3])


def test_intrusion_of_attributes_counts_from_their_owners_region():
    matrix = leakage([FROG, CAT], [CAT_REGION, FROG_REGION])  # two attributes, looking like frog and cat
    np.testing.assert_allclose(intrusion(matrix, own=[0, 0]), [0.6, 0.15])
    np.testing.assert_allclose(bleed(matrix, own=[0, 0]), [0.9, 0.2])


# --- a whole run --------------------------------------------------------------------------------------------


def story():
    """Two steps: first as worked by hand, then each entity entirely at home."""
    clean = np.stack([CAT * CAT_REGION, FROG * FROG_REGION])
    maps = xr.DataArray(
        np.stack([[CAT, FROG], clean]),
        dims=("step", "token", "y", "x"),
        coords={"step": [0, 5], "timestep": ("step", [981, 701]), "token": ["cat", "frog"]},
    )
    regions = xr.DataArray(
        np.stack([[CAT_REGION, FROG_REGION]] * 2),
        dims=("step", "entity", "y", "x"),
        coords={"step": [0, 5], "entity": ["cat", "frog"]},
    )
    return maps, regions


def value(frame: pd.DataFrame, **where) -> float:
    for column, wanted in where.items():
        frame = frame[frame[column] == wanted]
    assert len(frame) == 1, frame
    return float(frame["value"].iloc[0])


def test_a_run_is_measured_per_step_and_overall():
    bleeding = measure(*story())
    assert bleeding.leakage.dims == ("step", "entity", "region")
    assert bleeding.leakage.region.values.tolist() == ["cat", "frog", "background"]
    assert bleeding.leakage.timestep.values.tolist() == [981, 701]
    np.testing.assert_allclose(bleeding.leakage.sel(step=0), MATRIX)
    np.testing.assert_allclose(bleeding.leakage.sel(step=5), [[1, 0, 0], [0, 1, 0]])

    frame = bleeding.to_frame()
    assert list(frame.columns) == ["step", "measure", "entity", "other", "value"]
    assert value(frame, step=0, measure="leakage", entity="frog", other="background") == pytest.approx(0.3)
    assert value(frame, step=0, measure="intrusion", entity="cat") == pytest.approx(0.15)
    assert value(frame, step=5, measure="bleed", entity="cat") == pytest.approx(0)
    # As distributions over 20: cat 8 4 2 0 / 4 0 1 1, frog 0 2 8 2 / 0 4 4 0; min 5, max 35.
    assert value(frame, step=0, measure="ruzicka", entity="cat", other="frog") == pytest.approx(5 / 35)
    assert value(frame, step=5, measure="astar", entity="cat", other="frog") == 0
    assert value(frame, step=5, measure="jensen_shannon") == pytest.approx(np.log(2))

    overall = bleeding.overall()
    assert list(overall.columns) == ["measure", "entity", "other", "value"]
    assert value(overall, measure="bleed", entity="cat") == pytest.approx(0.1)
    assert value(overall, measure="leakage", entity="frog", other="frog") == pytest.approx(0.8)
    assert len(overall) * 2 == len(frame)


def test_attention_is_set_against_the_image():
    maps, regions = story()
    # At twice the maps' size the cat is where its region is; the frog is missing.
    large = (CAT_REGION, FROG_REGION & False)
    truth = xr.DataArray(
        np.stack(large).repeat(2, axis=1).repeat(2, axis=2),
        dims=("entity", "y", "x"),
        coords={"entity": ["cat", "frog"]},
    )
    attributes = maps.assign_coords(token=["black", "green"])
    bleeding = measure(maps, regions, attributes, {"black": "cat", "green": "frog"}, truth=truth)

    frame, overall = bleeding.to_frame(), bleeding.overall()
    # On the cat 8 4 4, beside it 2 0 0 1 1: every pair is in order. Otsu cuts 8 4 4 from the rest.
    for name in ("truth_iou", "truth_auc", "pointing"):
        assert value(frame, step=0, measure=name, entity="cat") == 1
        assert np.isnan(value(frame, step=0, measure=name, entity="frog"))
        assert np.isnan(value(overall, measure=name, entity="frog"))
        assert overall[overall["measure"] == name]["value"].mean() == 1  # what is missing is left out of a mean
    assert value(frame, step=0, measure="truth_leakage", entity="frog", other="cat") == pytest.approx(0.1)
    assert value(frame, step=0, measure="truth_leakage", entity="frog", other="frog") == 0
    assert value(overall, measure="truth_leakage", entity="frog", other="background") == pytest.approx(0.95)
    assert value(frame, step=0, measure="attribute_truth_leakage", entity="green", other="cat") == pytest.approx(0.1)
    assert bleeding.truth_leakage.timestep.values.tolist() == [981, 701]
    np.testing.assert_allclose(bleeding.truth_leakage.sel(step=0), [[0.8, 0, 0.2], [0.1, 0, 0.9]])
    assert bleeding.attribute_truth_leakage.owner.values.tolist() == ["cat", "frog"]

    text = repr(bleeding)
    assert "Attention against the image" in text
    assert re.search(r"frog +– +– +– +0.050 +0.000 +0.950", text)
    assert "–" in bleeding._repr_html_()
    # What does not ask for the image is as it was.
    plain = measure(maps, regions, attributes, {"black": "cat", "green": "frog"})
    assert "image" not in repr(plain)
    pd.testing.assert_frame_equal(
        frame[~frame["measure"].str.contains("truth|pointing")].reset_index(drop=True), plain.to_frame()
    )


def test_the_frame_is_the_users_own_to_change():
    bleeding = measure(*story())
    frame = bleeding.to_frame()
    frame["value"] = 0
    assert (bleeding.to_frame()["value"] != 0).any()


def test_attributes_are_measured_in_the_regions_of_the_entities():
    maps, regions = story()
    # Black looks where the cat is, green where the frog is.
    attributes = maps.assign_coords(token=["black", "green"], entity=("token", ["cat", "frog"])).isel(token=[1, 0])
    owners = {"green": "frog", "black": "cat"}
    start = xr.DataArray([0.9, 0.7], dims="step", coords={"step": [0, 5]})
    bleeding = measure(maps, regions, attributes, owners, start=start, end=start / 10)

    frame = bleeding.to_frame()
    assert value(frame, step=0, measure="attribute_overlap", entity="green", other="frog") == pytest.approx(1)
    swapped = measure(maps, regions, attributes, {"green": "cat", "black": "frog"}).to_frame()
    for word in ("green", "black"):
        good = value(frame, step=0, measure="attribute_margin", entity=word)
        bad = value(swapped, step=0, measure="attribute_margin", entity=word)
        assert good == pytest.approx(-bad) == pytest.approx(1 - 5 / 35)
    assert value(swapped, step=0, measure="attribute_intrusion", entity="black", other="frog") == pytest.approx(0.8)
    assert value(swapped, step=0, measure="attribute_bleed", entity="green", other="cat") == pytest.approx(0.9)
    assert bleeding.attribute_leakage.sel(attribute="green").owner == "frog"
    np.testing.assert_allclose(bleeding.attribute_leakage.sel(attribute="black", step=0), MATRIX[0])
    assert value(frame, step=5, measure="start_mass") == pytest.approx(0.7)
    assert value(bleeding.overall(), measure="end_mass") == pytest.approx(0.08)


def test_regions_of_one_step_serve_them_all_in_any_order():
    maps, regions = story()
    fixed = regions.isel(step=0, drop=True)
    for given_regions in (fixed, fixed.isel(entity=[1, 0]), fixed.transpose("x", "entity", "y")):
        xr.testing.assert_equal(measure(maps, given_regions).leakage, measure(maps, regions).leakage)
    found = localize(maps.isel(step=1), binarization="otsu")
    assert float(measure(maps, found).leakage.sel(step=5, entity="frog", region="frog")) == 1


def test_localized_regions_go_straight_into_the_measures():
    rng = np.random.default_rng(3)
    maps = xr.DataArray(
        rng.random((3, 3, 5, 4)).astype("float32"),
        dims=("step", "token", "y", "x"),
        coords={"token": ["car#1", "car#2", "bird"], "token_index": ("token", [2, 5, 8])},
    )
    bleeding = measure(maps, localize_steps(maps, binarization="otsu"))
    np.testing.assert_allclose(bleeding.leakage.sum("region"), 1)
    pairs = bleeding.to_frame().query("measure == 'iou' and step == 0")[["entity", "other"]].values.tolist()
    assert pairs == [["car#1", "car#2"], ["car#1", "bird"], ["car#2", "bird"]]


def test_one_entity_has_no_pairs():
    maps, regions = story()
    bleeding = measure(maps.isel(token=[0]), regions.isel(entity=[0]))
    assert set(bleeding.to_frame()["measure"]) == {"leakage", "bleed", "intrusion", "spill"}
    assert "Pairs" not in repr(bleeding)


@given(order=st.permutations(range(3)), seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_order_of_the_entities_does_not_change_a_measure(order, seed):
    rng = np.random.default_rng(seed)
    names = np.array(["cat", "frog", "bird"])
    maps = xr.DataArray(rng.random((2, 3, 3, 4)), dims=("step", "token", "y", "x"), coords={"token": names})
    regions = localize_steps(maps, binarization="mean-std")
    straight, turned = (
        measure(maps, regions).overall(),
        measure(maps.isel(token=list(order)), regions).overall(),
    )

    def keyed(frame):
        alone = frame["measure"].isin(["leakage"])
        key = [
            (m, e, o) if fixed else (m, *sorted((e, o)))
            for m, e, o, fixed in zip(frame["measure"], frame["entity"], frame["other"], alone, strict=True)
        ]
        return dict(zip(key, frame["value"], strict=True))

    assert keyed(turned) == pytest.approx(keyed(straight), abs=1e-12)


def test_it_reads_well_as_text_and_as_html():
    maps, regions = story()
    maps = maps.assign_coords(token=["cat", "<b>frog</b>"])
    regions = regions.assign_coords(entity=["cat", "<b>frog</b>"])
    attributes = maps.isel(token=[0]).assign_coords(token=["<i>green</i>"])
    bleeding = measure(maps, regions, attributes, {"<i>green</i>": "<b>frog</b>"})
    text = repr(bleeding)
    for wanted in (
        "means over 2 steps",
        "background",
        "0.900",
        "cat | <b>frog</b>",
        "<i>green</i> of <b>frog</b>",
    ):
        assert wanted in text
    html = bleeding._repr_html_()
    assert "<table" in html
    assert "<b>frog" not in html
    assert "<i>green" not in html


# --- wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: leakage([CAT, FROG], [CAT_REGION, CAT_REGION]), "3 cells belong to more than one region"),
        (lambda: leakage(CAT, CAT_REGION), "need"),
        (lambda: leakage([CAT], [CAT_REGION[:, :3]]), "resize"),
        (lambda: leakage([CAT], [CAT]), "boolean masks"),
        (lambda: leakage([CAT * np.nan], [CAT_REGION]), "NaN"),
        (lambda: truth_leakage([CAT], CAT_REGION), "need"),
        (lambda: truth_leakage([CAT], [CAT]), "boolean masks"),
        (lambda: truth_leakage(np.ones((2, 1, 2, 4)), np.zeros((3, 1, 2, 4), bool)), "leading dimensions"),
        (lambda: leakage([-CAT], [CAT_REGION]), "never negative"),
        (lambda: leakage(np.ones((2, 1, 2, 4)), np.zeros((3, 1, 2, 4), bool)), "leading dimensions"),
        (lambda: bleed([[0.5, 0.3, 0.2]]), "own="),
        (lambda: bleed([[0.5, 0.3, 0.2]], own=[2]), "indices from 0 to 1"),
        (lambda: bleed([0.5, 0.3]), "leakage matrix has shape"),
        (lambda: soft_overlap(CAT, CAT.T), "resize"),
        (lambda: mask_overlap(np.zeros((2, 1, 1), bool), np.zeros((3, 1, 1), bool)), "leading dimensions"),
        (lambda: divergence(3.0, CAT), "shape"),
        (lambda: binding([CAT], [CAT, FROG], owners=[0, 1]), "owners"),
        (lambda: binding(CAT, [CAT], owners=[0]), "need"),
    ],
)
def test_wrong_arrays_are_refused_with_a_reason(call, says):
    with pytest.raises(SettingError, match=says):
        call()


def test_parts_that_do_not_belong_together_are_refused():
    maps, regions = story()
    late = regions.assign_coords(step=[1, 2])
    attributes = maps.assign_coords(token=["black", "green"])
    owners = {"black": "cat", "green": "frog"}
    cases = [
        (lambda: measure(maps.values, regions), "DataArray"),
        (lambda: measure(maps, regions.values), "Regions"),
        (lambda: measure(maps, regions.isel(y=0)), "dimensions"),
        (lambda: measure(maps, late), "same steps"),
        (lambda: measure(maps, regions.assign_coords(entity=["cat", "dog"])), "same entities"),
        (lambda: measure(maps, regions.isel(x=slice(2))), "resize"),
        (lambda: measure(maps.isel(step=slice(0)), regions.isel(step=slice(0))), "no step"),
        (lambda: measure(maps, regions, attributes), "no owner"),
        (lambda: measure(maps, regions, attributes, {**owners, "green": "toad"}), r"\['toad'\]"),
        (lambda: measure(maps, regions, attributes.isel(step=[0]), owners), "same steps"),
        (lambda: measure(maps, regions, attributes.isel(x=slice(2)), owners), "one size"),
        (lambda: measure(maps, regions, start=maps.isel(token=0)), "take the mean"),
        (lambda: measure(maps, regions, end=xr.DataArray([0.5], dims="step")), "same steps"),
        (lambda: measure(maps.assign_coords(token=["cat", "background"]), regions), "rename"),
        (lambda: measure(maps, regions, truth=regions), "an image has no steps"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0, entity=[0])), "same entities"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0, x=slice(2))), "another shape"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0) * 0.5), "boolean"),
    ]
    for call, says in cases:
        with pytest.raises(SettingError, match=says):
            call()
