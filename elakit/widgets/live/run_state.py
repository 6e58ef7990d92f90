"""State of a run and the transitions between its states, without threads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from elakit.run import Run

State: TypeAlias = Literal["idle", "running", "paused", "done", "canceled", "failed"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RunState:
    """State of the current or the last run.

    A `RunState` object never changes. Methods such as `pause` and `resume` return the next state. If the action is not
    possible in the present state, they return the same object.

    Attributes
    ----------
    state : {"idle", "running", "paused", "done", "canceled", "failed"}
        "idle" before the first run; "running" or "paused" while a run is in progress; "done", "canceled" or "failed"
        after the end of a run.
    made : int
        Number of completed steps.
    left : int or None
        Number of steps after which the run pauses; each completed step lowers this number by 1. With 0, the run pauses
        after the current step. None if no pause is planned.
    canceling : bool
        True if the user has canceled the run. The run then ends after the current step.
    run : Run or None
        The run, complete or partial, once it has ended. None before the end, and after a failure that left no partial
        run.
    error : Exception or None
        The error that ended the run; None if the run did not fail.
    no_preview : Exception or None
        The error of a failed preview, after which the run has no more previews; None if no preview failed.

    Examples
    --------
    A run is to pause after two steps, so that a pause is due when these steps are completed:

    >>> now = RunState().start(pause_after=2)
    >>> now = now.step_made(0).step_made(1)
    >>> now.pause_due, now.enter_pause().state
    (True, 'paused')

    The paused run is resumed for one more step:

    >>> now.enter_pause().resume(1).left
    1
    """

    state: State = "idle"
    made: int = 0
    left: int | None = None
    canceling: bool = False
    run: Run | None = None
    error: Exception | None = None
    no_preview: Exception | None = None

    @property
    def going(self) -> bool:
        """True while a run is in progress, paused or not."""
        return self.state in ("running", "paused")

    @property
    def over(self) -> bool:
        """True if the last run has ended and no new run has started."""
        return self.state in ("done", "canceled", "failed")

    @property
    def pause_due(self) -> bool:
        """True if the run is not yet paused, but is to pause before its next step."""
        return self.state == "running" and self.left == 0 and not self.canceling

    def start(self, pause_after: int | None = None) -> RunState:
        """Start a new run; if `pause_after` is given, the run pauses after this number of steps."""
        return RunState(state="running", left=pause_after)

    def step_made(self, step: int) -> RunState:
        """Count a completed step; `step` is the index of this step, counted from 0."""
        return replace(self, made=step + 1, left=self.left - 1 if self.left else self.left)

    def pause(self) -> RunState:
        """Request a pause after the current step."""
        return replace(self, left=0) if self.state == "running" else self

    def enter_pause(self) -> RunState:
        """Pause the run if `pause_due` is True; otherwise nothing changes."""
        return replace(self, state="paused") if self.pause_due else self

    def resume(self, steps: int | None = None) -> RunState:
        """Resume a paused run, to its end or, if `steps` is given, for this number of steps."""
        return replace(self, state="running", left=steps) if self.state == "paused" else self

    def cancel(self) -> RunState:
        """Request the end of the run after the current step."""
        return replace(self, state="running", canceling=True) if self.going else self

    def end(self, state: State, run: Run | None, error: Exception | None = None) -> RunState:
        """End the run in the state "done", "canceled" or "failed".

        `run` is the complete or partial run, or None if a failed run left no partial run. `error` is the error that
        ended a failed run.
        """
        return replace(self, state=state, run=run, error=error)

    def preview_failed(self, error: Exception) -> RunState:
        """Record the error of a preview; the run then has no more previews."""
        return replace(self, no_preview=error)
