"""Distribution of work among processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

R = TypeVar("R")


def in_order(task: Callable[..., R], arguments: Sequence[tuple[Any, ...]], workers: int = 0) -> Iterator[R]:
    """Yield ``task(*a)`` for each tuple ``a`` in `arguments`, in the order of `arguments`.

    Parameters
    ----------
    task : callable
        Function defined at the top level of a module, because other processes must be able to import it.
    arguments : sequence of tuple
    workers : int
        Number of processes that compute. If `workers` is 0, this process computes.

    Examples
    --------
    >>> list(in_order(pow, [(2, 3), (3, 2)]))
    [8, 9]
    """
    if not workers:
        yield from (task(*given) for given in arguments)
        return
    # spawned, not forked: a fork copies locks that torch's threads hold, which are never released in the new process
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(task, *zip(*arguments, strict=True))
