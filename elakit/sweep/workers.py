"""Workers of a sweep: processes on this machine, which are replaced if one dies, or an executor such as Dask's."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType
from typing import Any, Protocol

from elakit.errors import OutputError, SettingError, clause

WAIT = 30  # seconds that a Dask scheduler may take to get its first worker


class Workers(Protocol):
    """Interface between a sweep and its workers; a context manager that ends the workers that it has started.

    Attributes
    ----------
    width : int or None
        Largest number of units (one prompt, one method and a batch of seeds) that are submitted and not yet finished;
        None if all are submitted at once.
    """

    width: int | None  # units submitted at a time; None: all

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Submit a call and return its future; `concurrent.futures.BrokenExecutor` is raised if a worker has died."""
        ...

    def replace(self) -> None:
        """Start new workers in place of broken ones."""
        ...

    def __enter__(self) -> Workers: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None: ...


class Pool:
    """Worker processes, started with "spawn".

    A fork copies only the calling thread. A forked process would therefore inherit the state of torch's thread pool
    without its threads, and could wait for them forever.

    Parameters
    ----------
    workers : int
        Number of processes.
    gpus : sequence of str
        Entries of ``CUDA_VISIBLE_DEVICES``. Each process sees one GPU: the first process the first entry, the second
        process the second one, and so on, starting over at the end. Without entries, every process sees all GPUs.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        self.width: int | None = workers
        self._gpus = tuple(gpus)
        self._open()

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Submit a call to the next free worker."""
        return self._executor.submit(call, *arguments)

    def replace(self) -> None:
        """End the remaining workers of a broken pool, and start new ones."""
        self._close(at_once=True)
        self._open()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._close(at_once=kind is not None)

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        started = context.Value("i", 0)
        self._executor = ProcessPoolExecutor(
            self.width, mp_context=context, initializer=_prepare, initargs=(theirs, started, self._gpus)
        )

    def _close(self, at_once: bool) -> None:
        if at_once:
            self._ours.close()
        self._executor.shutdown(cancel_futures=True)
        self._ours.close()


class Borrowed:
    """Workers of an executor that the caller of the sweep has started and shuts down.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    width : int, optional
        Largest number of units (one prompt, one method and a batch of seeds) that are submitted and not yet finished;
        by default all are submitted at once.

    Raises
    ------
    SettingError
        A Dask executor has no workers, or workers with more than one thread.
    """

    def __init__(self, executor: Executor, width: int | None = None) -> None:
        client = getattr(executor, "_client", None)  # of a Dask executor
        if client is not None and hasattr(client, "nthreads"):
            check_dask_workers(client)
        self.executor, self.width = executor, width

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Submit a call to the executor."""
        return self.executor.submit(call, *arguments)

    def replace(self) -> None:
        """Raise `OutputError`, because only the caller can start the executor again."""
        raise OutputError(
            f"The workers of {type(self.executor).__name__} died. Finished units are kept. Run the sweep again with a "
            "new executor."
        )

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        pass


@contextmanager
def dask_executor(address: str, wait: float = WAIT) -> Iterator[Executor]:
    """Connect to a Dask scheduler, as a context manager that yields an executor for its workers.

    Parameters
    ----------
    address : str
        Address of the scheduler, such as "tcp://host:8786".
    wait : float
        Seconds to wait for the first worker.

    Raises
    ------
    SettingError
        Dask is not installed, no scheduler answers, the scheduler has no worker, or a worker has several threads.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise SettingError(
            "--dask needs dask.distributed, which is not installed. Install it with  pip install 'elakit[dask]'"
        ) from error
    try:
        client = Client(address)
    except (OSError, ValueError) as error:
        raise SettingError(
            f"--dask {address}: no scheduler answers at this address ({clause(error)}). Start one with "
            " dask scheduler  and use the address it prints."
        ) from error
    with client:
        check_dask_workers(client, wait)
        yield client.get_executor()


def check_dask_workers(client: Any, wait: float = WAIT) -> None:
    """Refuse a Dask cluster that has no workers, or workers that run several units at once.

    A pipeline is recorded and guided through hooks, so a process generates one unit at a time; further threads of a
    worker would only wait.

    Parameters
    ----------
    client : distributed.Client
    wait : float
        Seconds to wait for the first worker.

    Raises
    ------
    SettingError
        There is no worker, or a worker has more than one thread.
    """
    try:
        client.wait_for_workers(1, timeout=wait)
    except TimeoutError:
        raise SettingError(
            f"The Dask scheduler at {client.scheduler.address} has no worker after a wait of {wait:g} s. Start workers "
            f"with  dask worker {client.scheduler.address} --nthreads 1  and try again."
        ) from None
    if wide := {address: threads for address, threads in client.nthreads().items() if threads > 1}:
        address, threads = next(iter(wide.items()))
        raise SettingError(
            f"The Dask worker {address} has {threads} threads, but a process generates one unit at a time. Start "
            "workers with  dask worker ... --nworkers N --nthreads 1"
        )


def visible_gpus(device: str | None) -> tuple[str, ...]:
    """GPUs over which workers are distributed, as entries of ``CUDA_VISIBLE_DEVICES``.

    Parameters
    ----------
    device : str or None
        None or "cuda" selects all GPUs; a single device, such as "cuda:1" or "cpu", selects none.

    Returns
    -------
    tuple of str
        Empty if workers need not be distributed, or there is no GPU.
    """
    if device not in (None, "cuda"):
        return ()
    import torch

    if not torch.cuda.is_available():
        return ()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return tuple(named[:count]) if named else tuple(map(str, range(count)))


def default_workers(device: str | None, threads: int) -> int:
    """Default number of workers: one per GPU or, on the CPU, the number of CPU cores divided by `threads`, at least 1.

    Parameters
    ----------
    device : str or None
        None or "cuda" stands for all GPUs; without a GPU, None stands for the CPU. A single GPU, such as "cuda:0", gets
        one worker.
    threads : int
        Number of torch threads per worker.

    Examples
    --------
    >>> default_workers("cuda:0", 4), default_workers("cpu", 10_000)
    (1, 1)
    """
    if gpus := visible_gpus(device):
        return len(gpus)
    if device is not None and not device.startswith("cpu"):
        return 1
    return max(1, (os.cpu_count() or 1) // threads)


def _prepare(sweep: Connection, started: Any, gpus: tuple[str, ...]) -> None:
    """Initialize a worker: choose its GPU, leave Ctrl-C to the sweep's process, and end when that process ends.

    The sweep's process holds the other end of the pipe `sweep`. When that process ends, even if it is killed, the pipe
    is closed, and the worker ends, too. `started` is a shared integer, the number of workers started so far. It selects
    the worker's entry of `gpus`, starting over at the end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if gpus:
        with started.get_lock():
            number = started.value
            started.value += 1
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]  # before CUDA is initialized in this process
    Thread(target=_end_with, args=(sweep,), daemon=True).start()


def _end_with(sweep: Connection) -> None:
    sweep.poll(None)  # nothing is ever sent: poll returns when the other end is closed
    os._exit(1)
