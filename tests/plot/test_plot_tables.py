"""Figures of tables, and animations, show the values that they are given."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_pipeline

from elakit import plot, sweep
from elakit.errors import SettingError
from elakit.generation import generate
from elakit.plot import style
from elakit.plot.style import ENTITY_COLORS, RUN_COLORS
from elakit.run import Run

STEPS = 4


@pytest.fixture(scope="module")
def run() -> Run:
    return generate(tiny_pipeline(), "a [red car] and a [blue bird]", steps=STEPS, guidance_scale=3, progress=False)


# --- by layer and head --------------------------------------------------------------------------------------


def profile() -> pd.DataFrame:
    """Two layers of two and of one head, two steps, two entities: bleed is easy to average by hand."""
    rows = [
        # layer, place, order, head, step, entity, value
        ("up_blocks.1.attentions.0.attn2", "up", 1, 0, 0, "car", 0.9),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 0, 0, "car", 0.1),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 0, 0, "bird", 0.3),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 0, 1, "car", 0.2),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 0, 1, "bird", 0.6),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 1, 0, "car", 0.5),
        ("down_blocks.0.attentions.0.attn2", "down", 0, 1, 1, "car", 0.7),
    ]
    frame = pd.DataFrame(rows, columns=["layer", "place", "order", "head", "step", "entity", "value"])
    return pd.concat([frame.assign(measure="bleed"), frame.assign(measure="spill", value=0.0)], ignore_index=True)


def test_a_cell_is_the_mean_of_its_head_over_steps_and_entities() -> None:
    figure = plot.bleeding_by_layer(profile())
    matrix, mean = figure.data
    np.testing.assert_allclose(matrix.z, [[0.3, 0.6], [0.9, np.nan]])
    np.testing.assert_allclose(mean.z, [[0.4], [0.9]])  # of all six values: 2.4 / 6
    assert list(figure.layout.yaxis.ticktext) == ["encoder", "decoder"]
    low, high = figure.layout.yaxis.range
    assert low > high  # the first layer is on top
    assert (matrix.zmin, matrix.zmax) == pytest.approx((0.3, 0.9))
    printed = [note.text for note in figure.layout.annotations if note.text[:2] == "0."]
    assert printed == ["0.30", "0.60", "0.90", "0.40", "0.90"]  # a head that is not there prints nothing


def test_or_of_its_step_over_heads_and_entities() -> None:
    figure = plot.bleeding_by_layer(profile(), across="step")
    np.testing.assert_allclose(figure.data[0].z, [[0.3, 0.5], [0.9, np.nan]])
    assert figure.layout.xaxis.title.text == "step"
    alone = profile()
    alone["head"] = "mean"
    np.testing.assert_allclose(plot.bleeding_by_layer(alone).data[0].z, figure.data[0].z)


def test_layers_are_told_apart_by_the_numbers_in_which_they_differ() -> None:
    names = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "mid_block.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    ]
    table = pd.DataFrame({"layer": names, "head": "mean", "step": 0, "measure": "bleed", "value": 0.5})
    figure = plot.bleeding_by_layer(table)
    assert list(figure.layout.yaxis.ticktext) == ["encoder 0", "encoder 1", "middle", "decoder 0", "decoder 1"]
    foreign = table.assign(layer=[f"transformer_blocks.{i}.<attn>" for i in range(5)])
    assert plot.bleeding_by_layer(foreign).layout.yaxis.ticktext[0] == "transformer_blocks.0.&lt;attn&gt;"


def test_many_steps_fit_the_page() -> None:
    many = pd.DataFrame(
        [("up.0", "mean", step, "bleed", step / 50) for step in range(50)],
        columns=["layer", "head", "step", "measure", "value"],
    )
    figure = plot.bleeding_by_layer(many)
    assert figure.layout.width <= style.WIDTH
    assert len(figure.layout.xaxis.ticktext) <= 13


@pytest.mark.parametrize(
    ("table", "options", "said"),
    [
        (profile().drop(columns="head"), {}, r"lacks the column head\. .*elakit.causes.profile"),
        (profile(), {"measure": "iou"}, "measure='iou' is unknown; choose from bleed, spill"),
        (profile(), {"across": "entity"}, "'head' or 'step'"),
    ],
)
def test_unsuitable_tables_are_refused(table: pd.DataFrame, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        plot.bleeding_by_layer(table, **options)


# --- methods ------------------------------------------------------------------------------------------------


def method_table() -> pd.DataFrame:
    """Four prompts by three methods: plain gets two right; ELA all four; the other breaks one and fixes one."""
    right = {"plain": [1, 1, 0, 0], "ela": [1, 1, 1, 1], "other": [0, 1, 1, 0]}
    seconds = {"plain": 2.0, "ela": 3.0, "other": 20.0}
    return pd.DataFrame(
        [
            {"prompt": prompt, "method": method, "success": right[method][i], "seconds": seconds[method]}
            for i, prompt in enumerate("abcd")
            for method in right
        ]
    )


def test_methods_stand_in_the_order_of_what_they_get_right_below_plain() -> None:
    summary = sweep.summary(method_table())
    figure = plot.method_comparison(summary.loc[["other", "plain", "ela"]])
    assert list(figure.layout.yaxis.ticktext) == ["plain", "ELA", "other"]
    success, fixed, broken, seconds = figure.data
    assert list(success.x) == [0.5, 1, 0.5]
    np.testing.assert_array_equal(fixed.x, [np.nan, 1, 0.5])
    np.testing.assert_array_equal(broken.x, [np.nan, 0, 0.5])
    assert list(seconds.x) == [1, 1.5, 10]
    assert figure.layout.xaxis4.type == "log"  # ten times as long
    assert [shape.x0 for shape in figure.layout.shapes] == [0.5, 1]  # what plain gets right, and its time


def test_a_method_faster_than_plain_is_inside_the_logarithmic_axis() -> None:
    table = method_table()
    table.loc[table["method"] == "ela", "seconds"] = 0.6  # 0.3 times as long as plain, beside one of 10 times
    axis = plot.method_comparison(sweep.summary(table)).layout.xaxis4
    assert axis.type == "log"
    assert axis.range[0] < np.log10(0.3)


def test_whiskers_end_at_the_intervals() -> None:
    summary = sweep.summary(method_table())
    success = plot.method_comparison(summary).data[0]
    ordered = summary.loc[["plain", "ela", "other"]]
    np.testing.assert_allclose(success.x + success.error_x.array, ordered["success_high"])
    np.testing.assert_allclose(success.x - success.error_x.arrayminus, ordered["success_low"])


def test_a_dot_is_full_where_the_difference_is_no_accident() -> None:
    summary = sweep.summary(method_table()).loc[["plain", "ela", "other"]]
    summary["p_holm"] = [np.nan, 0.01, 0.5]
    marker = plot.method_comparison(summary).data[0].marker
    assert list(marker.color) == [RUN_COLORS[0], RUN_COLORS[2], "#ffffff"]


def test_a_table_without_a_required_column_is_refused() -> None:
    summary = sweep.summary(method_table())
    with pytest.raises(SettingError, match=r"lacks the column broken_low\. Compute the summary with"):
        plot.method_comparison(summary.drop(columns="broken_low"))
    with pytest.raises(SettingError, match=r"no rows.*Keep at least one row"):
        plot.method_comparison(summary.iloc[:0])
    named = plot.method_comparison(summary.rename(index={"other": "<b>other</b>"}))
    assert "&lt;b&gt;other&lt;/b&gt;" in named.layout.yaxis.ticktext


# --- regions that move --------------------------------------------------------------------------------------


def test_each_frame_shows_the_regions_of_its_step(run: Run) -> None:
    figure = plot.region_animation(run)
    assert [frame.name for frame in figure.frames] == ["0", "1", "2", "3"]
    assert [step.label for step in figure.layout.sliders[0].steps] == ["1", "2", "3", "4"]
    for frame in figure.frames:
        shown = [trace for trace in frame.data if trace.legendgroup]
        assert len(shown) == 2 * 2  # two entities, over attention and over the image
        for trace in shown:
            mask = run.regions.sel(step=int(frame.name), entity=trace.meta["entity"]).values
            np.testing.assert_array_equal(trace.z == 1, mask)
    # what a frame replaces is what it shows, and the figure opens at the first
    for place, trace in zip(figure.frames[0].traces, figure.frames[0].data, strict=True):
        np.testing.assert_array_equal(figure.data[place].z, trace.z)
    legend = {trace.name: trace.marker.color for trace in figure.data if trace.type == "scatter"}
    assert legend == {"car": ENTITY_COLORS[0], "bird": ENTITY_COLORS[1]}


def test_steps_and_speed_of_an_animation_are_chosen(run: Run) -> None:
    figure = plot.region_animation(run, steps=[0, -1], speed=10, title="<i>Mine</i>")
    assert [frame.name for frame in figure.frames] == ["0", "3"]
    assert figure.layout.updatemenus[0].buttons[0].args[1]["frame"]["duration"] == 100
    assert figure.layout.title.text == "<b>&lt;i&gt;Mine&lt;/i&gt;</b>"
    with pytest.raises(SettingError, match="positive number"):
        plot.region_animation(run, speed=0)
    with pytest.raises(SettingError, match="has no guidance"):
        plot.region_animation(run, source="guidance")
