"""A hundred people ask for the same thing at once: it is done once, and everyone is told so."""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from office import Office
from production_home import api

from infra.candidates import list_candidates

pytestmark = pytest.mark.integration

REQUESTS = 100
PATIENCE_S = 300
OVER = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def runs_of(office: Office, flow: str) -> dict[str, dict[str, Any]]:
    """By id."""
    body = {"flows": {"name": {"any_": [flow]}}, "limit": 200, "sort": "START_TIME_DESC"}
    return {run["id"]: run for run in api(office.home, "flow_runs/filter", body)}


def test_a_hundred_reconciles_at_once_give_one_merge(office):
    """Asked for through Prefect's interface, as its page does. What is planned for tomorrow stays planned."""
    adapter = office.next_adapter()
    file = office.pipeline.task("topic")
    office.pipeline.good(["ingest", adapter, "--task", "topic", "--task-file", file])
    merges = set(runs_of(office, "merge-set"))
    candidates = {one.bundle_id for one in list_candidates(office.store(), "tiny")}
    deployment = api(office.home, "deployments/name/reconcile/reconcile")["id"]

    def ask(state: dict[str, Any]) -> str:
        return api(office.home, f"deployments/{deployment}/create_flow_run", {"state": state})["id"]

    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()
    planned = ask({"type": "SCHEDULED", "state_details": {"scheduled_time": tomorrow}})
    started = time.monotonic()
    with ThreadPoolExecutor(16) as people:
        asked = set(people.map(ask, [{"type": "SCHEDULED"}] * REQUESTS))
    assert len(asked) == REQUESTS
    took = time.monotonic() - started
    while waiting := asked - {
        one for one, run in runs_of(office, "reconcile").items() if run["state_type"] in OVER
    }:
        assert time.monotonic() - started < PATIENCE_S, f"{len(waiting)} have not ended"
        time.sleep(1)
    runs = runs_of(office, "reconcile")
    ends = Counter(runs[one]["state_type"] for one in asked)
    office.measured.append(
        f"{REQUESTS} reconciles at once: asked within {took:.1f} s, over after {time.monotonic() - started:.1f} s, "
        f"{dict(ends)}"
    )
    assert set(ends) == {"COMPLETED"}
    assert sum("did the same" in (runs[one]["state"]["message"] or "") for one in asked) >= REQUESTS - 10
    assert len(set(runs_of(office, "merge-set")) - merges) == 1
    assert len({one.bundle_id for one in list_candidates(office.store(), "tiny")} - candidates) == 1
    assert api(office.home, f"flow_runs/{planned}")["state_type"] == "SCHEDULED"
