"""Localization: one region per entity, disjoint, and close to the figure of the paper."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from elakit.errors import SettingError
from elakit.measures.masks import otsu_masks
from elakit.regions import BINARIZATIONS, DIFFERENTIATIONS, Regions, localize, localize_steps

RULES = [(d, b) for d in DIFFERENTIATIONS for b in BINARIZATIONS]

rules = st.sampled_from(RULES)
stacks = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5)).filter(lambda s: s[0] <= s[1] * s[2])
# Few distinct values, so that ties, zeros and constant maps are common.
coarse = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9])


@pytest.fixture(scope="module")
def benchmark():
    """benchmarks/localization.py, which reads the digitized figure and restores its raw scale."""
    path = Path(__file__).parents[1] / "benchmarks" / "localization.py"
    spec = importlib.util.spec_from_file_location("localization_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def figure(benchmark):
    return benchmark.load_figure()


# --- the paper's figure -------------------------------------------------------------------------------------


def test_default_reproduces_the_regions_of_the_papers_figure(figure):
    regions = localize(figure.maps, figure.sot, entities=["cat", "frog"])

    cat, frog = regions.iou(figure.masks)
    assert cat >= 0.79
    assert frog >= 0.90
    assert not (regions.masks[0] & regions.masks[1]).any()
    assert regions.floored == (False, False)


def test_regression_restores_the_raw_scale_of_the_figure(figure):
    np.testing.assert_allclose(figure.coefficients, [0.995, -0.312, -1.022], atol=0.0006)
    assert figure.r2 == pytest.approx(0.996, abs=0.0005)
    assert figure.masks.sum(axis=(1, 2)).tolist() == [25, 42]


def test_default_works_the_same_whatever_the_unit_of_attention(figure):
    # Probabilities of a real layer are this figure's in another unit: only the ratio to start-of-text counts.
    small = localize(figure.maps * 3e-4, figure.sot * 3e-4)
    np.testing.assert_array_equal(small.masks, localize(figure.maps, figure.sot).masks)


@pytest.mark.parametrize("keep", [1, 2])
def test_cleaning_small_components_only_removes_locations(figure, keep):
    plain = localize(figure.maps, figure.sot)
    clean = localize(figure.maps, figure.sot, keep_components=keep)
    assert not (clean.masks & ~plain.masks).any()


def test_benchmark_prints_every_rule(benchmark, capsys):
    benchmark.main()
    printed = capsys.readouterr().out
    assert "start-of-text = 0.995 -0.312 cat -1.022 frog" in printed
    rows = [line.split()[:2] for line in printed.splitlines() if line.startswith(DIFFERENTIATIONS)]
    assert rows == [list(rule) for rule in RULES]


# --- rules worked by hand -----------------------------------------------------------------------------------

A = np.array([[0.8, 0.4, 0.1, 0.0], [0.6, 0.5, 0.1, 0.0]])
B = np.array([[0.0, 0.3, 0.7, 0.1], [0.0, 0.5, 0.9, 0.1]])


def test_argmax_keeps_the_winner_of_a_cell_and_ties_go_to_the_first():
    scores = localize([A, B], binarization="otsu", differentiation="argmax").scores
    np.testing.assert_array_equal(scores[0], [[0.8, 0.4, 0, 0], [0.6, 0.5, 0, 0]])
    np.testing.assert_array_equal(scores[1], [[0, 0, 0.7, 0.1], [0, 0, 0.9, 0.1]])


def test_subtract_max_leaves_what_an_entity_has_more_than_its_strongest_rival():
    third = np.full((2, 4), 0.2)
    scores = localize([A, B, third], binarization="otsu", differentiation="subtract-max").scores
    np.testing.assert_allclose(scores[0], [[0.6, 0.1, 0, 0], [0.4, 0, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(scores[1], [[0, 0, 0.5, 0], [0, 0, 0.7, 0]], atol=1e-12)
    np.testing.assert_allclose(scores[2], [[0, 0, 0, 0.1], [0, 0, 0, 0.1]], atol=1e-12)


def test_subtract_mean_takes_the_mean_of_the_others():
    third = np.full((2, 4), 0.2)
    scores = localize([A, B, third], binarization="otsu", differentiation="subtract-mean").scores
    np.testing.assert_allclose(scores[0], [[0.7, 0.15, 0, 0], [0.5, 0.15, 0, 0]], atol=1e-12)


def test_background_rule_compares_each_cell_with_start_of_text():
    sot = np.array([[0.2, 0.4, 0.2, 1.0], [0.4, 1.1, 0.1, 1.0]])
    # Half of start-of-text: A passes at .8 > .1, .4 > .2, .6 > .2 but .5 < .55; B at .7 > .1, .9 > .05.
    regions = localize([A, B], sot, threshold=0.5, min_area=0)
    assert regions.masks.astype(int).tolist() == [[[1, 1, 0, 0], [1, 0, 0, 0]], [[0, 0, 1, 0], [0, 0, 1, 0]]]
    assert regions.background.astype(int).tolist() == [[0, 0, 0, 1], [0, 1, 0, 1]]


def test_mean_std_and_quantile_thresholds():
    row = np.array([[0.0, 1.0, 2.0, 3.0, 4.0]])  # mean 2, standard deviation 1.41; 60% quantile 2.4
    above_mean = localize([row], binarization="mean-std", min_area=0).masks[0, 0]
    assert above_mean.tolist() == [False] * 4 + [True]
    above_quantile = localize([row], binarization="quantile", quantile=0.6, min_area=0).masks[0, 0]
    assert above_quantile.tolist() == [False] * 3 + [True, True]


def test_normalizing_lets_entities_compete_by_shape():
    strong = np.array([[0.9, 0.6, 0.5, 0.5]])
    weak = np.array([[0.0, 0.0, 0.1, 0.4]])
    raw = localize([strong, weak], binarization="quantile", quantile=0.5, min_area=0)
    shape = localize([strong, weak], binarization="quantile", quantile=0.5, min_area=0, normalize=True)
    assert raw.masks[1].sum() == 0
    assert shape.masks[1].tolist() == [[False, False, True, True]]


def test_only_the_largest_component_is_kept_on_request():
    noisy = np.zeros((5, 6))
    noisy[1:4, 1:3] = 1.0
    noisy[4, 5] = 1.0
    noisy[0, 3] = 1.0  # touches the block at a corner
    mask = localize([noisy], binarization="otsu", keep_components=1).masks[0]
    assert mask.sum() == 7
    assert not mask[4, 5]


def test_smoothing_drops_a_lone_cell():
    spotted = np.zeros((9, 9))
    spotted[2:5, 2:5] = 0.9
    spotted[7, 7] = 0.95
    assert localize([spotted], binarization="otsu").masks[0, 7, 7]
    assert not localize([spotted], binarization="otsu", smooth=1.0).masks[0, 7, 7]


# --- neglected entities and degenerate maps -----------------------------------------------------------------


def test_a_neglected_entity_gets_the_free_locations_where_it_is_strongest():
    strong = np.array([[0.9, 0.9, 0.0, 0.0], [0.9, 0.9, 0.0, 0.0]])
    weak = np.array([[0.08, 0.08, 0.07, 0.01], [0.08, 0.08, 0.02, 0.03]])
    regions = localize([strong, weak], np.ones((2, 4)), min_area=2)
    assert regions.floored == (False, True)
    assert regions.masks[0].sum() == 4  # the strong one keeps its region
    assert regions.masks[1].astype(int).tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert "entity 1 2 locations (floor)" in repr(regions)


def test_a_neglected_entity_takes_from_the_large_when_nothing_is_free():
    strong = np.full((2, 3), 0.9)
    weak = np.array([[0.0, 0.3, 0.0], [0.0, 0.0, 0.2]])
    regions = localize([strong, weak], np.full((2, 3), 0.1), min_area=2)
    assert regions.masks[1].astype(int).tolist() == [[0, 1, 0], [0, 0, 1]]
    assert regions.masks[0].sum() == 4


def test_a_region_that_is_too_small_is_filled_up():
    one = np.array([[0.9, 0.05, 0.04, 0.06]])
    assert localize([one], np.ones((1, 4)), min_area=2).masks[0].tolist() == [[True, False, False, True]]


def test_default_floor_is_two_percent_of_the_map():
    for size, area in ((16, 5), (8, 1), (32, 20)):
        silent = localize(np.zeros((1, size, size)), np.ones((size, size)))
        assert silent.masks.sum() == area


def test_identical_maps_settle_every_tie_for_the_first():
    same = np.array([[0.5, 0.4, 0.0, 0.0]])
    regions = localize([same, same], np.ones((1, 4)))
    assert regions.masks.astype(int).tolist() == [[[1, 1, 0, 0]], [[0, 0, 1, 0]]]
    assert regions.floored == (False, True)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
@pytest.mark.parametrize(("differentiation", "binarization"), RULES)
def test_constant_maps_are_no_error(value, differentiation, binarization):
    regions = localize(
        np.full((2, 3, 4), value),
        np.ones((3, 4)),
        differentiation=differentiation,
        binarization=binarization,
        threshold=0.5,
        min_area=2,
    )
    # Nothing stands out: both come from the floor, in reading order, the first entity served first.
    assert regions.floored == (True, True)
    assert regions.masks.sum(axis=(1, 2)).tolist() == [2, 2]
    again = localize(np.full((2, 3, 4), value), np.ones((3, 4)), differentiation=differentiation,
                     binarization=binarization, threshold=0.5, min_area=2)  # fmt: skip
    np.testing.assert_array_equal(regions.masks, again.masks)


# --- properties ---------------------------------------------------------------------------------------------


@given(maps=stacks.flatmap(lambda s: arrays(float, s, elements=coarse)), rule=rules, normalize=st.booleans())
@settings(max_examples=200, deadline=None)
def test_regions_never_overlap_and_nobody_is_left_out(maps, rule, normalize):
    differentiation, binarization = rule
    regions = localize(
        maps,
        np.ones(maps.shape[1:]),
        differentiation=differentiation,
        binarization=binarization,
        normalize=normalize,
    )
    assert regions.masks.sum(axis=0).max() <= 1
    assert regions.masks.any(axis=(1, 2)).all()
    assert (regions.masks.sum(axis=0) + regions.background == 1).all()


@given(seed=st.integers(0, 10**6), rule=rules, order=st.permutations(range(3)), least=st.integers(0, 6))
@settings(max_examples=100, deadline=None)
def test_order_of_the_entities_does_not_matter(seed, rule, order, least):
    rng = np.random.default_rng(seed)
    maps = rng.random((3, 4, 5)) * rng.random((3, 1, 1))  # no ties
    options = {"differentiation": rule[0], "binarization": rule[1], "min_area": least, "threshold": 0.6}
    sot = rng.random((4, 5))
    straight = localize(maps, sot, **options)
    turned = localize(maps[list(order)], sot, **options)
    np.testing.assert_array_equal(turned.masks, straight.masks[list(order)])
    assert turned.floored == tuple(straight.floored[i] for i in order)


@given(seed=st.integers(0, 10**6), rule=rules, scale=st.floats(1e-6, 1e3))
@settings(max_examples=50, deadline=None)
def test_scale_of_attention_does_not_matter(seed, rule, scale):
    rng = np.random.default_rng(seed)
    maps, sot = rng.random((2, 4, 5)), rng.random((4, 5))
    options = {"differentiation": rule[0], "binarization": rule[1]}
    # A quantile may fall on a value itself, where rounding decides; a power of two does not round.
    scale = 2.0 ** round(np.log2(scale))
    np.testing.assert_array_equal(
        localize(maps * scale, sot * scale, **options).masks, localize(maps, sot, **options).masks
    )


@given(seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_iou_is_symmetric_and_between_0_and_1(seed):
    rng = np.random.default_rng(seed)
    one, two = (localize(rng.random((2, 4, 4)), binarization="mean-std", min_area=0) for _ in range(2))
    np.testing.assert_array_equal(one.iou(two), two.iou(one))
    assert ((one.iou(two) >= 0) & (one.iou(two) <= 1)).all()
    assert (one.iou(one) == 1).all()


# --- what may be passed in, what comes out ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_tensors_of_any_precision_with_gradient(figure, dtype):
    maps = torch.tensor(figure.maps, dtype=dtype, requires_grad=True)
    regions = localize(maps, torch.tensor(figure.sot, dtype=dtype))
    assert (regions.iou(figure.masks) > 0.75).all()
    assert isinstance(regions.masks, np.ndarray)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_a_gpu(figure):
    regions = localize(torch.tensor(figure.maps, device="cuda"), torch.tensor(figure.sot, device="cuda"))
    assert (regions.iou(figure.masks) > 0.75).all()


def test_maps_are_left_as_they_were():
    maps = np.random.default_rng(0).random((2, 3, 4))
    before = maps.copy()
    localize(maps, binarization="otsu", differentiation="none").scores[:] = 0
    np.testing.assert_array_equal(maps, before)


def test_named_dimensions_give_the_labels_and_may_come_in_any_order(figure):
    maps = xr.DataArray(figure.maps, dims=("token", "y", "x"), coords={"token": ["cat", "frog"]})
    regions = localize(maps.transpose("x", "y", "token"), figure.sot)
    assert regions.entities == ("cat", "frog")
    np.testing.assert_array_equal(regions.masks, localize(figure.maps, figure.sot).masks)
    named = regions.to_xarray()
    assert named.dims == ("entity", "y", "x")
    assert named.sel(entity="frog").sum() == regions.masks[1].sum()


def test_maps_need_not_be_square():
    wide = np.zeros((3, 4, 9))
    for entity in range(3):
        wide[entity, :, 3 * entity : 3 * entity + 2] = 0.4
    regions = localize(wide, np.full((4, 9), 0.5))
    assert regions.masks.sum(axis=(1, 2)).tolist() == [8, 8, 8]
    assert repr(regions).startswith("Regions(4x9: entity 0 8 locations")


def test_steps_are_localized_each_by_itself(figure):
    swapped = np.stack([figure.maps, figure.maps[:, :, ::-1]])
    maps = xr.DataArray(
        swapped,
        dims=("step", "token", "y", "x"),
        coords={
            "step": [3, 7],
            "timestep": ("step", [900, 700]),
            "token": ["cat", "frog"],
            "token_index": ("token", [2, 5]),
        },
    )
    sot = xr.DataArray(
        np.stack([figure.sot, figure.sot[:, ::-1]])[:, None],
        dims=("step", "token", "y", "x"),
        coords={"step": [3, 7], "token": ["<start>"]},
    )
    regions = localize_steps(maps, sot)
    assert regions.dims == ("step", "entity", "y", "x")
    assert regions.dtype == bool
    assert regions.timestep.values.tolist() == [900, 700]
    assert not regions.floored.any()
    expected = localize(figure.maps, figure.sot).masks
    np.testing.assert_array_equal(regions.sel(step=3), expected)
    np.testing.assert_array_equal(regions.sel(step=7), expected[:, :, ::-1])
    assert not localize_steps(maps, binarization="otsu", min_area=0).sel(step=3).equals(regions.sel(step=3))


def test_otsu_masks_of_separate_maps_may_overlap():
    masks = otsu_masks(np.stack([A, A]))
    assert (masks[0] & masks[1]).any()
    assert not otsu_masks(np.full((1, 3, 3), 0.1)).any()


# --- wrong input --------------------------------------------------------------------------------------------

GOOD = np.ones((2, 3, 4))


@pytest.mark.parametrize(
    ("maps", "sot", "options", "says"),
    [
        (GOOD, None, {}, 'pass this map as sot=..., or choose another rule, such as binarization="otsu"'),
        (GOOD, np.ones((4, 3)), {}, r"sot has shape \(4, 3\)"),
        (GOOD[0], None, {"binarization": "otsu"}, r"shape \(3, 4\).*\(entity, y, x\)"),
        (3.0, None, {"binarization": "otsu"}, r"\(entity, y, x\)"),
        (np.ones((0, 3, 4)), None, {"binarization": "otsu"}, "not empty"),
        (GOOD * np.nan, GOOD[0], {}, "24 of 24 values are NaN"),
        (GOOD, GOOD[0] * np.inf, {}, "sot: 12 of 12 values are NaN or infinite"),
        (-GOOD, GOOD[0], {}, "the lowest value is -1"),
        ([["a", "b"]], None, {"binarization": "otsu"}, "cannot be read"),
        (
            GOOD,
            GOOD[0],
            {"differentiation": "max"},
            "differentiation='max': must be one of 'argmax', 'subtract-max'",
        ),
        (GOOD, GOOD[0], {"binarization": "li"}, "binarization='li': must be one of 'background', 'otsu'"),
        (GOOD, GOOD[0], {"threshold": -0.1}, "threshold=-0.1"),
        (GOOD, GOOD[0], {"threshold": float("nan")}, "threshold=nan"),
        (GOOD, GOOD[0], {"threshold": "high"}, "threshold='high'"),
        (GOOD, GOOD[0], {"quantile": 1.5}, "quantile=1.5"),
        (GOOD, GOOD[0], {"smooth": -1}, "smooth=-1"),
        (GOOD, GOOD[0], {"min_area": -1}, "min_area=-1"),
        (GOOD, GOOD[0], {"min_area": 2.5}, "min_area=2.5"),
        (GOOD, GOOD[0], {"min_area": 7}, "Give at most 6"),
        (np.ones((5, 2, 2)), np.ones((2, 2)), {}, "5 entities"),
        (GOOD, GOOD[0], {"keep_components": 0}, "keep_components=0"),
        (GOOD, GOOD[0], {"entities": ["cat"]}, "entities has 1 entry for 2 maps"),
        (GOOD, GOOD[0], {"entities": ["cat", "cat"]}, "'cat' occurs more than once"),
        (GOOD, GOOD[0], {"entities": "cat"}, r"such as \['cat'\]"),
    ],
)
def test_wrong_input_names_the_value_and_the_remedy(maps, sot, options, says):
    with pytest.raises(SettingError, match=says):
        localize(maps, sot, **options)


def test_regions_drawn_by_hand_must_not_overlap():
    masks = np.zeros((2, 2, 2), bool)
    masks[:, 0, 0] = True
    with pytest.raises(SettingError, match="1 location belongs to more than one region"):
        Regions(masks, masks.astype(float), (False, False), ("cat", "frog"))
    with pytest.raises(SettingError, match="booleans"):
        Regions(masks.astype(float), masks.astype(float), (False, False), ("cat", "frog"))


def test_regions_of_other_entities_or_sizes_are_not_compared(figure):
    cat_frog = localize(figure.maps, figure.sot, entities=["cat", "frog"])
    with pytest.raises(SettingError, match="Compare"):
        cat_frog.iou(localize(figure.maps, figure.sot, entities=["cat", "dog"]))
    with pytest.raises(SettingError, match="same size"):
        cat_frog.iou(np.ones((2, 8, 8), bool))


def test_steps_that_do_not_belong_together_are_refused():
    maps = xr.DataArray(np.ones((2, 1, 3, 4)), dims=("step", "token", "y", "x"), coords={"token": ["cat"]})
    with pytest.raises(SettingError, match=r"\(step, token, y, x\)"):
        localize_steps(maps.values, binarization="otsu")
    with pytest.raises(SettingError, match="steps"):
        localize_steps(maps, xr.DataArray(np.ones((3, 3, 4)), dims=("step", "y", "x")))
    with pytest.raises(SettingError, match="dimensions"):
        localize_steps(maps.isel(step=0), binarization="otsu")
    with pytest.raises(SettingError, match="no complete step"):
        localize_steps(maps.isel(step=slice(0, 0)), binarization="otsu")


def test_attention_that_a_word_gets_everywhere_says_nothing_of_its_place():
    """A cat with a pedestal of .2 outshines the frog in the frog's place until the pedestal is taken off."""
    cat, frog, sot = [[0.5, 0.2, 0.2]], [[0.0, 0.15, 0.0]], [[0.5, 0.65, 0.8]]
    raw = localize([cat, frog], sot, min_area=0)
    assert raw.masks.astype(int).tolist() == [[[1, 1, 1]], [[0, 0, 0]]]
    level = localize([cat, frog], sot, min_area=0, subtract_pedestal=True)
    assert level.masks.astype(int).tolist() == [[[1, 0, 0]], [[0, 1, 0]]]


def test_more_entities_than_locations_cannot_have_regions_whatever_the_smallest_area() -> None:
    maps = np.full((3, 1, 2), 0.5)
    for least in (None, 1):
        with pytest.raises(SettingError, match="3 entities cannot have disjoint regions on a map of 2 locations"):
            localize(maps, np.full((1, 2), 0.1), min_area=least)
