"""Make MLflow show again what the object store holds, after its database was lost or restored from an old copy."""

from __future__ import annotations

from collections.abc import Iterator

from hydraopt.progress import Progress
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import read_version_record
from infra.bundle_registry import BundleRegistry
from infra.bundle_store import read_manifest
from infra.candidates import CandidateStatus, list_candidates
from infra.channels import channels_of, settle
from infra.evidence import read_gate_report
from infra.object_store import ObjectStore
from infra.publishing import read_version
from infra.serving_record import serving_records
from infra.settings import Settings


def repair_adapters(store: ObjectStore, settings: Settings, progress: Progress) -> tuple[int, int]:
    """Register every stored adapter version, oldest first; then let those serve that served last.

    A serving alias that MLflow still has is left as it is: it is what decides.

    Returns:
        How many versions there are, and how many aliases were brought back.

    Raises:
        RecordError: If a record cannot be read.
    """
    registry = AdapterRegistry(settings)
    entries = sorted(store.entries("adapters/"), key=lambda entry: (entry.modified, entry.key))
    for done, entry in enumerate(entries, start=1):
        version = read_version_record(store, entry.key)
        registry.register(version, f"s3://{settings.s3_bucket}/{version.key}", serve=False)
        progress(done, len(entries), "adapters")
    known = registry.serving()
    brought_back = 0
    for record in serving_records(store):
        for task, digest in record.adapters.items():
            if (record.base_model, task) not in known:
                registry.set_serving(record.base_model, task, digest)
                brought_back += 1
    return len(entries), brought_back


def repair_bundles(
    store: ObjectStore, settings: Settings, progress: Progress
) -> tuple[int, dict[str, dict[str, int]]]:
    """Show every judged bundle, oldest first, so that the newest is the candidate; then what each channel shows.

    Returns:
        How many bundles there are, and the live version by bundle name and channel.

    Raises:
        RecordError: If a record cannot be read.
    """
    registry = BundleRegistry(settings)
    found = list(reversed(list_candidates(store)))
    shown = 0
    for done, one in enumerate(found, start=1):
        report = read_gate_report(store, one.name, one.bundle_id)
        if report is not None:
            manifest = read_manifest(store, one.name, one.bundle_id)
            registry.record_candidate(one.name, one.bundle_id, manifest, report)
            shown += 1
        progress(done, len(found), "bundles")
    return shown, {name: _show_channels(store, registry, name) for name in _names(found)}


def _names(found: list[CandidateStatus]) -> Iterator[str]:
    yield from sorted({one.name for one in found})


def _show_channels(store: ObjectStore, registry: BundleRegistry, name: str) -> dict[str, int]:
    """Show what each channel showed before, and what it shows."""
    live = {}
    for channel in channels_of(store, name):
        newest = settle(store, name, channel)
        if newest is None:
            continue
        before = None
        for number in (newest.previous, newest.version):
            if number is not None:
                bundle_id = read_version(store, name, number).bundle_id
                registry.record_release(name, bundle_id, number, channel, before=before)
                before = bundle_id
        live[channel] = newest.version
    return live
