"""The decorator of every task, and how a task tells of its progress.

A task is one library call. It is never cached by Prefect: each one looks into the object store for what
is already there, so a rerun after a kill continues wherever the last one stopped.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from hydraopt.errors import DeniedError, ServiceError

ProgressCallback = Callable[[int, int, str], None]
"""``progress(done, total, what)``."""

_callback: contextvars.ContextVar[ProgressCallback | None] = contextvars.ContextVar(
    "hydraopt_progress", default=None
)


@contextlib.contextmanager
def reporting(callback: ProgressCallback) -> Iterator[None]:
    """Let tasks that run in this context report to ``callback``.

    A context variable and no argument: Prefect would store an argument on its server.
    """
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


def progress(done: int, total: int, what: str) -> None:
    """Report to whoever listens: the command line, or nobody in a deployed run."""
    callback = _callback.get()
    if callback is not None:
        callback(done, total, what)


def _is_service_error(_task: Any, _run: Any, state: Any) -> bool:
    """Whether a failed run may end well on a second try. Bad input fails the same way each time."""
    return isinstance(state.data, ServiceError) and not isinstance(state.data, DeniedError)


verb = functools.partial(
    task,
    cache_policy=NO_CACHE,
    retries=2,
    retry_delay_seconds=[1, 4],
    retry_condition_fn=_is_service_error,
)
"""``@verb()``: a Prefect task that tries again when a server failed, and only then."""
