"""Runs in a background thread, one at a time, that can be paused, stepped, steered and canceled."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from elakit.errors import SettingError
from elakit.generation import Progress, generate
from elakit.guidance import Anchors
from elakit.guidance.layout import Layout
from elakit.pipeline import Pipeline
from elakit.run import Run

State: TypeAlias = Literal["idle", "running", "paused", "done", "canceled", "failed"]
PREVIEW_SHARE = 0.25  # largest share of the time spent on previews
PREVIEWS_PER_SECOND = 10.0  # at most
_BUSY: WeakSet[Pipeline] = WeakSet()  # pipelines in use by a session: a pipeline holds the state of one run only
_GUARD = threading.Lock()


class Session:
    """Background runs of a pipeline, one at a time.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    on_state : callable, optional
        Called without arguments when `state` has changed, in the thread that changed it.
    on_preview : callable, optional
        Called in the run's thread with the partial `Run`, the step, and the number of steps. It is not called at every
        step where decoding a preview takes long, but always before a pause.

    Attributes
    ----------
    state : {"idle", "running", "paused", "done", "canceled", "failed"}
    made : int
        Number of steps made in the current or the last run.
    run : Run or None
        The last run, complete or partial.
    error : Exception or None
        The error that ended the last run, if it failed.
    no_preview : Exception or None
        The error that ended the previews of this run, if any.

    Examples
    --------
    >>> import elakit
    >>> session = Session(elakit.load("picture-world"))
    >>> session.start({"prompt": "a [cat]", "steps": 3}, pause_after=1)
    >>> session.wait(), session.made
    ('paused', 1)
    >>> session.cancel()
    >>> session.wait(), session.run.settings["stopped"]
    ('canceled', 1)
    """

    def __init__(
        self,
        pipe: Pipeline,
        on_state: Callable[[], None] = lambda: None,
        on_preview: Callable[[Run, int, int], None] = lambda run, step, steps: None,
    ) -> None:
        self.pipe, self.on_state, self.on_preview = pipe, on_state, on_preview
        self.state: State = "idle"
        self.made = 0
        self.run: Run | None = None
        self.error: Exception | None = None
        self.no_preview: Exception | None = None
        self._changed = threading.Condition()
        self._announced: State = "idle"  # the last state that on_state has handled
        self._left: int | None = None  # steps until the run pauses; None: no pause is planned
        self._canceled = False
        self._layout: Layout | None = None
        self._steered = False
        self._progress: Progress | None = None
        self._pace = (0.0, 0.0)  # time at which the last preview was ready, and the seconds to wait before the next

    @property
    def going(self) -> bool:
        """True while a run is in progress, paused or not."""
        return self.state in ("running", "paused")

    def start(self, call: dict[str, Any], pause_after: int | None = None) -> None:
        """Start a run.

        Parameters
        ----------
        call : dict
            Arguments of `elakit.generate`, without the pipeline.
        pause_after : int, optional
            Number of steps after which the run pauses.

        Raises
        ------
        SettingError
            A run is in progress, here or in another panel with the same pipeline.
        """
        with _GUARD:
            if self.going:
                raise SettingError("A run is in progress: wait for its end, or cancel it, before you start another.")
            if self.pipe in _BUSY:
                raise SettingError("The pipeline is in use by another panel: wait for that run, or cancel it there.")
            _BUSY.add(self.pipe)
            self.made, self.run, self.error, self.no_preview = 0, None, None, None
            self._left, self._canceled, self._steered = pause_after, False, False
            self._progress, self._pace = None, (0.0, 0.0)
            self.state = self._announced = "running"
        self.on_state()
        threading.Thread(target=self._generate, args=(call,), name="elakit-live", daemon=True).start()

    def pause(self) -> None:
        """Pause after the current step; no effect when no run is in progress."""
        with self._changed:
            if self.state == "running":
                self._left = 0

    def resume(self, steps: int | None = None) -> None:
        """Resume a paused run, to its end or for a number of steps; no effect when the run is not paused."""
        with self._changed:
            if self.state != "paused":
                return
            self._left = steps
            self.state = self._announced = "running"
            self._changed.notify_all()
        self.on_state()

    def cancel(self) -> None:
        """End the run after the current step; no effect when no run is in progress."""
        with self._changed:
            if not self.going:
                return
            self._canceled = True
            self.state = self._announced = "running"
            self._changed.notify_all()

    def steer(self, layout: Layout | None) -> None:
        """Anchor the run to these regions from its next guided step on (see `Anchors.steer`)."""
        with self._changed:
            self._layout, self._steered = layout, True

    def wait(self, timeout: float | None = None) -> State:
        """Wait until the run ends or pauses, and return the state.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._announced != "running", timeout)
        return self.state

    # -- in the run's thread ---------------------------------------------------------------------------------------

    def _generate(self, call: dict[str, Any]) -> None:
        state: State = "failed"
        try:
            self.run = generate(self.pipe, stop_if=self._after_step, progress=False, **call)
            state = "canceled" if "stopped" in self.run.settings else "done"
        except Exception as error:
            self.error = error
            self.run = self._partial_run()
        finally:
            self._progress = None
            with _GUARD:
                _BUSY.discard(self.pipe)
            self._enter(state)

    def _after_step(self, progress: Progress) -> bool:
        self.made, self._progress = progress.step + 1, progress
        steps = max(progress.steps, len(self.pipe.scheduler.timesteps))  # schedulers may add steps
        last = self.made >= steps
        with self._changed:
            if self._left:
                self._left -= 1
        pausing = self._left == 0 and not last
        if not self._canceled:
            self._preview(progress, steps, always=pausing or last)
        if self._left == 0 and not last and not self._canceled:
            self._enter("paused")
        with self._changed:
            self._changed.wait_for(lambda: self.state == "running" or self._canceled)
            if self._steered:
                self._steered = False
                for state in progress.states:
                    if isinstance(state, Anchors):
                        state.steer(self._layout)
            return self._canceled and not last

    def _preview(self, progress: Progress, steps: int, *, always: bool) -> None:
        """Show the partial run, unless previews take too much of the time."""
        began = time.monotonic()
        ready, rest = self._pace
        if self.no_preview is not None or (began - ready < rest and not always):
            return
        try:
            self.on_preview(progress.runs(predicted=True)[0], progress.step, steps)
        except Exception as error:  # a preview that cannot be decoded must not end the run
            self.no_preview = error
        now = time.monotonic()
        self._pace = now, max(1 / PREVIEWS_PER_SECOND, (now - began) * (1 / PREVIEW_SHARE - 1))

    def _partial_run(self) -> Run | None:
        """The partial run of a failed one; None where no step was completed."""
        if self._progress is None:
            return None
        try:
            run = self._progress.runs()[0]
        except Exception:
            return None
        run.settings["stopped"] = self.made
        return run

    def _enter(self, state: State) -> None:
        """Enter a state; `wait` returns after `on_state` has handled it."""
        self.state = state
        try:
            self.on_state()
        finally:
            with self._changed:
                self._announced = self.state
                self._changed.notify_all()
