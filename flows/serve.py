"""Serve every flow as a deployment, in one process: ``python -m flows.serve``.

``hydraopt up`` starts this in its local profile. A deployment carries the name of its flow, so
``reconcile/reconcile``.
"""

from __future__ import annotations

from prefect import serve

from flows.deployments import clear_leftovers, read_entries
from infra.mlflow_webhook import listen
from infra.settings import Settings

_PROCESSES = 8
_POLL_SECONDS = 2

if __name__ == "__main__":
    listen(Settings.load())
    entries = read_entries()
    clear_leftovers(entries)
    # More processes than flows that wait for others: a waiting reconcile never blocks its merge-set.
    serve(
        *(entry.deployment() for entry in entries),
        limit=_PROCESSES,
        query_seconds=_POLL_SECONDS,
        print_starting_message=False,
    )
