"""The object store as tasks use it: one client per process, and refused if it cannot be relied on."""

from __future__ import annotations

import functools

from infra.object_store import ObjectStore
from infra.settings import Settings
from tasks.verb import verb


@functools.lru_cache(maxsize=8)
def object_store(settings: Settings) -> ObjectStore:
    """The store of these settings; making its client takes longer than most of what is asked of it."""
    return ObjectStore(settings)


@verb(task_run_name="test the object store")
def check_store(settings: Settings) -> None:
    """Refuse a store that ignores preconditions or checksums, before anything is written to it.

    Raises:
        ServiceError: If it does; names the promise it breaks.
    """
    _tested(settings)


@functools.lru_cache(maxsize=8)
def _tested(settings: Settings) -> None:
    """Test once per process."""
    object_store(settings).self_test()
