"""Figures show the values of their run, fit into 860 pixels, and escape the words of the prompt."""

from __future__ import annotations

import base64
import importlib.util
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import plotly.io
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_pipeline

from elakit import plot
from elakit.errors import OutputError, RecordingError, SettingError
from elakit.generation import generate
from elakit.guidance import ELA, LatentStep
from elakit.plot import style
from elakit.plot.image_figures import light_gray
from elakit.plot.regions import animated_steps
from elakit.plot.style import ENTITY_COLORS, escape, pick_steps
from elakit.run import Run

PAIR = "a [red car] and a [blue bird]"
STEPS = 6


def draw(text: str = PAIR, guidance: ELA | None = None, length: int = 20, **options: Any) -> Run:
    return generate(
        tiny_pipeline(length=length), text, steps=STEPS, guidance_scale=3, guidance=guidance, progress=False, **options
    )


@pytest.fixture(scope="module")
def plain() -> Run:
    return draw()


@pytest.fixture(scope="module")
def guided() -> Run:
    return draw(guidance=ELA(anchor=LatentStep(start=0, guided=1, needed=None, enough=None)))  # guided at every step


def heatmaps(figure: go.Figure) -> list[go.Heatmap]:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def texts(value: Any) -> Iterator[str]:
    """Every string of a figure that plotly draws as HTML."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in ("meta", "legendgroup", "source", "template"):
                yield from texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from texts(part)
    elif isinstance(value, str):
        yield value


def every_figure(run: Run, other: Run) -> list[go.Figure]:
    return [
        plot.token_maps(run),
        plot.region_evolution(run),
        plot.region_evolution(other, source="guidance"),
        plot.leakage(run, other, attributes=True),
        plot.bleeding_over_steps([run, other]),
        plot.entity_maps(run, other),
        plot.images(run, other),
    ]


# --- token maps ---------------------------------------------------------------------------------------------


def test_token_maps_show_the_recorded_maps(plain: Run) -> None:
    traces = heatmaps(plot.token_maps(plain))
    steps = [0, 1, 3, 4, 5]
    assert len(traces) == len(steps) * len(plain.recording.tokens)
    maps = plain.recording.maps(layers="up", size=8, steps=steps)
    for trace in traces:
        expected = maps.sel(step=trace.meta["step"], token=trace.meta["token"]).values
        np.testing.assert_array_equal(trace.z, expected)


def test_each_token_has_one_color_scale_by_default(plain: Run) -> None:
    maps = plain.recording.maps(["car", "bird"], layers="up", size=8)
    by_token = {t.meta["token"]: t.zmax for t in heatmaps(plot.token_maps(plain, tokens=["car", "bird"], steps=STEPS))}
    assert by_token == pytest.approx({token: float(maps.sel(token=token).max()) for token in ("car", "bird")})
    shared = heatmaps(plot.token_maps(plain, tokens=["car", "bird"], steps=STEPS, scale="all"))
    assert {trace.zmax for trace in shared} == {float(maps.max())}
    alone = heatmaps(plot.token_maps(plain, scale="map"))
    assert all(trace.zmax == trace.z.max() for trace in alone)
    assert all(trace.zmin == 0 for trace in (*shared, *alone))


def test_token_maps_are_drawn_downwards_with_square_locations(plain: Run) -> None:
    figure = plot.token_maps(plain, tokens="car", steps=1)
    low, high = figure.layout.yaxis.range
    assert low > high
    assert figure.layout.yaxis.scaleanchor == "x"


def test_options_choose_what_is_shown(plain: Run) -> None:
    figure = plot.token_maps(
        plain.recording, tokens="entities", steps=[0, -1], layers="down", size=4, normalize="sum", title="Mine"
    )
    traces = heatmaps(figure)
    assert [(t.meta["step"], t.meta["token"]) for t in traces] == [(0, "car"), (5, "car"), (0, "bird"), (5, "bird")]
    assert all(t.z.shape == (4, 4) and t.z.sum() == pytest.approx(1, abs=1e-5) for t in traces)
    assert figure.layout.title.text == "<b>Mine</b>"


def test_a_long_prompt_is_shown_by_its_entities() -> None:
    run = draw("a very long story of a [red car] that goes over the hills to a [blue bird] in a far land", length=60)
    shown = {trace.meta["token"] for trace in heatmaps(plot.token_maps(run))}
    words = {token.label for token in run.prompt.tokens if token.text in ("red", "car", "blue", "bird")}
    assert shown == {"<start>", "<end>"} | words
    assert plot.token_maps(run).layout.width <= style.WIDTH


def test_token_maps_name_special_tokens_in_words(plain: Run) -> None:
    figure = plot.token_maps(plain, tokens=["<start>", "<end>", "car"], steps=1, panel=200)
    assert [trace.name for trace in heatmaps(figure)] == ["start-of-text", "end-of-text and padding", "car"]
    headings = [note.text.partition("<br>")[0] for note in figure.layout.annotations]
    assert {"start-of-text", "end-of-text and padding", "car"} <= set(headings)


def test_special_tokens_have_short_headings_in_narrow_columns(plain: Run) -> None:
    figure = plot.token_maps(plain)
    headings = [note.text.partition("<br>")[0] for note in figure.layout.annotations]
    assert {"start", "end+pad"} <= set(headings)
    assert not any("…" in heading for heading in headings)
    assert "end-of-text and padding" in {trace.name for trace in heatmaps(figure)}


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"scale": "row"}, SettingError, "'token', 'all' or 'map'"),
        ({"steps": 0}, SettingError, "1 or more"),
        ({"steps": [3, 99]}, SettingError, "99"),
        ({"tokens": "zebra"}, RecordingError, "zebra"),
        ({"size": 7}, RecordingError, "7"),
        ({"normalize": "best"}, SettingError, "best"),
    ],
)
def test_wrong_options_are_named(plain: Run, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        plot.token_maps(plain, **options)


def test_a_run_without_recording_is_refused() -> None:
    run = draw(record=False)
    for function in (plot.token_maps, plot.region_evolution, plot.leakage, plot.entity_maps):
        with pytest.raises(RecordingError, match="record=True"):
            function(run)
    assert len(plot.images(run).layout.images) == 1


# --- regions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["recording", "guidance"])
def test_regions_are_those_of_the_run(guided: Run, source: Any) -> None:
    regions = guided.regions if source == "recording" else guided.guidance.regions
    figure = plot.region_evolution(guided, source=source, steps=3)
    shown = [trace for trace in heatmaps(figure) if trace.legendgroup]
    assert len(shown) == (3 + 1) * 2
    for trace in shown:
        mask = regions.sel(step=trace.meta["step"], entity=trace.meta["entity"]).values
        np.testing.assert_array_equal(trace.z == 1, mask)
        assert np.isnan(trace.z[~mask]).all()
    assert shown[-1].meta["step"] == int(regions.step[-1])
    assert len(figure.layout.images) == 1


def test_entities_keep_their_colors_in_every_figure(plain: Run) -> None:
    legend = {t.name: t.marker.color for t in plot.region_evolution(plain).data if t.type == "scatter"}
    assert legend == {"car": ENTITY_COLORS[0], "bird": ENTITY_COLORS[1]}
    frames = {shape.line.color for shape in plot.leakage(plain).layout.shapes}
    assert frames == set(legend.values())
    assert len(set(ENTITY_COLORS)) == len(ENTITY_COLORS)


def test_image_and_maps_can_be_left_out(plain: Run) -> None:
    figure = plot.region_evolution(plain, steps=2, image=False, maps=False, columns=1)
    assert len(heatmaps(figure)) == 4
    assert not figure.layout.images
    assert figure.layout.height > figure.layout.width


def test_regions_of_guidance_need_guidance(plain: Run) -> None:
    with pytest.raises(SettingError, match="has no guidance"):
        plot.region_evolution(plain, source="guidance")
    with pytest.raises(SettingError, match="used no regions"):
        plot.region_evolution(draw("a [red car]", ELA()), source="guidance")
    with pytest.raises(SettingError, match="choose 'recording' or 'guidance'"):
        plot.region_evolution(plain, source="map")  # type: ignore[arg-type]


# --- leakage and curves -------------------------------------------------------------------------------------


def test_the_printed_leakage_is_the_measured_leakage(plain: Run, guided: Run) -> None:
    figure = plot.leakage(plain, guided)
    printed = [note.text for note in figure.layout.annotations if re.fullmatch(r"\d\.\d\d", note.text)]
    expected = [run.bleeding.leakage.mean("step").values for run in (plain, guided)]
    for trace, values in zip(heatmaps(figure), expected, strict=True):
        np.testing.assert_allclose(trace.z, values)
    assert printed == [f"{value:.2f}" for values in expected for value in values.ravel()]
    one = plot.leakage([plain], step=-1)
    np.testing.assert_array_equal(one.data[0].z, plain.bleeding.leakage.isel(step=-1).values)


def test_attributes_have_their_own_rows(plain: Run) -> None:
    figure = plot.leakage(plain, attributes=True)
    measured = plain.bleeding
    both = np.concatenate([measured.leakage.mean("step"), measured.attribute_leakage.mean("step")])
    np.testing.assert_allclose(figure.data[0].z, both)
    assert list(figure.layout.yaxis.ticktext) == ["car", "bird", "red (of car)", "blue (of bird)"]


def test_curves_are_means_over_entities(plain: Run, guided: Run) -> None:
    figure = plot.bleeding_over_steps(plain, guided, measures=["bleed", "spill"])
    frame = plain.bleeding.to_frame()
    bleed = frame[frame["measure"] == "bleed"].groupby("step")["value"].mean()
    first = figure.data[0]
    assert (first.name, list(first.x)) == ("plain", list(range(1, STEPS + 1)))
    np.testing.assert_allclose(first.y, bleed.to_numpy())
    shaded = figure.layout.shapes[0]
    steps = guided.guidance.to_frame().index
    assert (shaded.x0, shaded.x1) == (steps.min() + 0.5, steps.max() + 1.5)  # steps count from 1 in figures


def test_runs_of_one_method_are_averaged(plain: Run) -> None:
    other = draw(seed=1)
    lines = plot.bleeding_over_steps([plain, other], measures=["bleed"]).data
    assert [line.name for line in lines] == ["plain, seed 0", "plain, seed 1", "plain, mean of 2 runs"]
    np.testing.assert_allclose(lines[2].y, (lines[0].y + lines[1].y) / 2)


def test_runs_that_cannot_be_compared_are_refused(plain: Run) -> None:
    alone = draw("a [red car]")
    for function in (plot.leakage, plot.entity_maps):
        with pytest.raises(SettingError, match="one prompt"):
            function(plain, alone)
    for function in (plot.leakage, plot.bleeding_over_steps):
        with pytest.raises(SettingError, match="there is no run to show"):
            function([])
    with pytest.raises(SettingError, match=r"unknown measure iou; choose from .*bleed"):
        plot.bleeding_over_steps(alone, measures=["iou"])


# --- images -----------------------------------------------------------------------------------------------


def test_entity_maps_share_a_scale_between_runs(plain: Run, guided: Run) -> None:
    traces = heatmaps(plot.entity_maps(plain, guided))
    means = [run.entity_maps().mean("step") for run in (plain, guided)]
    for trace, (run, label) in zip(traces, [(i, e) for i in (0, 1) for e in ("car", "bird")], strict=True):
        np.testing.assert_allclose(trace.z, means[run].sel(token=label).values)
        assert trace.zmax == pytest.approx(max(float(mean.sel(token=label).max()) for mean in means))


def test_images_keep_their_pixels(plain: Run) -> None:
    source = plot.images(plain).layout.images[0].source
    shown = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert shown.width % plain.image.width == 0
    small = shown.resize(plain.image.size, Image.Resampling.NEAREST)
    np.testing.assert_array_equal(np.asarray(small), np.asarray(plain.image.convert("RGB")))


# --- all figures --------------------------------------------------------------------------------------------


def test_words_of_the_prompt_are_escaped() -> None:
    text = "a [<b>car</b>] and a [<script>alert(1)</script> $5$ %{z} <i>]"
    runs = draw(text, length=60), draw(text, ELA(), length=60)
    ours = re.compile(r"</?b>|<br>|<span style='font-size:10px'>|</span>|<extra></extra>")
    for figure in every_figure(*runs):
        drawn = list(texts(figure.to_dict()))
        assert drawn
        for each in drawn:
            assert "<" not in ours.sub("", each), each
            assert "$" not in each
            assert not set(re.findall(r"%{(\w+)", each)) - {"x", "y", "z", "customdata"}


def test_labels_in_angle_brackets_are_shown() -> None:
    run = draw("a <toy> and a [red car]")  # as the word of a textual inversion
    headings = [note.text for note in plot.token_maps(run).layout.annotations]
    assert any(text.startswith("&lt;toy&gt;") for text in headings)


def test_figures_have_no_side_effects_and_are_deterministic(plain: Run, guided: Run) -> None:
    template = plotly.io.templates.default
    before = plain.recording.maps().values.copy()
    first, second = ([f.to_json() for f in every_figure(plain, guided)] for _ in range(2))
    assert first == second
    assert plotly.io.templates.default == template
    np.testing.assert_array_equal(plain.recording.maps().values, before)


def test_figures_of_one_and_of_many_entities_fit_the_page() -> None:
    many = draw("a [car], a [bird], a [dog], a [cat], a [frog], a [lion], a [bear] and a [clock]", length=60)
    for function in (plot.token_maps, plot.region_evolution, plot.entity_maps):
        assert function(many).layout.width <= style.WIDTH
    assert style.WIDTH <= 868  # what JupyterLab leaves on a screen of 1300 pixels with its sidebar open
    assert plot.leakage(many, many).layout.width <= style.WIDTH
    assert plot.images(*[many] * 12).layout.width <= style.WIDTH
    assert plot.bleeding_over_steps(many, many).layout.width <= style.WIDTH
    alone = draw("a [dog]")
    assert plot.leakage(alone).data[0].z.shape == (1, 2)
    assert len(heatmaps(plot.entity_maps(alone))) == 1


@given(st.integers(1, 200), st.integers(1, 30))
def test_steps_are_evenly_spaced(there: int, wanted: int) -> None:
    picked = pick_steps(range(there), wanted)
    assert picked == sorted(set(picked))
    assert len(picked) == min(there, wanted)
    assert picked[-1] == there - 1
    assert wanted == 1 or picked[0] == 0
    gaps = np.diff(picked)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@given(st.text())
def test_escaped_text_contains_no_markup(text: str) -> None:
    escaped = escape(text)
    assert not set("<>$%") & set(escaped)


# --- titles and captions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 250, 800])
def test_long_titles_and_captions_are_wrapped_to_the_figure(width: int) -> None:
    title = "a very long prompt of a dozen words that does not fit into one line of a figure"
    panels = style.Panels(1, 1, width=width, height=80, title=title, caption=f"{title} {title}")
    panels.map_axes(1, 1, 4, 4)
    panels.add_nothing(1, 1)
    figure = panels.figure()
    assert figure.layout.width <= max(width + 100, 320)
    for text, letter in ((figure.layout.title.text, 9.5), (figure.layout.annotations[0].text, 5.8)):
        lines = re.sub("</?b>", "", text).split("<br>")
        assert " ".join(lines) in (title, f"{title} {title}")
        assert max(map(len, lines)) * letter <= figure.layout.width
    # The caption has space below the panel.
    caption = figure.layout.annotations[0]
    assert figure.layout.margin.b + caption.yshift >= 14 * (caption.text.count("<br>") + 1)


def test_a_legend_of_many_names_gets_more_space() -> None:
    def height(count: int) -> int:
        panels = style.Panels(1, 1, width=300, height=80)
        panels.entity_legend([f"a long label {i}" for i in range(count)])
        return int(panels.figure().layout.height)

    assert height(1) == height(2) < height(8)


# --- animations ---------------------------------------------------------------------------------------------


def test_an_animation_shows_the_regions_of_every_step(plain: Run, tmp_path: Path) -> None:
    path = plot.save_animation(plain, tmp_path / "regions.gif", panel=64, speed=5)
    animation = Image.open(path)
    assert animation.n_frames == STEPS
    assert animation.info["duration"] == 200
    rows, columns = plain.regions.sizes["y"], plain.regions.sizes["x"]
    car, background = tuple(int(ENTITY_COLORS[0][i : i + 2], 16) for i in (1, 3, 5)), set()
    for step in range(STEPS):
        animation.seek(step)
        right = np.asarray(animation.convert("RGB"))[38 : 38 + 64, 24 + 64 : 24 + 128].astype(float)
        centers = right[64 // rows // 2 :: 64 // rows, 64 // columns // 2 :: 64 // columns]
        image = np.asarray(light_gray(plain.image).convert("RGB").resize((64, 64)), float)
        base = image[64 // rows // 2 :: 64 // rows, 64 // columns // 2 :: 64 // columns]
        mask = plain.regions.sel(step=step, entity="car").values
        outside = ~plain.regions.sel(step=step).values.any(0)
        background.add(bool(outside.any()))
        # The palette of a GIF has 256 colors, so colors are approximate.
        assert np.abs(centers[mask] - (0.45 * base[mask] + 0.55 * np.array(car))).max() < 40
        assert np.abs(centers[outside] - base[outside]).max(initial=0) < 40
    assert background == {True}


def test_animations_can_show_a_few_steps_and_the_regions_of_guidance(guided: Run, tmp_path: Path) -> None:
    first = int(guided.guidance.regions.step[0])
    path = plot.save_animation(guided, tmp_path / "guided.gif", source="guidance", steps=[first], panel=33)
    assert getattr(Image.open(path), "n_frames", 1) == 1


def test_an_animation_of_guidance_shows_the_guided_steps_that_were_recorded(guided: Run) -> None:
    first, second, *_ = guided.guidance.regions.step.values.tolist()
    part = replace(guided, recording=guided.recording.sel(step=[second]))
    assert [frame.name for frame in plot.region_animation(part, source="guidance").frames] == [str(second)]
    with pytest.raises(SettingError, match="not available"):
        plot.region_animation(part, source="guidance", steps=[first])
    early = part.guidance.regions.sel(step=[first])
    with pytest.raises(SettingError, match="no guided step was recorded"):
        animated_steps(early, part.entity_maps(), None)


def test_an_mp4_file_is_written_if_ffmpeg_is_installed(plain: Run, tmp_path: Path) -> None:
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        with pytest.raises(OutputError, match=r"pip install 'elakit\[video\]'"):
            plot.save_animation(plain, tmp_path / "regions.mp4")
        assert not list(tmp_path.iterdir())
    else:
        assert plot.save_animation(plain, tmp_path / "regions.mp4").read_bytes()[4:8] == b"ftyp"


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("regions.png", {}, OutputError, r"\.gif or \.mp4"),
        ("regions.gif", {"speed": 0}, SettingError, "speed"),
        ("regions.gif", {"panel": 5}, SettingError, "panel"),
        ("regions.gif", {"steps": [99]}, SettingError, "not available"),
        ("regions.gif", {"steps": [-99]}, SettingError, "-99 is not available"),
        ("missing/regions.gif", {}, OutputError, "cannot be written"),
    ],
)
def test_animations_that_cannot_be_written_are_refused(
    plain: Run, tmp_path: Path, name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plot.save_animation(plain, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_headings_of_images_are_wrapped_to_their_panels(plain: Run) -> None:
    figure = plot.images(plain, plain, names=["other words, seed 107", "plain"], panel=90)
    first, second = (note.text for note in figure.layout.annotations)
    assert first.replace("<br>", " ") == "other words, seed 107"
    assert max(map(len, first.split("<br>"))) * 6 <= 90
    assert second == "plain"
    assert figure.layout.margin.t >= 14 * (first.count("<br>") + 1)
