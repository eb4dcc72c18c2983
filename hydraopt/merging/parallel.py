"""Modules are independent: one worker each, every operation inside it single-threaded.

So results do not depend on the number of workers, and small matrices do not wait for one another's barriers.
Workers are threads unless an executor is given: any of :mod:`concurrent.futures`' kind that can pickle closures, as
a Dask client's can.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from hydraopt.errors import BudgetError
from hydraopt.progress import Progress

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 16
"""Items an executor of unknown size is handed before the first result is taken."""


def in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    what: str,
    progress: Progress,
    executor: Executor | None = None,
    *,
    alone: bool = False,
) -> Iterator[Result]:
    """``map`` over workers, with progress; only a few items are in memory at once.

    Args:
        function: What to do with an item.
        items: The items.
        what: Says so to the person who waits.
        progress: Told of every item that is done.
        executor: Runs the function elsewhere; None is a pool of ``torch.get_num_threads()`` threads.
        alone: Whether to do without other threads: where operations are so short, or only started, as on a GPU, that
            threads wait for the interpreter's lock more than they gain.

    Yields:
        The results in the order of ``items``.
    """
    for done, result in enumerate(_results(function, items, executor, alone)):
        progress(done, len(items), what)
        yield result
    progress(len(items), len(items), what)


def _results(
    function: Callable[[Item], Result], items: Sequence[Item], executor: Executor | None, alone: bool
) -> Iterator[Result]:
    if executor is not None:
        yield from _through(executor, function, items, _AHEAD)
        return
    with _single_threaded_operations() as threads:
        if alone:
            yield from (_run_alone(function, item) for item in items)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from _through(pool, function, items, threads)


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
    try:
        return function(item)
    except torch.OutOfMemoryError as reason:
        raise BudgetError(
            f"the GPU has too little memory left: {str(reason).split('. ')[0]}. Free some, or use device='cpu'"
        ) from reason


@contextmanager
def _single_threaded_operations() -> Iterator[int]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)
