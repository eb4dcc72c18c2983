"""The flow ``merge-set``: the serving adapters of a bundle become a judged candidate."""

from __future__ import annotations

from typing import Any

from prefect import flow

from infra.settings import Settings
from tasks.artifacts import show_gates
from tasks.candidates import (
    claim_candidate,
    find_candidate,
    find_gate_report,
    judge_candidate,
    record_candidate,
)
from tasks.desired import find_spec, read_desired
from tasks.merging import (
    bundle_folder,
    evaluate_merged,
    evaluate_missing,
    fetch_adapters,
    merge_adapters,
    only_merge_on_this_host,
)


@flow(name="merge-set", flow_run_name="merge-set {bundle}")
def merge_set(bundle: str) -> dict[str, Any]:
    """Merge what serves now, measure every task, judge the gates, and leave a candidate.

    It reads the registry itself: what started it may be long out of date. Every step looks first for what
    is already recorded under the set's fingerprint, so a second run does only what the first did not.

    Args:
        bundle: Name of the bundle.
    """
    settings = Settings.load().require_services()
    with only_merge_on_this_host(settings):
        spec = find_spec(settings, bundle)
        desired = read_desired(settings, spec)
        if desired.fingerprint is None:
            return {"bundle": bundle, "waiting_for": list(desired.waiting_for)}

        bundle_id = find_candidate(settings, desired)
        if bundle_id is None:
            adapters = fetch_adapters(settings, desired)
            merged = merge_adapters(settings, spec, desired, adapters)
            bundle_id = claim_candidate(settings, desired, merged)

        report = find_gate_report(settings, bundle, bundle_id)
        if report is None:
            folder = bundle_folder(settings, bundle, bundle_id)
            own = evaluate_missing(settings, desired)
            measured = evaluate_merged(settings, desired, folder)
            report = judge_candidate(settings, spec, bundle_id, own, measured)

        record_candidate(settings, spec, desired, bundle_id, report)
        show_gates(bundle, bundle_id, report)
    return {"bundle": bundle, "bundle_id": bundle_id, "fingerprint": desired.fingerprint, "passed": report.passed}
