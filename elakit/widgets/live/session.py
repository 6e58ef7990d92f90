"""Sessions, which generate runs in a background thread, one at a time.

A run in progress can be paused, resumed for a number of steps, steered and canceled.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from elakit.errors import SettingError
from elakit.generation import generate
from elakit.guidance import Anchors
from elakit.guidance.layout import Layout
from elakit.models import adapter_for
from elakit.pipeline import Pipeline
from elakit.pipeline_call import Progress
from elakit.run import Run
from elakit.widgets.live.run_state import RunState, State

PREVIEW_SHARE = 0.25  # largest share of the time spent on previews
PREVIEWS_PER_SECOND = 10.0  # at most
_BUSY: WeakSet[Pipeline] = WeakSet()  # pipelines in use by a session: a pipeline holds the state of one run only
_GUARD = threading.Lock()


class Session:
    """Session that generates runs of a pipeline in a background thread, one at a time.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
        Pipeline that generates the images.
    on_state : callable, optional
        Called without arguments when a run starts, pauses, resumes or ends. Pauses and ends are reported in the run's
        thread, starts and resumptions in the thread that requested them.
    on_preview : callable, optional
        Called in the run's thread to show the partial run after a step. The arguments are the partial `Run`, the index
        of its last completed step, counted from 0, and the number of all steps. The last step and each step before a
        pause have a preview. Any other step has a preview only if the previous preview was at least 0.1 seconds ago and
        previews take at most a quarter of the run's time. After an error in a preview, the run has no more previews.

    Attributes
    ----------
    now : RunState
        State of the current or the last run; before the first run, ``now.state`` is "idle".

    Examples
    --------
    A run of three steps pauses after the first step, and is canceled. `wait` returns the state of the run, and `made`
    is the number of completed steps:

    >>> import elakit
    >>> session = Session(elakit.load("picture-world"))
    >>> session.start({"prompt": "a [cat]", "steps": 3}, pause_after=1)
    >>> session.wait(), session.made
    ('paused', 1)
    >>> session.cancel()
    >>> session.wait(), session.run.settings["stopped"]  # "stopped" is also the number of completed steps
    ('canceled', 1)
    """

    def __init__(
        self,
        pipe: Pipeline,
        on_state: Callable[[], None] = lambda: None,
        on_preview: Callable[[Run, int, int], None] = lambda run, step, steps: None,
    ) -> None:
        self.pipe, self.on_state, self.on_preview = pipe, on_state, on_preview
        self.now = RunState()
        self._changed = threading.Condition()  # guards and announces `now`
        self._announced: State = "idle"  # the last state that on_state has handled
        self._layout: Layout | None = None
        self._steered = False
        self._progress: Progress | None = None
        self._pace = (0.0, 0.0)  # time at which the last preview was ready, and the seconds to wait before the next

    @property
    def state(self) -> State:
        """State of the current or the last run: "running", "paused", "done", "canceled" or "failed".

        Before the first run, the state is "idle".
        """
        return self.now.state

    @property
    def made(self) -> int:
        """Number of completed steps of the run in progress or, if there is none, of the last run."""
        return self.now.made

    @property
    def run(self) -> Run | None:
        """The last run, complete or partial.

        None before the first run, and while a run is in progress. None also after a failure that left no partial run:
        no step was completed, or the image cannot be decoded.
        """
        return self.now.run

    @property
    def error(self) -> Exception | None:
        """The error that ended the last run; None if the last run did not fail, or while a run is in progress."""
        return self.now.error

    def start(self, call: dict[str, Any], pause_after: int | None = None) -> None:
        """Start a run in a thread of its own.

        Parameters
        ----------
        call : dict
            Arguments of `elakit.generate` by name, without the pipeline.
        pause_after : int, optional
            Number of steps after which the run pauses. By default the run does not pause by itself.

        Raises
        ------
        SettingError
            A run is in progress, here or in another panel with the same pipeline.
        """
        with _GUARD:
            if self.now.going:
                raise SettingError("A run is in progress: wait for its end, or cancel it, before you start another.")
            if self.pipe in _BUSY:
                raise SettingError(
                    "A run in another panel uses this pipeline: wait for its end, or cancel it in that panel."
                )
            _BUSY.add(self.pipe)
            self._steered, self._progress, self._pace = False, None, (0.0, 0.0)
            self._apply(lambda now: now.start(pause_after))
        self.on_state()
        threading.Thread(target=self._generate, args=(call,), name="elakit-live", daemon=True).start()

    def pause(self) -> None:
        """Pause after the current step; no effect when no run is in progress."""
        self._apply(RunState.pause)

    def resume(self, steps: int | None = None) -> None:
        """Resume a paused run; no effect when no run is paused.

        The run pauses again after `steps` further steps. If `steps` is None, the run continues to its end.
        """
        if self._apply(lambda now: now.resume(steps)):
            self.on_state()

    def cancel(self) -> None:
        """End the run after the current step, or at once if it is paused; no effect when no run is in progress."""
        self._apply(RunState.cancel)

    def steer(self, layout: Layout | None) -> None:
        """Give the run in progress other regions, which its method uses from the next guided step on.

        `layout` has one item per entity: a region, or None if the method is to localize the region. If `layout` itself
        is None, the method localizes all regions (see `Anchors.steer`). The call has no effect if the method cannot be
        steered, nor on later runs.
        """
        with self._changed:
            self._layout, self._steered = layout, True

    def wait(self, timeout: float | None = None) -> State:
        """Wait until the run ends or pauses, and return its `state`.

        Parameters
        ----------
        timeout : float, optional
            Longest time to wait, in seconds; by default without limit.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._announced != "running", timeout)
        return self.state

    def _apply(self, transition: Callable[[RunState], RunState]) -> bool:
        """Replace the state `now` by the state that a transition returns; True if the transition was possible.

        A transition is a method of `RunState`. If it is not possible, it returns the same object.
        """
        with self._changed:
            before, self.now = self.now, transition(self.now)
            if self.now.state == "running":
                self._announced = "running"
            self._changed.notify_all()
            return self.now is not before

    # -- in the run's thread ---------------------------------------------------------------------------------------

    def _generate(self, call: dict[str, Any]) -> None:
        state: State = "failed"
        run: Run | None = None
        failure: Exception | None = None
        try:
            run = generate(self.pipe, stop_if=self._after_step, progress=False, **call)
            state = "canceled" if "stopped" in run.settings else "done"
        except Exception as error:
            run, failure = self._partial_run(), error
        finally:
            self._progress = None
            with _GUARD:
                _BUSY.discard(self.pipe)
            self._enter(lambda now: now.end(state, run, failure))

    def _after_step(self, progress: Progress) -> bool:
        self._progress = progress
        self._apply(lambda now: now.step_made(progress.step))
        steps = max(progress.steps, len(adapter_for(self.pipe).pipe.scheduler.timesteps))  # schedulers may add steps
        last = self.made >= steps
        if not self.now.canceling:
            self._preview(progress, steps, always=last or self.now.pause_due)
        if not last and self.now.pause_due:
            self._enter(RunState.enter_pause)
        with self._changed:
            self._changed.wait_for(lambda: self.state == "running")
            if self._steered:
                self._steered = False
                for state in progress.states:
                    if isinstance(state, Anchors):
                        state.steer(self._layout)
            return self.now.canceling and not last

    def _preview(self, progress: Progress, steps: int, *, always: bool) -> None:
        """Call `on_preview` with the partial run after a step, unless previews take too much of the run's time.

        If `always` is True, `on_preview` is called however much time the previews take. `progress` gives the partial
        run, and `steps` is the number of all steps. After an error in a preview, this run has no further previews.
        """
        began = time.monotonic()
        ready, rest = self._pace
        if self.now.no_preview is not None or (began - ready < rest and not always):
            return
        try:
            self.on_preview(progress.runs(predicted=True)[0], progress.step, steps)
        except Exception as error:  # a preview that cannot be decoded must not end the run
            failure = error
            self._apply(lambda now: now.preview_failed(failure))
        now = time.monotonic()
        self._pace = now, max(1 / PREVIEWS_PER_SECOND, (now - began) * (1 / PREVIEW_SHARE - 1))

    def _partial_run(self) -> Run | None:
        """A failed run with its completed steps; None if no step was completed, or if the image cannot be decoded."""
        if self._progress is None:
            return None
        try:
            run = self._progress.runs()[0]
        except Exception:
            return None
        run.settings["stopped"] = self.made
        return run

    def _enter(self, transition: Callable[[RunState], RunState]) -> None:
        """Make the transition to a pause or an end, call `on_state`, and only then let `wait` return."""
        with self._changed:
            self.now = transition(self.now)
        try:
            self.on_state()
        finally:
            with self._changed:
                self._announced = self.state
                self._changed.notify_all()
