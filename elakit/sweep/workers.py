"""Worker processes of a sweep: replaced when one dies, and gone when the sweep is."""

from __future__ import annotations

import multiprocessing
import os
import signal
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from multiprocessing.connection import Connection
from threading import Thread
from types import TracebackType
from typing import Any, Protocol

import torch

from elakit.errors import OutputError


class Workers(Protocol):
    """What a sweep asks of those that draw for it."""

    width: int | None  # units that are handed out at a time; None: all

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Have a call made; raises `concurrent.futures.BrokenExecutor` once a worker has died."""
        ...

    def replace(self) -> None:
        """New workers for those that broke."""
        ...

    def __enter__(self) -> Workers: ...

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None: ...


class Pool:
    """Worker processes of our own, each started afresh ("spawn"), because a forked copy of torch's threads hangs.

    Parameters
    ----------
    workers : int
    """

    def __init__(self, workers: int) -> None:
        self.width: int | None = workers
        self._open()

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Have a call made by a free worker."""
        return self._executor.submit(call, *arguments)

    def replace(self) -> None:
        """New workers for those that broke; the others of a broken pool end with it."""
        self._close(at_once=True)
        self._open()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._close(at_once=kind is not None)

    def _open(self) -> None:
        context = multiprocessing.get_context("spawn")
        theirs, self._ours = context.Pipe(duplex=False)
        self._executor = ProcessPoolExecutor(self.width, mp_context=context, initializer=_prepare, initargs=(theirs,))

    def _close(self, at_once: bool) -> None:
        if at_once:
            self._ours.close()
        self._executor.shutdown(cancel_futures=True)
        self._ours.close()


class Borrowed:
    """An executor that somebody else started and will shut down.

    Parameters
    ----------
    executor : concurrent.futures.Executor
    width : int, optional
    """

    def __init__(self, executor: Executor, width: int | None = None) -> None:
        self.executor, self.width = executor, width

    def submit(self, call: Any, *arguments: Any) -> Future[Any]:
        """Hand a call on."""
        return self.executor.submit(call, *arguments)

    def replace(self) -> None:
        """It cannot be replaced from here."""
        raise OutputError(
            f"The workers of {type(self.executor).__name__} died. Finished units are kept; run the sweep again with a "
            "new executor."
        )

    def __enter__(self) -> Borrowed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        pass


def default_workers(device: str | None, threads: int) -> int:
    """One where a GPU draws; else as many as the processor has room for.

    Examples
    --------
    >>> default_workers("cuda", 4), default_workers("cpu", 10_000)
    (1, 1)
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return 1 if device.startswith("cuda") else max(1, (os.cpu_count() or 1) // threads)


def _prepare(sweep: Connection) -> None:
    """Begin a worker: the sweep alone answers Ctrl-C, and its end, be it by SIGKILL, ends the worker too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    Thread(target=_leave_with, args=(sweep,), daemon=True).start()


def _leave_with(sweep: Connection) -> None:
    sweep.poll(None)  # nothing is ever sent: it returns when the other end is closed
    os._exit(1)
