"""Serve every flow as a deployment, in one process: ``python -m flows.serve``.

``hydraopt up`` starts this in its local profile. A deployment carries the name of its flow, so
``reconcile/reconcile``.
"""

from __future__ import annotations

from prefect import serve

from flows.deployments import PROCESSES, clear_leftovers, read_entries
from infra.mlflow_webhook import listen
from infra.settings import Settings

_POLL_SECONDS = 2

if __name__ == "__main__":
    listen(Settings.load())
    entries = read_entries()
    clear_leftovers(entries)
    serve(
        *(entry.deployment() for entry in entries),
        limit=PROCESSES,
        query_seconds=_POLL_SECONDS,
        print_starting_message=False,
    )
