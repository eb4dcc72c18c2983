"""From a merged bundle to a judged candidate, in the store and in MLflow's view of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from hydraopt.evaluation.gates import GateReport
from hydraopt.evaluation.result import Evaluation
from infra.approvers import approvers_of
from infra.bundle_registry import BundleRegistry
from infra.bundle_store import claim_fingerprint, find_by_fingerprint, read_manifest, upload_bundle
from infra.candidates import CandidateStatus, list_candidates
from infra.channels import live
from infra.evidence import Evidence, write_evidence, write_gate_report
from infra.metrics import write_candidate
from infra.records import latest_record, read_record
from infra.settings import Settings
from infra.supply_chain.describe import describe_bundle
from infra.supply_chain.service_key import service_key
from tasks.desired import DesiredSet
from tasks.store import object_store
from tasks.verb import verb


@verb(task_run_name="look for a bundle of {desired.spec.name}'s set")
def find_candidate(settings: Settings, desired: DesiredSet) -> str | None:
    """Id of the bundle recorded for the set's fingerprint, if it was merged before."""
    return find_by_fingerprint(object_store(settings), desired.spec.name, str(desired.fingerprint))


@verb(task_run_name="upload bundle {desired.spec.name}")
def upload_candidate(settings: Settings, desired: DesiredSet, folder: Path) -> str:
    """Store the bundle and claim the set's fingerprint for it; returns the bundle that has it.

    Two merges of one set may differ by rounding: then the first one recorded is the set's bundle.
    """
    store = object_store(settings)
    bundle_id = upload_bundle(store, desired.spec.name, folder)
    return claim_fingerprint(store, desired.spec.name, str(desired.fingerprint), bundle_id)


@verb(task_run_name="describe bundle {desired.spec.name}")
def describe_candidate(settings: Settings, desired: DesiredSet, bundle_id: str) -> None:
    """Give the bundle its signed provenance and its bill of materials, unless it has them."""
    describe_bundle(
        object_store(settings),
        desired.spec.name,
        bundle_id,
        fingerprint=str(desired.fingerprint),
        key=service_key(settings.home),
    )


@verb(task_run_name="see what is measured of {desired.spec.name}")
def needs_measuring(settings: Settings, desired: DesiredSet, bundle_id: str) -> bool:
    """Whether a task can be measured now that was not, or only on other rows. A decision ends that."""
    store, name = object_store(settings), desired.spec.name
    record = latest_record(store, name, bundle_id, "evaluated")
    if record is None:
        return True
    if read_record(store, name, bundle_id, "decided") is not None:
        return False
    evidence = Evidence.model_validate(record.content)
    return any(
        _is_stale(version.own_evaluation, evidence.own.get(task), evidence.merged.get(task))
        for task, version in desired.versions.items()
    )


def _is_stale(wanted: Mapping[str, object] | None, own: Evaluation | None, merged: Evaluation | None) -> bool:
    """Whether what was measured is not what the adapter version now comes with."""
    if wanted is None:
        return False  # nothing to measure with: the gates say no, and that is that
    known = ("metric", "data_digest")
    return any(
        one is None or any(getattr(one, field) != wanted[field] for field in known) for one in (own, merged)
    )


@verb(task_run_name="record measurements of {desired.spec.name}")
def keep_evidence(
    settings: Settings,
    desired: DesiredSet,
    bundle_id: str,
    own: dict[str, Evaluation | None],
    merged: dict[str, Evaluation],
) -> None:
    """Write down what was measured, before anybody judges it."""
    write_evidence(object_store(settings), desired.spec.name, bundle_id, own=own, merged=merged)


@verb(task_run_name="judge {desired.spec.name}")
def judge_candidate(settings: Settings, desired: DesiredSet, bundle_id: str) -> GateReport:
    """Judge the newest measurements by the bundle's gates; nothing is written when the verdict is known."""
    return write_gate_report(object_store(settings), desired.spec.name, bundle_id, desired.spec.gates)


@verb(task_run_name="show candidate {desired.spec.name} in MLflow")
def show_candidate(settings: Settings, desired: DesiredSet, bundle_id: str, report: GateReport) -> None:
    """Bring MLflow's view of the candidate and its metrics up to date; they may have been lost."""
    manifest = read_manifest(object_store(settings), desired.spec.name, bundle_id)
    BundleRegistry(settings).record_candidate(desired.spec.name, bundle_id, manifest, report)
    write_candidate(settings.home, desired.spec.name, manifest, report)


def former_version(settings: Settings, desired: DesiredSet, bundle_id: str) -> int | None:
    """Under which number the set's bundle was released, if it was and the channel has moved on since.

    The adapters are then what they were before; no release goes back by itself, a rollback does.
    """
    store, spec = object_store(settings), desired.spec
    published = read_record(store, spec.name, bundle_id, "published")
    shown = live(store, spec.name, spec.channel)
    if published is None or shown is None or shown.bundle_id == bundle_id:
        return None
    return int(published.content["version"])


@verb(task_run_name="look for signed candidates")
def read_signed(settings: Settings) -> list[CandidateStatus]:
    """Approved candidates that are not published yet, the oldest first."""
    found = list_candidates(
        object_store(settings),
        None,
        partial(approvers_of, settings.home),
        only=lambda states: "approved" in states and "published" not in states,
    )
    return [one for one in reversed(found) if one.state == "approved"]
