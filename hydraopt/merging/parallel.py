"""Modules are independent: one worker each, every operation inside it single-threaded.

So results do not depend on the number of workers, and small matrices do not wait for one another's barriers.
Workers are threads unless an executor is given: any of :mod:`concurrent.futures`' kind that can pickle closures, as
a Dask client's can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from hydraopt.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

FEW_NUMBERS = 1 << 19
"""Numbers of a module below which its operations are so short that threads wait for the interpreter's lock more than
they gain."""

_AHEAD = 16
"""Items an executor of unknown size is handed before the first result is taken."""


def in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    what: str,
    progress: Progress,
    executor: Executor | None = None,
    *,
    numbers: float = math.inf,
) -> Iterator[Result]:
    """``map`` over workers, with progress; only a few items are in memory at once.

    Args:
        function: What to do with an item.
        items: The items.
        what: Says so to the person who waits.
        progress: Told of every item that is done.
        executor: Runs the function elsewhere; None is a pool of ``torch.get_num_threads()`` threads, or of one where
            items are small.
        numbers: In an item, on average, if its work grows with them.

    Yields:
        The results in the order of ``items``.
    """
    for done, result in enumerate(_results(function, items, executor, numbers)):
        progress(done, len(items), what)
        yield result
    progress(len(items), len(items), what)


def _results(
    function: Callable[[Item], Result], items: Sequence[Item], executor: Executor | None, numbers: float
) -> Iterator[Result]:
    if executor is not None:
        yield from _through(executor, function, items, _AHEAD)
        return
    with _single_threaded_operations() as threads:
        workers = threads if numbers >= FEW_NUMBERS else 1
        with ThreadPoolExecutor(workers) as pool:
            yield from _through(pool, function, items, workers)


def _through(
    executor: Executor, function: Callable[[Item], Result], items: Sequence[Item], ahead: int
) -> Iterator[Result]:
    pending: list[Future[Result]] = []
    for item in items:
        pending.append(executor.submit(_run_alone, function, item))
        if len(pending) > ahead:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def _run_alone(function: Callable[[Item], Result], item: Item) -> Result:
    # A new thread starts with OpenMP's own default; torch keeps the setting per thread.
    torch.set_num_threads(1)
    return function(item)


@contextmanager
def _single_threaded_operations() -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
