"""Regional attention restricts each entity's words to its region in the denoiser's own passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny import tiny_pipeline

from elakit import generate
from elakit.attention import Edit, Site, edit
from elakit.errors import SettingError
from elakit.guidance import Guide, RegionalAttention
from elakit.guidance.holding import Holder, restriction
from elakit.models import adapter_for
from elakit.pipeline_call import Progress
from elakit.prompt import parse
from elakit.regions import divide

PAIR = "a [red car] and a [blue bird]"
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)


def same(one: Any, other: Any) -> bool:
    return np.array_equal(np.asarray(one.image), np.asarray(other.image))


# -- dividing ----------------------------------------------------------------------------------------------------------


def test_a_tall_image_is_divided_from_top_to_bottom() -> None:
    maps = np.zeros((2, 6, 4))
    maps[0, 4], maps[1, 1] = 0.5, 0.5
    masks = divide(maps)
    assert masks[0].any(1).tolist() == [False, False, False, True, True, True]
    assert np.array_equal(masks[1], ~masks[0])


def test_what_a_region_by_hand_takes_is_not_divided() -> None:
    maps = np.zeros((2, 4, 8))
    maps[0, :, 7], maps[1, :, 4] = 1, 1
    free = np.zeros((4, 8), bool)
    free[:, 4:] = True
    masks = divide(maps, free)
    assert masks[1].any(0).tolist() == [False] * 4 + [True, True, False, False]
    assert masks[0].any(0).tolist() == [False] * 6 + [True, True]


def test_entities_that_nothing_tells_apart_are_divided_in_their_order() -> None:
    masks = divide(np.full((3, 2, 6), 0.1))
    assert masks[:, 0].astype(int).tolist() == [[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 1]]


@given(maps=arrays(float, st.tuples(st.integers(1, 5), st.integers(5, 9), st.integers(5, 9)), elements=st.floats(0, 1)))
def test_each_cell_belongs_to_one_entity_and_parts_are_alike(maps: np.ndarray) -> None:
    masks = divide(maps)
    assert (masks.sum(0) == 1).all()
    longer = int(np.argmax(maps.shape[1:][::-1]))  # 0: columns are divided
    widths = masks.any(1 if longer == 0 else 2).sum(1)
    assert widths.max() - widths.min() <= 1


def test_maps_that_are_none_are_refused() -> None:
    with pytest.raises(SettingError, match=r"shape \(4, 4\)"):
        divide(np.ones((4, 4)))


def test_free_locations_of_another_size_are_refused() -> None:
    with pytest.raises(SettingError, match=r"free has shape \(1, 4\), but each map has \(2, 4\)"):
        divide(np.ones((2, 2, 4)), np.ones((1, 4), bool))


# -- holding -----------------------------------------------------------------------------------------------------------


def test_regions_by_hand_hold_as_an_edit_of_the_attention_does() -> None:
    """`elakit.attention.edit` lowers the same scores at the same locations, by code of its own."""
    pipe = tiny_pipeline()
    method = RegionalAttention(regions=[LEFT, RIGHT], strength=3.0)
    run = generate(pipe, PAIR, seed=2, steps=4, guidance=method, progress=False)
    away = [
        Edit(["blue", "bird"], add=-3.0, region=[[True, False]]),
        Edit(["red", "car"], add=-3.0, region=[[False, True]]),
    ]
    with edit(pipe, PAIR, away):
        edited = generate(pipe, PAIR, seed=2, steps=4, progress=False)
    assert same(run, edited)
    np.testing.assert_allclose(run.entity_maps(), edited.entity_maps(), atol=1e-6)
    assert not same(run, generate(pipe, PAIR, seed=2, steps=4, progress=False))
    assert run.guidance is not None
    assert [row["step"] for row in run.guidance.rows] == [0, 1, 2, 3]


def test_the_first_pass_shows_where_the_entities_are_and_the_second_is_held_to_it() -> None:
    pipe = tiny_pipeline()
    plain = generate(pipe, PAIR, seed=3, steps=4, progress=False)
    run = generate(pipe, PAIR, seed=3, steps=4, guidance=RegionalAttention(), progress=False)
    first = plain.entity_maps().isel(step=0)
    np.testing.assert_array_equal(run.entity_maps().isel(step=0), first)
    assert run.guidance is not None
    regions = run.guidance.regions
    assert regions is not None
    assert regions.step.values.tolist() == [1, 2, 3]
    for masks in regions.values:
        np.testing.assert_array_equal(masks, divide(first.values))
    frame = run.guidance.to_frame()
    assert (frame.moved == 0).all()
    # what is traced is the attention of the pass itself
    car = run.entity_maps().isel(step=1, token=0).values
    bird = run.entity_maps().isel(step=1, token=1).values
    shares = [car[regions.values[0, 0]].sum() / car.sum(), bird[regions.values[0, 1]].sum() / bird.sum()]
    assert frame.outside.iloc[0] == pytest.approx(np.mean([(1 - share) ** 2 for share in shares]), rel=1e-3)


def test_images_of_a_batch_are_held_each_to_its_own() -> None:
    pipe = tiny_pipeline()
    batch = generate(pipe, PAIR, seed=[0, 1, 2, 3, 4], steps=3, guidance=RegionalAttention(), progress=False)
    orders = {bool(run.guidance.regions.values[0, 0, 0, 0]) for run in batch if run.guidance}
    assert orders == {True, False}  # or the test would show nothing
    for run in batch:
        alone = generate(pipe, PAIR, seed=run.seed, steps=3, guidance=RegionalAttention(), progress=False)
        assert np.abs(np.asarray(alone.image, int) - np.asarray(run.image, int)).max() <= 1
        assert run.guidance is not None
        assert alone.guidance is not None
        assert np.array_equal(run.guidance.regions, alone.guidance.regions)


def test_images_that_need_no_help_are_left_alone_in_the_same_batch() -> None:
    pipe = tiny_pipeline()
    options: dict[str, Any] = {"seed": [1, 2], "steps": 5, "record": False, "progress": False}
    plain = generate(pipe, PAIR, **options)
    runs = generate(pipe, PAIR, guidance=RegionalAttention(), guide_if=lambda so_far: [False, True], **options)
    assert same(runs[0], plain[0])
    assert not same(runs[1], plain[1])
    assert runs[1].guidance is not None
    assert [row["step"] for row in runs[1].guidance.rows] == [1, 2, 3, 4]


def test_a_held_run_is_steered_from_the_next_pass_on() -> None:
    pipe = tiny_pipeline()

    def steer(so_far: Progress) -> None:
        if so_far.step == 2:
            so_far.states[0].steer([RIGHT, LEFT])

    run = generate(pipe, PAIR, seed=1, steps=6, guidance=RegionalAttention(strength=50), stop_if=steer, progress=False)
    maps = run.entity_maps().values
    half = maps.shape[-1] // 2
    assert run.guidance is not None
    assert run.guidance.regions is not None
    assert run.guidance.regions.step.values.tolist() == [1, 2, 3, 4, 5]
    for step in (3, 4, 5):
        assert float(maps[step, 0, :, :half].sum()) < 1e-6 < float(maps[step, 0, :, half:].sum())


def test_a_window_of_the_steps_may_be_held() -> None:
    pipe = tiny_pipeline()
    run = generate(
        pipe, PAIR, seed=1, steps=8, guidance=RegionalAttention(start=0.25, guided=0.5, every=2), progress=False
    )
    assert run.guidance is not None
    assert [row["step"] for row in run.guidance.rows] == [2, 4]
    assert [update.hold for update in RegionalAttention().plan([1.0] * 3, run.prompt)] == [False, True, True]


def test_a_restriction_covers_a_coarse_layers_locations_by_their_share() -> None:
    layer = adapter_for(tiny_pipeline()).layers()[0]
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :, :1] = True
    edit = restriction(mask, [(2, 3)], 4.0)
    change = edit.change(Site(layer, (2, 2), 0, 0.9, 5, text=slice(0, 5)), lambda **_: torch.zeros(1, 4, 5))
    assert change is not None
    assert change.bias[0].tolist() == [[0, 0, -2, -2, 0], [0, 0, -4, -4, 0]] * 2


def test_nothing_is_hooked_where_nothing_is_to_be_held() -> None:
    pipe = tiny_pipeline()
    prompt = parse("a [red car]", pipe)
    pipe.scheduler.set_timesteps(3)
    guide = Guide(pipe, RegionalAttention(), prompt, adapter_for(pipe).encode(prompt.text, guided=False), (8, 8))
    assert guide.holder is None


def test_passes_that_are_not_needed_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bool] = []
    before = Holder._before

    def noted(holder: Holder, *args: Any) -> None:
        before(holder, *args)
        read.append(holder._rows is not None)

    monkeypatch.setattr(Holder, "_before", noted)
    generate(
        tiny_pipeline(), PAIR, seed=1, steps=8, guidance=RegionalAttention(start=0.25, guided=0.25), progress=False
    )
    # the pass before the held ones says where things are; the held ones, steps 2 and 3, are traced
    assert read == [False, True, True, True, False, False, False, False]


def test_the_trace_of_a_word_without_attention_is_finite() -> None:
    pipe = tiny_pipeline()
    with edit(pipe, PAIR, Edit(["bird", "blue"], scale=0)):
        run = generate(pipe, PAIR, seed=1, steps=3, guidance=RegionalAttention(), record=False, progress=False)
    trace = run.guidance.to_frame()
    assert len(trace) > 0
    assert np.isfinite(trace.astype(float)).all(axis=None)
    assert (trace["outside"] >= 0.5).all()  # of two entities, one has no attention inside its region
