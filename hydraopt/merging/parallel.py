"""Modules are independent: one thread each, every operation inside it single-threaded.

So results do not depend on the number of threads, and small matrices do not wait for one another's barriers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """``map`` over a pool of ``torch.get_num_threads()`` threads; only that many items are in memory at once.

    Yields:
        The results in the order of ``items``.
    """
    with _single_threaded_operations() as threads, ThreadPoolExecutor(threads) as pool:
        pending: list[Future[Result]] = []
        for item in items:
            pending.append(pool.submit(_run_alone, function, item))
            if len(pending) > threads:
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
