"""Run a flow where its deployment runs, and wait for it."""

from __future__ import annotations

import itertools
import time
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.deployments import run_deployment

import hydraopt.errors
from flows.deployments import PROCESSES
from hydraopt.errors import HydraoptError, ServiceError
from infra.settings import Settings
from tasks.stale_runs import close_dead_runs
from tasks.verb import progress

_POLL_S = 0.5
_PICK_UP_S = 90.0
_LOOK_FOR_DEAD_S = 60.0
_FAILURE = "Flow run encountered an exception: "
_ENDED = {"type": {"any_": [state.value for state in TERMINAL_STATES]}}
_UNDER_WAY = {StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING}


def run_deployed(flow_name: str, parameters: dict[str, Any], *, steps: int, work: str | None = None) -> None:
    """Start the deployment ``flow_name/flow_name`` and return when its run is completed.

    Args:
        flow_name: Name of the flow and of its deployment.
        parameters: The flow's parameters.
        steps: About how many task runs it makes, for the progress bar.
        work: What is to be done, such as a fingerprint: callers that name the same work wait for one run, which
            the first of them starts. Once that has ended, however it went, the next caller starts another one.

    Raises:
        HydraoptError: What the flow raised, by the same class.
        ServiceError: If no runner takes the run, or the run was cancelled or crashed.
        RuntimeError: If the flow failed in a way hydraopt does not expect.
    """
    settings = Settings.load()
    with get_client(sync_client=True) as client:
        if work is None:
            run = run_deployment(f"{flow_name}/{flow_name}", parameters=parameters, timeout=0)
        else:
            run = _start_or_join(client, flow_name, parameters, work)
        started = looked = time.monotonic()
        while run.state is None or not run.state.is_final():
            if _nobody_came(run) and time.monotonic() - started > _PICK_UP_S:
                if not _are_all_busy(client):
                    raise ServiceError(
                        f"no runner took the run {run.name!r} of {flow_name} within {_PICK_UP_S:.0f} s: "
                        "see `hydraopt status`, start it with `hydraopt up`"
                    )
                started = time.monotonic()
            if time.monotonic() - looked > _LOOK_FOR_DEAD_S:
                # Killed together with the worker that would have told: nobody else looks while we wait.
                close_dead_runs.fn(settings)
                looked = time.monotonic()
            time.sleep(_POLL_S)
            run = client.read_flow_run(run.id)
            done = _finished_tasks(client, run)
            progress(min(done, steps - 1), steps, flow_name)
    _raise_failure(flow_name, run)
    progress(steps, steps, flow_name)


def _start_or_join(
    client: SyncPrefectClient, flow_name: str, parameters: dict[str, Any], work: str
) -> FlowRun:
    """The run of this work that is under way; a new one if there is none.

    Prefect gives all who ask for the same number the same run, so of many who ask at once one starts it.
    """
    tag = f"{flow_name}:{work}"
    ended = client.count_flow_runs(
        flow_run_filter=FlowRunFilter.model_validate({"tags": {"all_": [tag]}, "state": _ENDED})
    )
    for number in itertools.count(ended + 1):
        run = run_deployment(
            f"{flow_name}/{flow_name}",
            parameters=parameters,
            timeout=0,
            tags=[tag],
            idempotency_key=f"{tag}:{number}",
        )
        if run.state is None or run.state.type in _UNDER_WAY:
            return run
    raise AssertionError("unreachable")


def _are_all_busy(client: SyncPrefectClient) -> bool:
    """Whether as many deployed runs are under way as a runner has processes for."""
    under_way = {
        "deployment_id": {"is_null_": False},
        "state": {"type": {"any_": [StateType.PENDING.value, StateType.RUNNING.value]}},
    }
    return client.count_flow_runs(flow_run_filter=FlowRunFilter.model_validate(under_way)) >= PROCESSES


def _nobody_came(run: FlowRun) -> bool:
    """Whether the run waits for a runner, not for another run of the same deployment."""
    return run.state is not None and run.state.is_scheduled() and run.state.name in {"Scheduled", "Late"}


def _finished_tasks(client: SyncPrefectClient, run: FlowRun) -> int:
    """How many task runs of ``run`` are done: a number, for there are two of every adapter."""
    of_run = {"flow_run_id": {"any_": [str(run.id)]}, "state": _ENDED}
    return int(client.request("POST", "/task_runs/count", json={"task_runs": of_run}).json())


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
