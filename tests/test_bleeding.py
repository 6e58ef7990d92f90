"""The table of bleeding measures of a run, compared with answers worked out by hand."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from worked_example import CAT, CAT_REGION, FROG, FROG_REGION, MATRIX

from elakit.bleeding import measure
from elakit.errors import SettingError
from elakit.regions import localize, localize_steps


def two_steps():
    """Two steps: the first as worked out by hand, in the second each entity lies in its own region."""
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
    bleeding = measure(*two_steps())
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


def test_attention_is_compared_with_the_image():
    maps, regions = two_steps()
    # Masks at twice the maps' size: the cat is where its region is, the frog is missing.
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
        assert overall[overall["measure"] == name]["value"].mean() == 1  # absent entities are left out of the mean
    assert value(frame, step=0, measure="truth_leakage", entity="frog", other="cat") == pytest.approx(0.1)
    assert value(frame, step=0, measure="truth_leakage", entity="frog", other="frog") == 0
    assert value(overall, measure="truth_leakage", entity="frog", other="background") == pytest.approx(0.95)
    assert value(frame, step=0, measure="attribute_truth_leakage", entity="green", other="cat") == pytest.approx(0.1)
    assert bleeding.truth_leakage.timestep.values.tolist() == [981, 701]
    np.testing.assert_allclose(bleeding.truth_leakage.sel(step=0), [[0.8, 0, 0.2], [0.1, 0, 0.9]])
    assert bleeding.attribute_truth_leakage.owner.values.tolist() == ["cat", "frog"]

    text = repr(bleeding)
    assert "Agreement of attention with the image" in text
    assert re.search(r"frog +– +– +– +0.050 +0.000 +0.950", text)
    assert "–" in bleeding._repr_html_()
    # Measures that do not involve the image are unchanged.
    plain = measure(maps, regions, attributes, {"black": "cat", "green": "frog"})
    assert "image" not in repr(plain)
    pd.testing.assert_frame_equal(
        frame[~frame["measure"].str.contains("truth|pointing")].reset_index(drop=True), plain.to_frame()
    )


def test_changing_the_returned_frame_does_not_change_the_measures():
    bleeding = measure(*two_steps())
    frame = bleeding.to_frame()
    frame["value"] = 0
    assert (bleeding.to_frame()["value"] != 0).any()


def test_attributes_are_measured_in_the_regions_of_the_entities():
    maps, regions = two_steps()
    # Black attends to the cat, green to the frog.
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


def test_regions_without_steps_apply_to_every_step():
    maps, regions = two_steps()
    fixed = regions.isel(step=0, drop=True)
    for given_regions in (fixed, fixed.isel(entity=[1, 0]), fixed.transpose("x", "entity", "y")):
        xr.testing.assert_equal(measure(maps, given_regions).leakage, measure(maps, regions).leakage)
    found = localize(maps.isel(step=1), binarization="otsu")
    assert float(measure(maps, found).leakage.sel(step=5, entity="frog", region="frog")) == 1


def test_localized_regions_are_accepted_as_they_are():
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
    maps, regions = two_steps()
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


def test_text_and_html_representations():
    maps, regions = two_steps()
    maps = maps.assign_coords(token=["cat", "<b>frog</b>"])
    regions = regions.assign_coords(entity=["cat", "<b>frog</b>"])
    attributes = maps.isel(token=[0]).assign_coords(token=["<i>green</i>"])
    bleeding = measure(maps, regions, attributes, {"<i>green</i>": "<b>frog</b>"})
    text = repr(bleeding)
    for wanted in (
        "mean over 2 steps",
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


def test_an_entity_called_background_is_kept_apart_from_the_rest_of_the_image():
    maps, regions = two_steps()
    names = ["cat", "background"]
    bleeding = measure(maps.assign_coords(token=names), regions.assign_coords(entity=names))
    assert bleeding.leakage.region.values.tolist() == ["cat", "background", "rest of the image"]
    np.testing.assert_allclose(bleeding.leakage.sel(step=0), MATRIX)


# --- wrong input --------------------------------------------------------------------------------------------


def test_arguments_that_do_not_match_are_refused():
    maps, regions = two_steps()
    late = regions.assign_coords(step=[1, 2])
    attributes = maps.assign_coords(token=["black", "green"])
    owners = {"black": "cat", "green": "frog"}
    cases = [
        (lambda: measure(maps.values, regions), "DataArray"),
        (lambda: measure(maps, regions.values), "Regions"),
        (lambda: measure(maps, regions.isel(y=0)), "dimensions"),
        (lambda: measure(maps, late), "same steps"),
        (lambda: measure(maps, regions.assign_coords(entity=["cat", "dog"])), "region for each entity"),
        (lambda: measure(maps, regions.isel(x=slice(2))), "Resize"),
        (lambda: measure(maps.isel(step=slice(0)), regions.isel(step=slice(0))), "no complete step"),
        (lambda: measure(maps, regions, attributes), "owners has no entity for 'black', 'green'"),
        (lambda: measure(maps, regions, attributes, {**owners, "green": "toad"}), "owners contains 'toad'"),
        (lambda: measure(maps, regions, attributes.isel(step=[0]), owners), "same steps"),
        (lambda: measure(maps, regions, attributes.isel(x=slice(2)), owners), "one size"),
        (lambda: measure(maps, regions, start=maps.isel(token=0)), "take the mean"),
        (lambda: measure(maps, regions, end=0.5), "end has type float.*one value per step"),
        (lambda: measure(maps, regions, end=xr.DataArray([0.5], dims="step")), "same steps"),
        (lambda: measure(maps, regions, truth=regions), "without steps"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0, entity=[0])), "mask for each entity"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0, x=slice(2))), "aspect ratios differ"),
        (lambda: measure(maps, regions, truth=regions.isel(step=0) * 0.5), "boolean"),
    ]
    for call, message in cases:
        with pytest.raises(SettingError, match=message):
            call()
