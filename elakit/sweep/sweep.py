"""Execution of a sweep: units are distributed to workers, and an interrupted sweep is resumed."""

from __future__ import annotations

import os
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, wait
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from elakit import checks
from elakit.errors import OutputError, SettingError
from elakit.sweep import store
from elakit.sweep.generation import generate_unit
from elakit.sweep.units import Unit
from elakit.sweep.units import shard as select_shard
from elakit.sweep.workers import Borrowed, Pool, Workers, default_workers, visible_gpus

Generate = Callable[..., list[dict[str, Any]]]

RETRIES = 3  # of a unit whose worker died
GIVEN_UP = 2  # consecutive units given up, without a finished one in between, after which the sweep ends


@dataclass(frozen=True)
class Outcome:
    """Result of `run`: the numbers of finished units, and the errors of failed units.

    Attributes
    ----------
    earlier : int
        Number of units that were already finished when `run` was called.
    generated : int
        Number of units that this call of `run` finished.
    failed : dict of str to str
        Error message of each unit that failed, by the unit's key. The next call tries these units again.
    """

    earlier: int
    generated: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Failure:
    """Error of a failed unit as text.

    The exception itself is not stored, because another process may be unable to unpickle the exception.

    Attributes
    ----------
    error : str
        Type and message of the exception.
    details : str
        Traceback of the exception.
    """

    error: str
    details: str = ""


def run(
    units: Iterable[Unit],
    folder: str | Path,
    executor: Executor | None = None,
    *,
    workers: int | None = None,
    threads: int | None = None,
    shard: tuple[int, int] | None = None,
    keep_images: bool = False,
    generate: Generate = generate_unit,
    on_progress: Callable[[int, int], object] | None = None,
) -> Outcome:
    """Generate the units of a sweep that are not finished yet, and store the results in the folder of the sweep.

    If a unit raises an exception, the error is written to ``failed/``, and the next call tries the unit again. If a
    worker process on this machine dies, it is replaced. The units that were running are then repeated one at a time,
    each at most three times.

    An interruption does not change the table of the sweep, except for the generation times. This requires that all
    calls use the same device, the same batches and the same number of threads.

    Parameters
    ----------
    units : iterable of Unit
        Units, as `plan` returns them.
    folder : str or Path
        Folder of the sweep, created if necessary. Several sweeps with different settings can have the same folder.
    executor : concurrent.futures.Executor, optional
        Executor that generates the units, such as ``distributed.Client(address).get_executor()``. The executor's
        workers need no access to the folder. By default, processes are started on this machine. These processes import
        the script that calls `run`, so the call must be inside ``if __name__ == "__main__":``.
    workers : int, optional
        Without `executor`: number of processes. Default: one process per GPU or, without a GPU, the number of CPU cores
        divided by `threads`. With `executor`: largest number of units that are submitted and not yet finished. Default:
        no limit.
    threads : int, optional
        Number of torch threads per worker. Default: 1 for processes on this machine. The workers of an `executor` keep
        their own setting by default.
    shard : (int, int), optional
        Pair (index, count), with the index from 1 to `count`. The units are divided into `count` shards, and only the
        units of the shard with this index are generated. See `elakit.sweep.shard`.
    keep_images : bool
        True to store every image as PNG in ``images/``. Units that were finished without images are generated again.
    generate : callable
        Function that generates a unit and returns one row per image, as `generate_unit` does. The workers must be able
        to import the function. If `keep_images` is True, the function is called with ``keep_images=True``, too.
    on_progress : callable, optional
        Function that is called with two numbers: images done, and images in total. The function is called at the start
        and after each unit. Images of failed units count as done.

    Returns
    -------
    Outcome

    Raises
    ------
    SettingError
        There is no unit, a number is out of range, or a Dask executor has no workers or workers with several threads.
    OutputError
        The folder cannot be written to, two units in a row failed because their workers died, or a worker of an
        `executor` died.

    Examples
    --------
    One prompt and the default methods "plain" and "ela" give two units, each with the seeds 1 and 3. The function
    `pretend` generates no images, and reports that the images of seeds above 1 are right:

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> from tempfile import TemporaryDirectory
    >>> from elakit.sweep import plan, table
    >>> def pretend(unit):
    ...     return [{**unit.labels(), "seed": seed, "success": seed > 1} for seed in unit.seeds]
    >>> with TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:
    ...     outcome = run(plan(["a cat and a lion"], [1, 3]), folder, pool, generate=pretend)
    ...     found = table(folder)
    >>> outcome
    Outcome(earlier=0, generated=2, failed={})
    >>> found[["seed", "method", "success"]].values.tolist()
    [[1, 'ela', False], [1, 'plain', False], [3, 'ela', True], [3, 'plain', True]]
    """
    for name, value in (("workers", workers), ("threads", threads)):
        if value is not None:
            checks.whole_number(value, name, 1)
    every = list(dict.fromkeys(units))
    if not every:
        raise SettingError("There is no unit to generate. Create units with elakit.sweep.plan.")
    mine = every if shard is None else select_shard(every, *shard)
    folder = store.prepare(folder, every)
    missing = [unit for unit in mine if not store.finished(folder, unit, keep_images)]
    total = sum(len(unit.seeds) for unit in mine)
    done = total - sum(len(unit.seeds) for unit in missing)
    report = on_progress or (lambda done, total: None)
    report(done, total)
    if not missing:
        return Outcome(len(mine))
    crew: Workers
    if executor is None:
        threads, device = threads or 1, every[0].device
        crew = Pool(min(len(missing), workers or default_workers(device, threads)), visible_gpus(device))
    else:
        crew = Borrowed(executor, workers)
    call = partial(generate, keep_images=True) if keep_images else generate
    generated, failed = 0, dict[str, str]()
    with crew, closing(_results(missing, crew, call, threads)) as results:
        for unit, result in results:
            if isinstance(result, _Failure):
                store.note_failure(folder, unit, result.error, result.details)
                failed[unit.key] = result.error
            else:
                store.save(folder, unit, result)
                generated += 1
            done += len(unit.seeds)
            report(done, total)
    return Outcome(len(mine) - len(missing), generated, failed)


