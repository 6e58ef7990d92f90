"""A run is started, paused, resumed and canceled: which request has an effect in which state, without threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elakit.widgets.live.run_state import RunState

pytestmark = pytest.mark.unit

IDLE = RunState()
RUNNING = IDLE.start()
PAUSED = IDLE.start(pause_after=1).step_made(0).enter_pause()
DONE = RUNNING.end("done", None)
REQUESTS: dict[str, Callable[[RunState], RunState]] = {
    "pause": RunState.pause, "resume": RunState.resume, "cancel": RunState.cancel
}  # fmt: skip


def test_three_steps_at_a_time_and_then_to_the_end() -> None:
    now = IDLE.start(pause_after=3)
    dues = []
    for step in range(3):
        now = now.step_made(step)
        dues.append(now.pause_due)
    assert dues == [False, False, True]
    now = now.enter_pause()
    assert (now.state, now.made) == ("paused", 3)
    now = now.resume(1).step_made(3)
    assert now.pause_due
    now = now.enter_pause().resume()
    for step in range(4, 10):
        now = now.step_made(step)
        assert not now.pause_due
    now = now.end("done", None)
    assert (now.state, now.made, now.going, now.over) == ("done", 10, False, True)


def test_a_pause_that_is_asked_for_comes_after_the_step_in_progress() -> None:
    asked = RUNNING.pause()
    assert (asked.state, asked.pause_due) == ("running", True)
    assert asked.step_made(0).enter_pause().state == "paused"


def test_a_cancel_overtakes_a_pause() -> None:
    """Between the request to pause and the pause the user presses Cancel: the run must not wait for a resume."""
    now = RUNNING.pause().step_made(0).cancel()
    assert not now.pause_due
    assert now.enter_pause().state == "running"
    assert now.canceling


def test_a_paused_run_that_is_canceled_goes_on_to_its_end() -> None:
    now = PAUSED.cancel()
    assert (now.state, now.canceling) == ("running", True)


@pytest.mark.parametrize(
    ("now", "acting"),
    [(IDLE, set()), (RUNNING, {"pause", "cancel"}), (PAUSED, {"resume", "cancel"}), (DONE, set())],
    ids=["idle", "running", "paused", "done"],
)
def test_requests_that_do_not_apply_change_nothing(now: RunState, acting: set[str]) -> None:
    assert {name for name, request in REQUESTS.items() if request(now) is not now} == acting


def test_a_new_run_remembers_nothing_of_the_last_one() -> None:
    failed = RUNNING.step_made(0).preview_failed(ValueError("no decoder")).cancel().end("failed", None, OSError("gone"))
    now = failed.start()
    assert (now.state, now.made, now.canceling, now.error, now.no_preview) == ("running", 0, False, None, None)
    assert isinstance(failed.error, OSError)  # whoever kept the old state still reads it
