"""Serve every flow as a deployment, in one process: ``python -m flows.serve``.

``hydraopt up`` starts this. A deployment carries the name of its flow, so ``reconcile/reconcile``.
"""

from __future__ import annotations

from datetime import timedelta

from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.runner import EntrypointType, RunnerDeployment

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


def deployments() -> list[RunnerDeployment]:
    """One deployment per flow. Reconcile and merge-set run one at a time; a second run waits."""
    plain = [ingest_adapter, finetune_task, release, rollback]
    return [
        *(flow.to_deployment(flow.name, entrypoint_type=EntrypointType.MODULE_PATH) for flow in plain),
        reconcile.to_deployment(
            reconcile.name,
            interval=RECONCILE_EVERY,
            concurrency_limit=_ONE_AT_A_TIME,
            entrypoint_type=EntrypointType.MODULE_PATH,
        ),
        merge_set.to_deployment(
            merge_set.name,
            concurrency_limit=_ONE_AT_A_TIME,
            entrypoint_type=EntrypointType.MODULE_PATH,
        ),
    ]


if __name__ == "__main__":
    # More processes than flows that wait for others: a waiting reconcile never blocks its merge-set.
    serve(*deployments(), limit=_PROCESSES, query_seconds=_POLL_SECONDS, print_starting_message=False)