def _results(
    units: Iterable[Unit], crew: Workers, generate: Generate, threads: int | None
) -> Generator[tuple[Unit, store.Result | _Failure], None, None]:
    """Let the workers generate units, and yield each unit with its result or its failure as soon as the unit ends."""
    queue = _Queue(units, crew, partial(_call, generate, threads))
    try:
        while queue.unfinished():
            queue.submit()
            for finished in queue.collect():
                yield finished
                if queue.given_up == GIVEN_UP:
                    raise OutputError(
                        f"The workers died on {GIVEN_UP} units in a row. If memory is short, use fewer workers. "
                        'If a script calls elakit.sweep.run, put the call inside `if __name__ == "__main__":`.'
                    )
    finally:
        queue.cancel()


class _Queue:
    """Queue of the units that have no result yet, including the units that are running.

    If a worker dies, each running unit may be the cause. These units are repeated one at a time. The next death of a
    worker then has only one possible cause.

    Parameters
    ----------
    units : iterable of Unit
        Units to generate.
    crew : Workers
        Workers that generate the units.
    generate : callable
        Function that a worker calls with a unit, and that returns the unit's result or failure.
    """

    def __init__(
        self, units: Iterable[Unit], crew: Workers, generate: Callable[[Unit], store.Result | _Failure]
    ) -> None:
        self.crew, self.generate = crew, generate
        self.waiting, self.suspects = deque(units), deque[Unit]()
        self.running: dict[Future[store.Result | _Failure], Unit] = {}
        self.deaths = Counter[str]()  # of workers, by the unit that was running
        self.given_up = 0  # consecutive units whose worker died too often
        self.broken = False  # a worker has died, and the crew is not replaced yet

    def unfinished(self) -> bool:
        """Return True as long as any unit has no result."""
        return bool(self.waiting or self.suspects or self.running)

    def submit(self) -> None:
        """Submit waiting units to free workers.

        After a worker has died, no unit is submitted until all running units have ended and dead workers are replaced.
        """
        try:
            if self.broken and not self.running:
                self.crew.replace()
                self.broken = False
            while not self.broken and (self.waiting or self.suspects) and self._has_room():
                units = self.suspects or self.waiting
                self.running[self.crew.submit(self.generate, units[0])] = units[0]
                units.popleft()
        except BrokenExecutor:
            self.broken = True

    def _has_room(self) -> bool:
        alone = bool(self.suspects) or any(self.deaths[unit.key] for unit in self.running.values())
        return not self.running or not (alone or len(self.running) == self.crew.width)

    def collect(self) -> Iterator[tuple[Unit, store.Result | _Failure]]:
        """Wait until at least one unit has ended, and yield each ended unit with its result or its failure.

        If the worker of a unit dies, the unit is not yielded, but repeated. If its worker also dies at the third
        repetition, the unit has failed.
        """
        wait(self.running, return_when=FIRST_COMPLETED)
        for future in [each for each in self.running if each.done()]:
            unit = self.running.pop(future)
            try:
                result = future.result()
                self.given_up = 0
            except BrokenExecutor:
                self.broken = True
                self.deaths[unit.key] += 1
                if self.deaths[unit.key] <= RETRIES:
                    self.suspects.append(unit)
                    continue
                self.given_up += 1
                result = _Failure(f"The worker process died {RETRIES + 1} times, possibly for lack of memory.")
            except Exception as error:  # of the caller's executor, such as Dask's KilledWorker
                result = _failure(error)
            yield unit, result

    def cancel(self) -> None:
        """Cancel the units that were submitted and have not begun."""
        for future in self.running:
            future.cancel()


def _call(generate: Generate, threads: int | None, unit: Unit) -> store.Result | _Failure:
    """Generate a unit in a worker, and return the unit's result, or its failure if an exception was raised.

    `generate` is the function that generates the unit. `threads` is the number of torch threads; None does not change
    this number.
    """
    if threads is not None:
        _set_threads(threads)
    try:
        return store.as_result(unit, generate(unit))
    except Exception as error:  # a failing unit must not end the sweep
        return _failure(error)


def _set_threads(threads: int) -> None:
    """Set the number of torch threads, without importing torch in a worker that does not need it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    else:
        os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)  # read when torch is imported


def _failure(error: Exception) -> _Failure:
    return _Failure(f"{type(error).__name__}: {error}", "".join(traceback.format_exception(error)))
