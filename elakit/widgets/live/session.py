"""One run at a time in a thread of its own: started, paused, stepped, steered and cancelled from outside."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Literal, TypeAlias
from weakref import WeakSet

from elakit.errors import SettingError
from elakit.generation import Progress, Run, generate
from elakit.guidance import Anchors
from elakit.guidance.layout import Layout

State: TypeAlias = Literal["idle", "running", "paused", "done", "cancelled", "failed"]
# Previews take at most this share of the time, and there are at most so many a second.
PREVIEW_SHARE, PREVIEWS_A_SECOND = 0.25, 10.0
_DRAWING: WeakSet[Any] = WeakSet()  # pipelines that draw for a session: they hold the state of one run only
_GUARD = threading.Lock()


class Session:
    """Draws with a pipeline in a thread, one run at a time.

    Parameters
    ----------
    pipe : diffusers.DiffusionPipeline
    on_state : callable, optional
        Called with nothing when `state` has changed, from whichever thread changed it.
    on_preview : callable, optional
        Called in the run's thread with the `Run` as it is, the step, and the number of steps. Not at every step where
        drawing and decoding a preview takes long; always before a pause.

    Attributes
    ----------
    state : {"idle", "running", "paused", "done", "cancelled", "failed"}
    made : int
        Steps of this run, or of the last one.
    run : Run or None
        The last run, as far as it came.
    error : Exception or None
        What ended the last run, if it failed.

    Examples
    --------
    >>> import elakit
    >>> session = Session(elakit.load("picture-world"))
    >>> session.start({"prompt": "a [cat]", "steps": 3}, pause_after=1)
    >>> session.wait(), session.made
    ('paused', 1)
    >>> session.cancel()
    >>> session.wait(), session.run.settings["stopped"]
    ('cancelled', 1)
    """

    def __init__(
        self,
        pipe: Any,
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
        self._told: State = "idle"  # the state of which on_state has been told
        self._left: int | None = None  # steps until the run pauses; None: it goes on
        self._cancelled = False
        self._layout: Layout | None = None
        self._steered = False
        self._progress: Progress | None = None
        self._pace = (0.0, 0.0)  # when the last preview was ready, and the seconds until the next may begin

    @property
    def going(self) -> bool:
        """Whether a run is going on, paused or not."""
        return self.state in ("running", "paused")

    def start(self, call: dict[str, Any], pause_after: int | None = None) -> None:
        """Begin a run.

        Parameters
        ----------
        call : dict
            Arguments of `elakit.generate`, without the pipeline.
        pause_after : int, optional
            Pause once so many steps have been made.

        Raises
        ------
        SettingError
            A run is going on here, or the pipeline is drawing elsewhere.
        """
        with _GUARD:
            if self.going:
                raise SettingError("A run is going on: wait for its end, or cancel it, before you start another.")
            if self.pipe in _DRAWING:
                raise SettingError("The pipeline is drawing for another panel: wait for its end, or cancel it there.")
            _DRAWING.add(self.pipe)
            self.made, self.run, self.error, self.no_preview = 0, None, None, None
            self._left, self._cancelled, self._steered = pause_after, False, False
            self._progress, self._pace = None, (0.0, 0.0)
            self.state = self._told = "running"
        self.on_state()
        threading.Thread(target=self._draw, args=(call,), name="elakit-live", daemon=True).start()

    def pause(self) -> None:
        """Pause after the step that is being made; nothing where no run is going on."""
        with self._changed:
            if self.state == "running":
                self._left = 0

    def resume(self, steps: int | None = None) -> None:
        """Go on after a pause, to the end or for so many steps; nothing where the run is not paused."""
        with self._changed:
            if self.state != "paused":
                return
            self._left = steps
            self.state = self._told = "running"
            self._changed.notify_all()
        self.on_state()

    def cancel(self) -> None:
        """End the run after the step that is being made; nothing where no run is going on."""
        with self._changed:
            if not self.going:
                return
            self._cancelled = True
            self.state = self._told = "running"
            self._changed.notify_all()

    def steer(self, layout: Layout | None) -> None:
        """Anchor the run to these regions from its next guided step on, as `Anchors.steer` takes them."""
        with self._changed:
            self._layout, self._steered = layout, True

    def wait(self, timeout: float | None = None) -> State:
        """Wait until the run ends or pauses; gives the state.

        Parameters
        ----------
        timeout : float, optional
            Seconds to wait at most.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._told != "running", timeout)
        return self.state

    # -- in the run's thread ---------------------------------------------------------------------------------------

    def _draw(self, call: dict[str, Any]) -> None:
        state: State = "failed"
        try:
            self.run = generate(self.pipe, stop_if=self._after_step, progress=False, **call)
            state = "cancelled" if "stopped" in self.run.settings else "done"
        except Exception as error:
            self.error = error
            self.run = self._rescued()
        finally:
            self._progress = None
            with _GUARD:
                _DRAWING.discard(self.pipe)
            self._tell(state)

    def _after_step(self, progress: Progress) -> bool:
        self.made, self._progress = progress.step + 1, progress
        steps = max(progress.steps, len(self.pipe.scheduler.timesteps))  # some schedulers make more of them
        last = self.made >= steps
        with self._changed:
            if self._left:
                self._left -= 1
        pausing = self._left == 0 and not last
        if not self._cancelled:
            self._preview(progress, steps, always=pausing or last)
        if self._left == 0 and not last and not self._cancelled:
            self._tell("paused")
        with self._changed:
            self._changed.wait_for(lambda: self.state == "running" or self._cancelled)
            if self._steered:
                self._steered = False
                for state in progress.states:
                    if isinstance(state, Anchors):
                        state.steer(self._layout)
            return self._cancelled and not last

    def _preview(self, progress: Progress, steps: int, *, always: bool) -> None:
        """Show the run as it is, unless that would hold it up."""
        began = time.monotonic()
        ready, rest = self._pace
        if self.no_preview is not None or (began - ready < rest and not always):
            return
        try:
            self.on_preview(progress.runs()[0], progress.step, steps)
        except Exception as error:  # an image that cannot be decoded yet is no reason to lose the run
            self.no_preview = error
        now = time.monotonic()
        self._pace = now, max(1 / PREVIEWS_A_SECOND, (now - began) * (1 / PREVIEW_SHARE - 1))

    def _rescued(self) -> Run | None:
        """A failed run as far as it came."""
        if self._progress is None:
            return None
        try:
            run = self._progress.runs()[0]
        except Exception:
            return None
        run.settings["stopped"] = self.made
        return run

    def _tell(self, state: State) -> None:
        """Be in a state; those who wait for it go on once `on_state` is through."""
        self.state = state
        try:
            self.on_state()
        finally:
            with self._changed:
                self._told = self.state
                self._changed.notify_all()
