"""Workers that generate the units of a sweep: processes on this machine, or the workers of an executor such as Dask's.

If a process on this machine dies, new processes are started.
"""

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
    """Interface between a sweep and the workers that generate its units.

    The interface is a context manager. On exit, worker processes that the sweep has started are ended.

    Attributes
    ----------
    width : int or None
        Largest number of units that are submitted and not yet finished. None means that all units are submitted at
        once.
    """

    width: int | None  # units submitted at a time; None: all

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Submit the function `call` with its arguments to the workers, and return the future of the result.

        Raises `concurrent.futures.BrokenExecutor` if a worker has died.
        """
        ...

    def replace(self) -> None:
        """Start new workers after a worker has died."""
        ...

    def __enter__(self) -> Workers: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None: ...


class Pool:
    """Worker processes of a sweep on this machine, started with "spawn" and not with "fork".

    A forked process would contain torch's thread pool, but no threads of the pool. Such a process could wait for the
    threads forever.

    Parameters
    ----------
    workers : int
        Number of processes.
    gpus : sequence of str
        GPUs, as entries of ``CUDA_VISIBLE_DEVICES``. Each process sees only one GPU. The GPUs are assigned to the
        processes in turn, and again from the first GPU if there are more processes than GPUs. If `gpus` is empty, every
        process sees all GPUs.
    """

    def __init__(self, workers: int, gpus: Sequence[str] = ()) -> None:
        self.width: int | None = workers
        self._gpus = tuple(gpus)
        self._open()

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Submit the function `call` with its arguments to the next free process; return the future of the result."""
        return self._executor.submit(call, *arguments)

    def replace(self) -> None:
        """End all remaining processes after a process has died, and start new processes."""
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
    """Workers of an executor that the user provides. The sweep neither starts nor ends these workers.

    Parameters
    ----------
    executor : concurrent.futures.Executor
        Executor of the user, such as Dask's.
    width : int, optional
        Largest number of units that are submitted and not yet finished. By default, all units are submitted at once.

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
        """Submit the function `call` with its arguments to the executor, and return the future of the result."""
        return self.executor.submit(call, *arguments)

    def replace(self) -> None:
        """Raise `OutputError`: a sweep cannot start new workers for an executor that the user provides."""
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
    """Context manager that connects to a Dask scheduler, and yields an executor of the scheduler's workers.

    Parameters
    ----------
    address : str
        Address of the scheduler, such as "tcp://host:8786".
    wait : float
        Longest time to wait for the first worker, in seconds.

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
    """Raise an error if a Dask cluster has no worker, or if a worker of the cluster has several threads.

    The threads of a worker share one pipeline, so only one thread at a time can generate images. All other threads of
    the worker would wait.

    Parameters
    ----------
    client : distributed.Client
        Client that is connected to the cluster.
    wait : float
        Longest time to wait for the first worker, in seconds.

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
        Device of the sweep. None and "cuda" stand for all GPUs. With a single device, such as "cuda:1" or "cpu", all
        workers use the same device and are not distributed.

    Returns
    -------
    tuple of str
        One entry per GPU. The tuple is empty if workers are not distributed, or if there is no GPU.
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
    """Default number of workers of a sweep.

    The default on GPUs is one worker per GPU. On the CPU, the default is the number of CPU cores divided by
    `threads`, but at least 1.

    Parameters
    ----------
    device : str or None
        Device of the sweep. "cuda" stands for all GPUs, and "cuda:0" for a single GPU. None stands for all GPUs, or for
        the CPU if there is no GPU.
    threads : int
        Number of torch threads per worker.

    Examples
    --------
    A single GPU has one worker. With 10,000 threads per worker, the CPU has one worker, too:

    >>> default_workers("cuda:0", 4), default_workers("cpu", 10_000)
    (1, 1)
    """
    if gpus := visible_gpus(device):
        return len(gpus)
    if device is not None and not device.startswith("cpu"):
        return 1
    return max(1, (os.cpu_count() or 1) // threads)


def _prepare(sweep: Connection, started: Any, gpus: tuple[str, ...]) -> None:
    """Initialize a worker process: choose its GPU, ignore Ctrl-C, and exit when the sweep's main process exits.

    `sweep` is a pipe from the main process. If the main process exits or is killed, the pipe is closed, and the worker
    exits, too. `started` is an integer that all workers share: the number of workers started so far. The n-th worker
    uses the n-th GPU of `gpus`. If there are more workers than GPUs, counting begins again at the first GPU.
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
