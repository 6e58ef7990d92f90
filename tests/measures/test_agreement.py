"""Attention against the finished image: measures with answers worked out by hand, in a run and in a figure."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import tiny_pipeline

from elakit import plot
from elakit.bleeding import truth_masks
from elakit.diagnosis.report import MEANINGS
from elakit.errors import RecordingError, SettingError
from elakit.generation import Run, generate
from elakit.judge import Verdict
from elakit.measures.agreement import agreement_iou, auc, pointing_game
from elakit.measures.masks import coverage, downscale, otsu_masks
from elakit.regions import localize

PAIR = "a [red car] and a [blue bird]"
STEPS = 4
MEASURES = (agreement_iou, auc, pointing_game)

shapes = st.tuples(st.integers(1, 5), st.integers(1, 5))


@st.composite
def map_and_mask(draw):
    """A map with many ties, and a mask of its size."""
    shape = draw(shapes)
    return draw(arrays(float, shape, elements=st.integers(0, 6))), draw(arrays(bool, shape))


# --- masks at the size of the maps --------------------------------------------------------------------------


def test_cells_that_are_mostly_covered_are_kept():
    mask = np.zeros((4, 8), bool)
    mask[:2, :3] = True  # fills the first of four cells of 2 x 2 and half of the second
    mask[2:, 5:] = True  # half of the third below, all of the fourth
    np.testing.assert_array_equal(coverage(mask, (2, 4)), [[1, 0.5, 0, 0], [0, 0, 0.5, 1]])
    np.testing.assert_array_equal(downscale(mask, (2, 4)), [[1, 0, 0, 0], [0, 0, 0, 1]])


def test_cells_need_not_divide_the_image():
    # Cells of 1.5 pixels each way: every one has a quarter of the middle pixel, of its own 2.25.
    center = np.zeros((3, 3), bool)
    center[1, 1] = True
    np.testing.assert_allclose(coverage(center, (2, 2)), np.full((2, 2), 1 / 9))
    np.testing.assert_array_equal(downscale(center, (2, 2)), [[1, 0], [0, 0]])  # first of equals
    # Five pixels in two cells; the third is cut in half: 2.5 of 2.5 and 0.5 of 2.5.
    np.testing.assert_allclose(coverage([[1, 1, 1, 0, 0]], (1, 2)), [[1, 0.2]])


def test_a_thing_too_small_for_a_cell_does_not_vanish():
    glasses = np.zeros((3, 64, 64), bool)
    glasses[0, 29, 21] = True
    glasses[1, 0, 3:6] = True  # one pixel in the first cell, two in the second
    small = downscale(glasses, (16, 16))
    assert np.argwhere(small).tolist() == [[0, 7, 5], [1, 0, 1]]  # the third, absent, stays absent


@given(arrays(bool, shapes), shapes)
@settings(max_examples=60, deadline=None)
def test_area_is_kept_and_only_nothing_becomes_nothing(mask, size):
    covered = coverage(mask, size)
    assert covered.mean() == pytest.approx(mask.mean())
    assert covered.min() >= 0
    assert covered.max() <= 1
    assert downscale(mask, size).any() == mask.any()


@given(arrays(bool, shapes), st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_enlarged_masks_come_back_as_they_were(mask, down, across):
    large = np.kron(mask, np.ones((down, across), bool))
    np.testing.assert_array_equal(downscale(large, mask.shape), mask)


# --- measures -----------------------------------------------------------------------------------------------

# The car has six cells. Attention stands out in four cells, three of them on the car.
CAR = np.array([[0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0]], bool)
MAP = np.array([[8.0, 9.0, 8.0, 0.0], [1.0, 8.0, 1.0, 0.0], [1.0, 0.0, 0.0, 1.0]])


def test_agreement_worked_by_hand():
    assert agreement_iou(MAP, CAR) == pytest.approx(3 / 7)  # 3 of both, 4 + 6 - 3 of either
    # On the car 9 8 8 1 0 0, beside it 8 1 1 1 0 0: of 36 pairs 9 wins 6; each 8 wins 5 and ties one; 1 wins 2 and
    # ties 3; each 0 ties 2: (6 + 11 + 3.5 + 2) of 36.
    assert auc(MAP, CAR) == pytest.approx(22.5 / 36)
    assert pointing_game(MAP, CAR) == 1
    assert pointing_game(MAP, ~CAR) == 0


def test_peaks_that_tie_share_the_point():
    values = [[5.0, 5.0, 1.0, 5.0]]
    assert pointing_game(values, [[1, 0, 1, 0]]) == pytest.approx(1 / 3)
    assert pointing_game(np.zeros((1, 4)), [[1, 0, 1, 0]]) == 0.5


def test_a_map_that_says_nothing_scores_as_chance():
    flat = np.full((3, 4), 0.2)
    assert auc(flat, CAR) == 0.5
    assert agreement_iou(flat, CAR) == 0


def test_what_is_not_in_the_image_cannot_be_agreed_with():
    for measure in MEASURES:
        assert np.isnan(measure(MAP, CAR & False))
    full = CAR | True
    assert np.isnan(auc(MAP, full))  # nothing beside it to compare with
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
        (MAP, CAR.T, "differ; resize"),
        (MAP * np.nan, CAR, "NaN"),
        (-MAP, CAR, "never negative"),
        (MAP, MAP, "boolean masks"),
        (MAP[0], CAR, "shape must be"),
        (np.stack([MAP] * 2), np.stack([CAR] * 3), "leading dimensions"),
    ],
)
def test_wrong_arrays_are_refused_with_a_reason(measure, maps, masks, says):
    with pytest.raises(SettingError, match=says):
        measure(maps, masks)


@pytest.mark.parametrize("size", [(0, 4), (4,), (2.5, 2)])
def test_a_size_that_is_none_is_refused(size):
    with pytest.raises(SettingError, match="rows and columns"):
        downscale(CAR, size)
    with pytest.raises(SettingError, match="at least one pixel"):
        downscale(np.zeros((2, 0, 4), bool), (2, 2))


# --- truth that fits the maps -------------------------------------------------------------------------------


def seen(masks: Any, labels: tuple[str, ...] = ("car", "bird")) -> xr.DataArray:
    return xr.DataArray(np.asarray(masks, bool), dims=("entity", "y", "x"), coords={"entity": list(labels)})


def test_truth_comes_in_the_order_of_the_maps():
    truth = seen([CAR, ~CAR], ("bird", "car"))
    verdict = Verdict(("bird", "car"), {}, {}, {}, truth.values)
    for given_truth in (truth, truth.transpose("x", "entity", "y"), verdict):
        np.testing.assert_array_equal(truth_masks(given_truth, ["car", "bird"], (3, 4)), [~CAR, CAR])


def test_truth_has_the_shape_of_the_image():
    wide = seen(np.ones((2, 512, 768)))
    assert truth_masks(wide, ["car", "bird"], (16, 24)).shape == (2, 512, 768)
    # 520 pixels are 65 latent cells, halved twice and rounded up: 17.
    truth_masks(seen(np.ones((2, 520, 512))), ["car", "bird"], (17, 16))
    with pytest.raises(SettingError, match=r"512 x 768 pixels .* 24 x 16 locations"):
        truth_masks(wide, ["car", "bird"], (24, 16))


@pytest.mark.parametrize(
    ("truth", "says"),
    [
        (np.stack([CAR, CAR]), "give a Verdict, or masks as"),
        (seen([CAR, CAR], ("car", "dog")), r"truth has the entities \['car', 'dog'\], maps \['car', 'bird'\]"),
        (seen([CAR], ("car",)), "same entities"),
        (seen([CAR, CAR]).expand_dims(step=2), "an image has no steps"),
        (seen([CAR, CAR]) * 0.3, "boolean"),
        (localize(np.random.default_rng(0).random((2, 3, 4)), binarization="otsu"), "'entity 0'"),
    ],
)
def test_truth_that_does_not_fit_is_refused(truth, says):
    with pytest.raises(SettingError, match=says):
        truth_masks(truth, ["car", "bird"], (3, 4))


# --- a run --------------------------------------------------------------------------------------------------


def draw(text: str = PAIR, **options: Any) -> Run:
    return generate(tiny_pipeline(length=60), text, steps=STEPS, guidance_scale=3, progress=False, **options)


def corner(run: Run, labels: tuple[str, ...] = ("car", "bird")) -> xr.DataArray:
    """The first entity in the upper left quarter of the image, the others missing."""
    masks = np.zeros((len(labels), run.image.height, run.image.width), bool)
    masks[0, : run.image.height // 2, : run.image.width // 2] = True
    return seen(masks, labels)


@pytest.fixture(scope="module")
def run() -> Run:
    return draw()


def embedded(monkeypatch: pytest.MonkeyPatch, text: str = PAIR) -> tuple[Run, list[str]]:
    """A run as if the embedded model had drawn it, and the prompts its image is judged by from now on."""
    drawn, judged = draw(text), []
    drawn.settings["model"] = "picture-world"

    def judge(image: Any, prompt: Any) -> Verdict:
        assert image is drawn.image
        judged.append(prompt.text)
        labels = tuple(entity.label for entity in prompt.entities)
        return Verdict(labels, {}, {}, {}, corner(drawn, labels).values)

    # By the module's name: elakit.generate is the function.
    monkeypatch.setattr(importlib.import_module("elakit.generation"), "judge", judge)
    return drawn, judged


def test_images_of_the_embedded_model_are_judged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, judged = embedded(monkeypatch)
    assert run.bleeding.truth_leakage is not None
    assert run.verdict is run.verdict
    assert judged == ["a red car and a blue bird"]
    frame = run.bleeding.to_frame()
    for step in range(STEPS):
        car = run.entity_maps().sel(step=step, token="car").values  # 8 x 8 cells of 4 x 4 pixels
        at_home = car[:4, :4].sum() / car.sum()
        assert float(run.bleeding.truth_leakage.sel(step=step, entity="car", region="car")) == pytest.approx(at_home)
        hit = frame.query("step == @step and measure == 'pointing' and entity == 'car'")["value"].item()
        assert hit == (np.argwhere(car == car.max()) < 4).all()
    assert frame.query("measure in ['truth_iou', 'truth_auc', 'pointing'] and entity == 'bird'")["value"].isna().all()
    assert set(frame["measure"]) <= set(MEANINGS)


def test_what_the_judge_does_not_know_is_not_judged(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.verdict is None  # not the embedded model's
    assert run.bleeding.truth_leakage is None
    assert not any("truth" in name or name == "pointing" for name in run.bleeding.to_frame()["measure"])
    giraffe, judged = embedded(monkeypatch, "a [red car] and a [blue giraffe]")
    assert giraffe.verdict is None
    assert "pointing" not in set(giraffe.bleeding.to_frame()["measure"])
    assert not judged


def test_your_own_word_counts_instead_of_the_judges(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for each in (run, embedded(monkeypatch)[0]):
        everywhere = seen(np.ones((2, 32, 32)))
        shared = each.measure(everywhere).truth_leakage
        np.testing.assert_allclose(shared, np.broadcast_to([0.5, 0.5, 0], shared.shape))
        assert each.measure().truth_leakage is None
        assert each.measure(everywhere).leakage.equals(each.bleeding.leakage)
    with pytest.raises(SettingError, match="same entities"):
        run.measure(corner(run, ("car", "dog")))
    with pytest.raises(RecordingError, match="record=True"):
        draw(record=False).measure(everywhere)


# --- the figure ---------------------------------------------------------------------------------------------


def traces(figure: Any, key: str) -> list[Any]:
    return [trace for trace in figure.data if trace.meta and key in trace.meta]


def test_curves_and_maps_are_the_runs(run: Run) -> None:
    truth = corner(run)
    figure = plot.agreement(run, truth, steps=[0, -1])
    frame = run.measure(truth).to_frame()
    curves = traces(figure, "measure")
    assert len(curves) == 3 * 2
    for curve in curves:
        part = frame[(frame["measure"] == curve.meta["measure"]) & (frame["entity"] == curve.meta["entity"])]
        np.testing.assert_array_equal(curve.x, range(STEPS))
        np.testing.assert_array_equal(curve.y, part["value"])
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [(t.meta["entity"], t.meta["step"]) for t in maps] == [("car", 0), ("car", 3), ("bird", 0), ("bird", 3)]
    for trace, peak in zip(maps, traces(figure, "peak"), strict=True):
        values = run.entity_maps().sel(step=trace.meta["step"], token=trace.meta["entity"]).values
        np.testing.assert_array_equal(trace.z, values)
        assert values[peak.y[0], peak.x[0]] == values.max()
    assert len(figure.layout.images) == 2 * 3
    # Images fill the panels, whose axes count the map's cells.
    assert {(image.sizex, image.sizey) for image in figure.layout.images} == {(8, 8)}
    said = [note.text for note in figure.layout.annotations]
    row = frame.query("step == 3 and entity == 'car'").set_index("measure")["value"]
    assert f"IoU {row['truth_iou']:.2f}, AUC {row['truth_auc']:.2f}" in said
    assert "25% of the image" in said
    assert "not in the image" in said
    assert not any("nan" in text for text in said)


@pytest.mark.parametrize("factor", [1, 4, 40])
def test_outlines_lie_where_the_truth_does(run: Run, factor: int) -> None:
    mask = np.zeros((2, 8, 8), bool)
    mask[0, 2:4, 5:8] = True  # reaches the right edge of the image
    truth = seen(mask.repeat(factor, 1).repeat(factor, 2))
    outlines = traces(plot.agreement(run, truth, steps=1), "outline")
    car = [trace for trace in outlines if trace.meta["outline"] == "car"]
    assert len(car) == 2 * 2  # image and map, white below black
    for trace in car:
        ends = (min(trace.x), max(trace.x), min(trace.y), max(trace.y))
        assert ends == pytest.approx((4.5, 7.5, 1.5, 3.5), abs=0.3 / min(factor, 16))  # lines are simplified a little
    assert all(list(trace.x) == [None] for trace in outlines if trace.meta["outline"] == "bird")


def test_the_edge_of_the_map_is_otsus(run: Run) -> None:
    values = run.entity_maps().sel(step=STEPS - 1, token="car").values
    edge = traces(plot.agreement(run, corner(run), steps=1), "otsu")[0]
    cut = np.pad(otsu_masks(values), 1)
    length = (cut[1:] != cut[:-1]).sum() + (cut[:, 1:] != cut[:, :-1]).sum()
    assert len(edge.x) == 3 * length
    sides = zip(zip(edge.x[::3], edge.y[::3], strict=True), zip(edge.x[1::3], edge.y[1::3], strict=True), strict=True)
    for (x0, y0), (x1, y1) in sides:
        assert abs(x1 - x0) + abs(y1 - y0) == 1
        middle = np.array([(y0 + y1) / 2, (x0 + x1) / 2]) + 1  # in the padded map
        across = np.array([0.5, 0]) if y0 == y1 else np.array([0, 0.5])
        one, other = (cut[tuple((middle + way * across).round().astype(int))] for way in (-1, 1))
        assert one != other


def test_the_judge_draws_the_outlines_by_itself(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    judged, _ = embedded(monkeypatch)
    own, given_truth = plot.agreement(judged), plot.agreement(judged, corner(judged))
    assert own.to_json() == given_truth.to_json()
    with pytest.raises(SettingError, match="Give truth"):
        plot.agreement(run)


def test_words_are_never_read_as_markup_and_many_fit_a_page() -> None:
    evil = draw("a [<script>alert(1)</script> $5$ %{z} <i>] and a [bird]")
    labels = tuple(str(label) for label in evil.entity_maps().token.values)
    figure = plot.agreement(evil, corner(evil, labels))
    ours = re.compile(r"</?b>|<br>|<span style='color:#\w{6}'>|</span>|<extra></extra>")
    drawn = [note.text for note in figure.layout.annotations]
    drawn += [text for trace in figure.data for text in (trace.name, trace.hovertemplate) if text]
    for text in drawn:
        assert "<" not in ours.sub("", text), text
        assert not set(re.findall(r"%{(\w+)", text)) - {"x", "y", "z"}
    many = draw("a [car], a [bird], a [dog], a [cat] and a [frog]")
    for steps in (1, STEPS):
        assert (
            plot.agreement(many, corner(many, ("car", "bird", "dog", "cat", "frog")), steps=steps).layout.width < 1060
        )
