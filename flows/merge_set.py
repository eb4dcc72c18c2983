"""The flow ``merge-set``: the serving adapters of a bundle become a judged candidate."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.adapters import fetch_version
from tasks.artifacts import show_frontier, show_gates, show_links
from tasks.candidates import (
    describe_candidate,
    find_candidate,
    judge_candidate,
    keep_evidence,
    needs_measuring,
    show_candidate,
    upload_candidate,
)
from tasks.desired import DesiredSet, find_desired, read_desired
from tasks.log_lines import on_every_line, say
from tasks.merging import bundle_folder, draw_frontier, evaluate_alone, evaluate_merged, merge_adapters
from tasks.one_merge import only_merge
from tasks.stale_runs import stay_alive
from tasks.store import check_store


@flow(name="merge-set", flow_run_name="merge {bundle}")
def merge_set(bundle: str) -> dict[str, Any]:
    """Merge what serves now, measure every task, judge the gates, and leave a candidate.

    It reads the registry itself: what started it may be long out of date. Every step first looks at what is
    recorded under the set's fingerprint, so a second run does only what the first one did not.

    Args:
        bundle: Name of the bundle.
    """
    settings = Settings.load().require_services()
    stay_alive(settings)
    check_store(settings)
    with on_every_line(settings, bundle=bundle), only_merge(settings):
        desired = find_desired(read_desired(settings), bundle)
        if desired.fingerprint is None:
            return {"bundle": bundle, "waiting_for": list(desired.waiting_for)}
        with on_every_line(settings, fingerprint=desired.fingerprint):
            return _make_candidate(settings, desired)


def _make_candidate(settings: Settings, desired: DesiredSet) -> dict[str, Any]:
    """Do what is not done yet of merging, measuring and judging a complete set."""
    name, folder = desired.spec.name, None
    bundle_id = find_candidate(settings, desired)
    if bundle_id is None:
        say("%s adapters are merged", len(desired.versions))
        folders = {task: fetch_version(settings, version) for task, version in desired.versions.items()}
        folder = merge_adapters(settings, desired, folders)
        bundle_id = upload_candidate(settings, desired, folder)
        picture = draw_frontier(settings, desired, folders)
        if picture is not None:
            show_frontier(name, picture)

    with on_every_line(settings, bundle_id=bundle_id):
        describe_candidate(settings, desired, bundle_id)
        if needs_measuring(settings, desired, bundle_id):
            folder = bundle_folder(settings, name, bundle_id, folder)
            own = {task: evaluate_alone(settings, version) for task, version in desired.versions.items()}
            merged = evaluate_merged(settings, desired, folder)
            keep_evidence(settings, desired, bundle_id, own, merged)

        report = judge_candidate(settings, desired, bundle_id)
        show_candidate(settings, desired, bundle_id, report)
        show_gates(name, report)
        show_links(settings, name)
        say("gates %s", "passed" if report.passed else "FAILED")
    return {
        "bundle": name,
        "bundle_id": bundle_id,
        "fingerprint": desired.fingerprint,
        "passed": report.passed,
    }
