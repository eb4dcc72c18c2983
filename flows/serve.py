"""Serve every flow as a deployment, in one process: ``python -m flows.serve``.

``hydraopt up`` starts this. A deployment carries the name of its flow, so ``reconcile/reconcile``.
"""

from __future__ import annotations

from datetime import timedelta

from prefect import serve
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName, FlowRunFilter
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy, StateType
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.states import Crashed

from flows.finetune_task import finetune_task
from flows.ingest_adapter import ingest_adapter
from flows.merge_set import merge_set
from flows.reconcile import reconcile
from flows.release import release
from flows.rollback import rollback

RECONCILE_EVERY = timedelta(minutes=5)
_ONE_AT_A_TIME = ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.ENQUEUE)
_PROCESSES = 8
_POLL_SECONDS = 2
_FLOWS = (ingest_adapter, finetune_task, merge_set, reconcile, release, rollback)


def deployments() -> list[RunnerDeployment]:
    """One deployment per flow. Reconcile and merge-set run one at a time; a second run waits."""
    return [
        flow.to_deployment(
            flow.name,
            interval=RECONCILE_EVERY if flow is reconcile else None,
            concurrency_limit=_ONE_AT_A_TIME if flow in (reconcile, merge_set) else None,
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
        for flow in _FLOWS
    ]


def clear_leftovers() -> None:
    """Close the runs of a runner that was killed, and drop schedule slots that passed meanwhile.

    Prefect would call the former "running" for good, holding their concurrency slot for minutes, and run
    each of the latter. Only one runner serves a home, so whatever is open when it starts is left over.
    """
    ours = DeploymentFilter(name=DeploymentFilterName(any_=[flow.name for flow in _FLOWS]))
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(deployment_filter=ours, flow_run_filter=_in("RUNNING", "PENDING")):
            state = Crashed(message="the runner of this run was killed")
            client.set_flow_run_state(run.id, state)
        for run in client.read_flow_runs(deployment_filter=ours, flow_run_filter=_in("SCHEDULED")):
            if run.auto_scheduled:
                client.delete_flow_run(run.id)


def _in(*states: str) -> FlowRunFilter:
    """Flow runs in one of ``states``."""
    return FlowRunFilter.model_validate({"state": {"type": {"any_": [StateType(state) for state in states]}}})


if __name__ == "__main__":
    clear_leftovers()
    # More processes than flows that wait for others: a waiting reconcile never blocks its merge-set.
    serve(*deployments(), limit=_PROCESSES, query_seconds=_POLL_SECONDS, print_starting_message=False)
