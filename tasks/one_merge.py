"""One merge at a time, wherever it is started and whatever died before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import filelock
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

from hydraopt.errors import ServiceError
from infra.settings import Settings

MERGE_LIMIT = "merge-set"
"""Name of the limit on Prefect's server that every merge takes its one slot from."""

_LONGEST_MERGE_S = 6 * 3600
_LEASE_S = 60  # Prefect's shortest: so long a killed merge holds up the next one


@contextlib.contextmanager
def only_merge(settings: Settings) -> Iterator[None]:
    """Hold the deployment's one merge slot and this host's merge lock.

    The slot keeps merges on other hosts away. Its lease may be lost while a merge is going on, as when Prefect's
    server is restarted: then the merge goes on, and the lock keeps another one from this host's memory.

    Raises:
        ServiceError: If another merge holds the lock for six hours.
    """
    _ensure_limit()
    with (
        # Strict: a limit that is not there would otherwise let everybody through with a warning.
        concurrency(MERGE_LIMIT, strict=True, lease_duration=_LEASE_S, raise_on_lease_renewal_failure=False),
        only_merge_on_this_host(settings),
    ):
        yield


@contextlib.contextmanager
def only_merge_on_this_host(settings: Settings) -> Iterator[None]:
    """Hold the host's merge lock: Prefect's limit alone does not stop a run it believes dead.

    Raises:
        ServiceError: If another merge holds it for six hours.
    """
    path = settings.home / "locks" / "merge-set.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path, timeout=_LONGEST_MERGE_S):
            yield
    except filelock.Timeout:
        raise ServiceError(f"another merge-set has held {path} for hours: stop that process") from None


def _ensure_limit() -> None:
    """Have the limit on the server; one that is there keeps what somebody set it to."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(MERGE_LIMIT)
        except ObjectNotFound:
            with contextlib.suppress(ObjectAlreadyExists):
                client.create_global_concurrency_limit(
                    GlobalConcurrencyLimitCreate(name=MERGE_LIMIT, limit=1)
                )
