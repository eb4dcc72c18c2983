"""Runs that wait behind the one that already does their work."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import State

from tasks.prefect_pages import every_flow_run

_RECONCILE = FlowFilter.model_validate({"name": {"any_": ["reconcile"]}})
_SCHEDULED = FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType.SCHEDULED]}}})


class Waiting(NamedTuple):
    """Runs of reconcile that were asked for until now and have not begun: by the trigger, and by people and scripts."""

    triggered: frozenset[UUID]
    asked: frozenset[UUID]


def reconciles_that_wait() -> Waiting:
    """Ask before reading the registry.

    Each stands for a change that was made before it: whoever reads the registry now sees all of them. What somebody
    planned for later is not among them.
    """
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        runs = every_flow_run(client, flow_filter=_RECONCILE, flow_run_filter=_SCHEDULED)
    triggered = frozenset(run.id for run in runs if _of_the_trigger(run))
    return Waiting(triggered, frozenset(run.id for run in runs if _is_due(run, now)) - triggered)


def close_waiting(runs: Iterable[UUID], end: State[Any]) -> None:
    """End runs that :func:`reconciles_that_wait` found in this state, unless one has begun meanwhile."""
    with get_client(sync_client=True) as client:
        for run_id in runs:
            state = client.read_flow_run(run_id).state
            if state is not None and state.is_scheduled():
                client.set_flow_run_state(run_id, end)


def _of_the_trigger(run: FlowRun) -> bool:
    """Whether an event made it, which plans it some seconds ahead."""
    return run.created_by is not None and run.created_by.type == "AUTOMATION"


def _is_due(run: FlowRun, now: datetime) -> bool:
    """Whether it was to begin by now. It keeps that time however often it is put off behind another run."""
    return run.expected_start_time is not None and run.expected_start_time <= now
