"""Listings of Prefect's that go on to the end: one answer of its server holds 200 rows, or what it was set to."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort


def every_flow_run(client: SyncPrefectClient, **filters: Any) -> list[FlowRun]:
    """All flow runs that match, page by page, each once.

    A run that is made meanwhile may be left out, and one that another leaves the listing before: ask again.

    Args:
        client: Whom to ask.
        filters: As ``read_flow_runs`` takes them: ``flow_filter``, ``flow_run_filter``, ``deployment_filter``.
    """
    found: dict[UUID, FlowRun] = {}
    offset = 0
    # Without a limit: a server set to fewer rows than we name would refuse.
    while page := client.read_flow_runs(**filters, sort=FlowRunSort.ID_DESC, offset=offset):
        found |= {run.id: run for run in page}
        offset += len(page)
    return list(found.values())
