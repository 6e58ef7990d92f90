"""Resampling and the choice of a map size, compared with answers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch.nn import functional as F

from elakit.errors import SettingError
from elakit.measures.arrays import area_mean, as_array, nearest_size, resize

sides = st.integers(1, 7)


@given(arrays(float, st.tuples(sides, sides), elements=st.floats(0, 10)), st.tuples(sides, sides))
@settings(max_examples=60, deadline=None)
def test_area_mean_keeps_the_mean(values, size):
    assert area_mean(values, size).mean() == pytest.approx(values.mean(), abs=1e-9)


@pytest.mark.parametrize("size", [(4, 4), (6, 3), (12, 12)])
def test_area_mean_agrees_with_torch_where_boxes_are_whole(size):
    values = np.random.default_rng(0).random((2, 12, 12))
    expected = F.adaptive_avg_pool2d(torch.from_numpy(values), size).numpy()
    np.testing.assert_allclose(area_mean(values, size), expected)


def test_exactly_half_stays_half():
    assert area_mean(np.array([[1.0, 0.0, 1.0]]), (1, 2)).tolist() == [[2 / 3, 2 / 3]]
    assert area_mean(np.eye(14), (7, 7)).diagonal().tolist() == [0.5] * 7


def test_resize_shrinks_by_area_and_grows_bilinearly():
    values = np.random.default_rng(1).random((3, 12, 5))
    expected = F.interpolate(torch.from_numpy(values)[:, None], (12, 10), mode="bilinear")[:, 0].numpy()
    np.testing.assert_allclose(resize(values, (12, 10)), expected)
    np.testing.assert_allclose(resize(values, (6, 5)), area_mean(values, (6, 5)))


@pytest.mark.parametrize(
    ("sizes", "nearest"),
    [([8, 16, 32, 64], 16), ([12, 24, 48], 12), ([8, 32], 8), ([64], 64), ([20, 12], 20), ({24, 10}, 24)],
)
def test_the_size_nearest_to_16_is_chosen_by_ratio(sizes, nearest):
    assert nearest_size(sizes) == nearest
    with pytest.raises(SettingError, match="record"):
        nearest_size([])


def test_a_copy_is_returned():
    maps = xr.DataArray(np.ones((2, 2)), dims=("y", "x"))
    as_array(maps, "maps")[:] = 0
    assert maps.values.min() == 1


def test_text_is_not_an_array():
    with pytest.raises(SettingError, match="maps cannot be read as an array of numbers"):
        as_array("cat", "maps")
