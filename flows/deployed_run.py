"""Run a flow where its deployment runs, and wait for it."""

from __future__ import annotations

import time
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import TaskRunFilter, TaskRunFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment

import hydraopt.errors
from hydraopt.errors import HydraoptError, ServiceError
from tasks.verb import progress

_POLL_S = 0.5
_PICK_UP_S = 90.0
_FAILURE = "Flow run encountered an exception: "


def run_deployed(flow_name: str, parameters: dict[str, Any], *, steps: int) -> None:
    """Start the deployment ``flow_name/flow_name`` and return when its run is completed.

    Args:
        flow_name: Name of the flow and of its deployment.
        parameters: The flow's parameters.
        steps: About how many task runs it makes, for the progress bar.

    Raises:
        HydraoptError: What the flow raised, by the same class.
        ServiceError: If no runner takes the run, or the run was cancelled or crashed.
        RuntimeError: If the flow failed in a way hydraopt does not expect.
    """
    with get_client(sync_client=True) as client:
        run = run_deployment(f"{flow_name}/{flow_name}", parameters=parameters, timeout=0)
        started = time.monotonic()
        while run.state is None or not run.state.is_final():
            if _nobody_came(run) and time.monotonic() - started > _PICK_UP_S:
                raise ServiceError(
                    f"no runner took the run {run.name!r} of {flow_name} within {_PICK_UP_S:.0f} s: "
                    "see `hydraopt status`, start it with `hydraopt up`"
                )
            time.sleep(_POLL_S)
            run = client.read_flow_run(run.id)
            done = _finished_tasks(client, run)
            progress(min(done, steps - 1), steps, flow_name)
    _raise_failure(flow_name, run)
    progress(steps, steps, flow_name)


def _nobody_came(run: FlowRun) -> bool:
    """Whether the run waits for a runner, not for another run of the same deployment."""
    return run.state is not None and run.state.is_scheduled() and run.state.name in {"Scheduled", "Late"}


def _finished_tasks(client: SyncPrefectClient, run: FlowRun) -> int:
    """How many task runs of ``run`` are done."""
    runs = client.read_task_runs(
        task_run_filter=TaskRunFilter(flow_run_id=TaskRunFilterFlowRunId(any_=[run.id])), limit=200
    )
    return sum(task.state is not None and task.state.is_final() for task in runs)


def _raise_failure(flow_name: str, run: FlowRun) -> None:
    """Raise what ended the run, unless it is completed."""
    state = run.state
    if state is None or state.is_completed():
        return
    kind, _, message = (state.message or "").removeprefix(_FAILURE).partition(": ")
    known = getattr(hydraopt.errors, kind.strip(), None)
    if state.is_failed() and isinstance(known, type) and issubclass(known, HydraoptError):
        raise known(message)
    if state.is_failed():
        raise RuntimeError(f"the run {run.name!r} of {flow_name} failed: {state.message}")
    raise ServiceError(
        f"the run {run.name!r} of {flow_name} ended as {state.name}: {state.message or 'no reason given'}; "
        "nothing is lost, run it again"
    )
