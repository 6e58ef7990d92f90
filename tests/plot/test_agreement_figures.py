"""The figure of agreement shows the maps, masks and measures of its run."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from judged_run import STEPS, corner, embedded, generated_run, seen

from elakit import plot
from elakit.errors import SettingError
from elakit.measures.masks import otsu_masks
from elakit.plot import style
from elakit.run import Run


@pytest.fixture(scope="module")
def run() -> Run:
    return generated_run()


# --- the figure ---------------------------------------------------------------------------------------------


def traces(figure: Any, key: str) -> list[Any]:
    return [trace for trace in figure.data if trace.meta and key in trace.meta]


def test_curves_and_maps_show_the_values_of_the_run(run: Run) -> None:
    truth = corner(run)
    figure = plot.agreement(run, truth, steps=[0, -1])
    frame = run.measure(truth).to_frame()
    curves = traces(figure, "measure")
    assert len(curves) == 3 * 2
    for curve in curves:
        part = frame[(frame["measure"] == curve.meta["measure"]) & (frame["entity"] == curve.meta["entity"])]
        np.testing.assert_array_equal(curve.x, range(1, STEPS + 1))
        np.testing.assert_array_equal(curve.y, part["value"])
    maps = [trace for trace in figure.data if trace.type == "heatmap"]
    assert [(t.meta["entity"], t.meta["step"]) for t in maps] == [("car", 0), ("car", 3), ("bird", 0), ("bird", 3)]
    for trace, peak in zip(maps, traces(figure, "peak"), strict=True):
        values = run.entity_maps().sel(step=trace.meta["step"], token=trace.meta["entity"]).values
        np.testing.assert_array_equal(trace.z, values)
        assert values[peak.y[0], peak.x[0]] == values.max()
    assert len(figure.layout.images) == 2 * 3
    # Images fill the panels, whose axes count the map's locations.
    assert {(image.sizex, image.sizey) for image in figure.layout.images} == {(8, 8)}
    said = [note.text for note in figure.layout.annotations]
    row = frame.query("step == 3 and entity == 'car'").set_index("measure")["value"]
    assert f"IoU {row['truth_iou']:.2f}, AUC {row['truth_auc']:.2f}" in said
    assert "25% of the image" in said
    assert "not in the image" in said
    assert not any("nan" in text for text in said)


@pytest.mark.parametrize("factor", [1, 4, 40])
def test_outlines_follow_the_masks(run: Run, factor: int) -> None:
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


def test_the_edge_of_a_map_is_its_otsu_mask(run: Run) -> None:
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


def test_the_masks_of_the_judge_are_the_default(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    judged, _ = embedded(monkeypatch)
    own, given_truth = plot.agreement(judged), plot.agreement(judged, corner(judged))
    assert own.to_json() == given_truth.to_json()
    with pytest.raises(SettingError, match="Pass truth"):
        plot.agreement(run)


def test_words_are_escaped_and_many_entities_fit_the_page() -> None:
    evil = generated_run("a [<script>alert(1)</script> $5$ %{z} <i>] and a [bird]")
    labels = tuple(str(label) for label in evil.entity_maps().token.values)
    figure = plot.agreement(evil, corner(evil, labels))
    ours = re.compile(r"</?b>|<br>|<span style='color:#\w{6}'>|</span>|<extra></extra>")
    drawn = [note.text for note in figure.layout.annotations]
    drawn += [text for trace in figure.data for text in (trace.name, trace.hovertemplate) if text]
    for text in drawn:
        assert "<" not in ours.sub("", text), text
        assert not set(re.findall(r"%{(\w+)", text)) - {"x", "y", "z"}
    many = generated_run("a [car], a [bird], a [dog], a [cat] and a [frog]")
    for steps in (1, STEPS):
        assert (
            plot.agreement(many, corner(many, ("car", "bird", "dog", "cat", "frog")), steps=steps).layout.width
            <= style.WIDTH
        )
