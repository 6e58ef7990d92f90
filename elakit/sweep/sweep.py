"""Run a sweep: hand units to workers, keep what they draw, and go on where an earlier sweep was ended."""

from __future__ import annotations

import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from elakit.errors import OutputError, SettingError
from elakit.sweep import store
from elakit.sweep.drawing import draw
from elakit.sweep.store import table
from elakit.sweep.units import Unit, plan
from elakit.sweep.workers import Borrowed, Pool, Workers, default_workers

__all__ = ["Outcome", "Unit", "draw", "plan", "run", "table"]

Draw = Callable[[Unit], list[dict[str, Any]]]

REDRAWS = 3  # of a unit whose workers die
GIVEN_UP = 2  # units given up in a row for that, with nothing drawn in between: then it is not the units


@dataclass(frozen=True)
class Outcome:
    """What a call of `run` did.

    Attributes
    ----------
    there : int
        Units that were finished before.
    drawn : int
        Units that it finished.
    failed : dict of str to str
        Key and error of those that failed; they are tried again by the next call.
    """

    there: int
    drawn: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """An error as text: an exception itself may be one that no other process can load."""

    error: str
    details: str = ""


def run(
    units: Iterable[Unit],
    folder: str | Path,
    executor: Executor | None = None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    draw: Draw = draw,
    on_progress: Callable[[int, int], object] | None = None,
) -> Outcome:
    """Draw the units that a folder does not hold yet, and keep them there.

    A unit that raises is noted in ``failed/`` and tried again by the next call. A worker process that dies is replaced,
    and what was being drawn is drawn again, one unit at a time, each at most three times. The same threads, device and
    batches give the same table, however often a sweep was ended and taken up again, the seconds aside.

    Parameters
    ----------
    units : iterable of Unit
        From `plan`.
    folder : str or Path
        Made where it is not there. Sweeps of other settings may share it: their units have other keys.
    executor : concurrent.futures.Executor, optional
        Draws them, such as ``distributed.Client(address).get_executor()``; it needs no access to the folder. Default:
        processes of this machine (so a script that calls this needs ``if __name__ == "__main__":``).
    workers : int, optional
        How many; by default the number of processors over `threads`, and 1 where a GPU draws. For an `executor`: how
        many units it is handed at a time, by default all.
    threads : int, optional
        Of torch, in each worker; default: 1 in our own workers, and left alone in those of an `executor`.
    draw : callable
        Gives the rows of a unit; a function at the top of a module, for workers to find it.
    on_progress : callable, optional
        Called with (images done, images in all) at the start and whenever a unit is done; failed ones count.

    Returns
    -------
    Outcome

    Raises
    ------
    SettingError
        A number outside its range.
    OutputError
        The folder cannot be written to; the workers die whatever they are given.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from tempfile import TemporaryDirectory
    >>> def pretend(unit):
    ...     return [{**unit.labels(), "seed": seed, "success": seed > 1} for seed in unit.seeds]
    >>> with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
    ...     outcome = run(plan(["a cat and a lion"], [1, 3]), folder, pool, draw=pretend)
    ...     found = table(folder)
    >>> outcome
    Outcome(there=0, drawn=2, failed={})
    >>> found[["seed", "method", "success"]].values.tolist()
    [[1, 'ela', False], [1, 'plain', False], [3, 'ela', True], [3, 'plain', True]]
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise SettingError(f"{name}={value}: must be 1 or more.")
    every = list(dict.fromkeys(units))
    if not every:
        raise SettingError("There is no unit to draw; see elakit.sweep.plan.")
    folder = store.prepare(folder, every)
    missing = [unit for unit in every if not store.there(folder, unit)]
    total = sum(len(unit.seeds) for unit in every)
    done = total - sum(len(unit.seeds) for unit in missing)
    report = on_progress or (lambda done, total: None)
    report(done, total)
    if not missing:
        return Outcome(len(every))
    crew: Workers
    if executor is None:
        threads = threads or 1
        crew = Pool(min(len(missing), workers or default_workers(every[0].device, threads)))
    else:
        crew = Borrowed(executor, workers)
    drawn, failed = 0, dict[str, str]()
    with crew, closing(_results(missing, crew, draw, threads)) as results:
        for unit, result in results:
            if isinstance(result, _Failure):
                store.note(folder, unit, result.error, result.details)
                failed[unit.key] = result.error
            else:
                store.keep(folder, unit, result)
                drawn += 1
            done += len(unit.seeds)
            report(done, total)
    return Outcome(len(every) - len(missing), drawn, failed)


def _results(
    units: Iterable[Unit], crew: Workers, draw: Draw, threads: int | None
) -> Generator[tuple[Unit, pa.Table | _Failure], None, None]:
    """Each unit with what came of it, as it comes."""
    waiting, suspects = deque(units), deque[Unit]()
    running: dict[Future[pa.Table | _Failure], Unit] = {}
    deaths = Counter[str]()
    given_up, broken = 0, False

    def hand_out() -> None:
        # What was being drawn when a worker died is drawn alone: if one dies again, it is known which unit did it.
        while waiting or suspects:
            alone = bool(suspects) or any(deaths[unit.key] for unit in running.values())
            if running and (alone or len(running) == crew.width):
                return
            queue = suspects or waiting
            running[crew.submit(_call, draw, queue[0], threads)] = queue[0]
            queue.popleft()

    try:
        while waiting or suspects or running:
            try:
                if broken and not running:
                    crew.replace()
                    broken = False
                if not broken:
                    hand_out()
            except BrokenExecutor:
                broken = True
            wait(running, return_when=FIRST_COMPLETED)
            for future in [each for each in running if each.done()]:
                unit = running.pop(future)
                try:
                    result = future.result()
                    given_up = 0
                except BrokenExecutor:
                    broken = True
                    deaths[unit.key] += 1
                    if deaths[unit.key] <= REDRAWS:
                        suspects.append(unit)
                        continue
                    given_up += 1
                    result = _Failure(f"The worker process died {REDRAWS + 1} times: out of memory, perhaps.")
                except Exception as error:  # of a borrowed executor, such as Dask's KilledWorker
                    result = _failure(error)
                yield unit, result
                if given_up == GIVEN_UP:
                    raise OutputError(
                        f"The workers died each time they drew {GIVEN_UP} units in a row. Use fewer workers if memory "
                        'is short; a script that calls run needs `if __name__ == "__main__":`.'
                    )
    finally:
        for future in running:
            future.cancel()


def _call(draw: Draw, unit: Unit, threads: int | None) -> pa.Table | _Failure:
    """What a worker does."""
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        return store.as_table(unit, draw(unit))
    except Exception as error:  # a unit that fails must not end the sweep
        return _failure(error)


def _failure(error: Exception) -> _Failure:
    return _Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
