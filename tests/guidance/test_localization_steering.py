"""Regions given by hand steer ELA, some entities or all, before a run or in the middle of one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import elakit
from elakit.errors import SettingError
from elakit.guidance import ELA, FromMaps, LatentStep
from elakit.pipeline_call import Progress
from elakit.prompt import Prompt
from elakit.run import Run

LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)


def draw(pipe: Any, prompt: Prompt, method: ELA, **options: Any) -> Run:
    return elakit.generate(pipe, prompt, seed=1, steps=6, guidance=method, progress=False, **options)


def halves(regions: Any) -> tuple[bool, bool]:
    """True, True if the first entity has exactly the left half of an (entity, y, x) array, and the second the right."""
    half = np.zeros(regions.shape[1:], bool)
    half[:, : half.shape[1] // 2] = True
    return bool((regions[0] == half).all()), bool((regions[1] == ~half).all())


def test_an_entity_without_a_region_is_localized_where_the_others_leave_room(pipe: Any, prompt: Prompt) -> None:
    run = draw(pipe, prompt, ELA(anchor=LatentStep(guided=1, start=0), regions=[LEFT, None]))
    assert run.guidance is not None
    assert run.guidance.regions is not None
    for regions in run.guidance.regions.values:
        assert halves(regions)[0]
        assert regions[1].any()
        assert not (regions[0] & regions[1]).any()
    # the second entity is localized at each step, the first keeps its region
    assert run.guidance.options["regions"] == ((0.0, 0.0, 0.5, 1.0), None)


def test_regions_that_leave_no_room_leave_the_others_unanchored(pipe: Any, prompt: Prompt) -> None:
    run = draw(pipe, prompt, ELA(anchor=LatentStep(guided=1, start=0), regions=[(0, 0, 1, 1), None]))
    assert run.guidance is not None
    assert run.guidance.regions is not None
    assert not run.guidance.regions.sel(entity="bird").any()
    assert run.guidance.skipped == 0


def test_masks_and_boxes_may_be_mixed(pipe: Any, prompt: Prompt) -> None:
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    run = draw(pipe, prompt, ELA(anchor=LatentStep(guided=1, start=0), regions=[mask, RIGHT]))
    assert run.guidance is not None
    assert run.guidance.regions is not None
    assert halves(run.guidance.regions.values[0]) == (True, True)
    with pytest.raises(SettingError, match="mask 0 is empty"):
        ELA(regions=[~(mask | True), RIGHT])
    with pytest.raises(SettingError, match="1 region, but the prompt has 2 entities"):
        draw(pipe, prompt, ELA(regions=[None]))


def test_one_entity_alone_can_be_put_somewhere(pipe: Any) -> None:
    prompt = elakit.parse("a [cat]", pipe)
    free, put = (draw(pipe, prompt, ELA(anchor=LatentStep(guided=0.5), regions=regions)) for regions in (None, [LEFT]))
    assert free.guidance is not None
    assert put.guidance is not None
    assert (len(free.guidance.rows), len(put.guidance.rows)) == (0, 3)


def test_a_run_is_steered_from_the_next_step_on(pipe: Any, prompt: Prompt) -> None:
    def steer(so_far: Progress) -> None:
        if so_far.step == 2:
            so_far.states[0].steer([RIGHT, LEFT])

    method = ELA(anchor=LatentStep(guided=1, start=0), regions=[LEFT, RIGHT])
    steered, alone = draw(pipe, prompt, method, stop_if=steer), draw(pipe, prompt, method)
    assert steered.guidance is not None
    assert steered.guidance.regions is not None
    seen = [halves(regions)[0] for regions in steered.guidance.regions.values]
    assert seen == [True, True, True, False, False, False]
    assert steered.image != alone.image


def test_what_is_locked_is_localized_once_more_when_a_region_is_taken_back(pipe: Any, prompt: Prompt) -> None:
    def steer(so_far: Progress) -> None:
        if so_far.step == 3:
            so_far.states[0].steer(None)

    run = draw(
        pipe,
        prompt,
        ELA(localize=FromMaps(lock_from=0), anchor=LatentStep(guided=1, start=0), regions=[LEFT, None]),
        stop_if=steer,
    )
    assert run.guidance is not None
    assert run.guidance.regions is not None
    regions = run.guidance.regions.values
    assert all((each == regions[0]).all() for each in regions[:4])
    assert not halves(regions[4])[0]
    assert (regions[5] == regions[4]).all()


def test_a_plain_run_has_no_state_to_steer(pipe: Any, prompt: Prompt) -> None:
    seen: list[int] = []
    elakit.generate(pipe, prompt, steps=2, stop_if=lambda so_far: seen.append(len(so_far.states)), progress=False)
    assert seen == [0, 0]
