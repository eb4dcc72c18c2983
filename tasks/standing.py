"""Where every bundle of this deployment stands: what is desired, and what devices see."""

from __future__ import annotations

from typing import Any

from infra.bundle_registry import BundleRegistry
from infra.candidates import find_by_fingerprint, read_candidate
from infra.channels import live
from infra.object_store import ObjectStore
from infra.settings import Settings
from tasks.desired import DesiredSet, read_desired
from tasks.store import object_store

WRONG_VIEW = "an alias was moved by hand, or a release was interrupted"
"""Why MLflow may show as live what is not."""


def standing(settings: Settings) -> dict[str, dict[str, Any]]:
    """By bundle name: its adapters, the desired bundle and its state, the live one, whether they agree."""
    store, registry = object_store(settings), BundleRegistry(settings)
    return {one.spec.name: _stand(store, registry, one) for one in read_desired.fn(settings)}


def _stand(store: ObjectStore, registry: BundleRegistry, desired: DesiredSet) -> dict[str, Any]:
    name, channel = desired.spec.name, desired.spec.channel
    bundle_id = find_by_fingerprint(store, name, desired.fingerprint) if desired.fingerprint else None
    candidate = read_candidate(store, name, bundle_id) if bundle_id else None
    shown = live(store, name, channel)
    return {
        "base_model": desired.spec.base_model,
        "adapters": {task: version.digest for task, version in desired.versions.items()},
        "waiting_for": list(desired.waiting_for),
        "fingerprint": desired.fingerprint,
        "desired_bundle_id": bundle_id,
        "desired_state": candidate.state if candidate else None,
        "channel": channel,
        "live_version": shown.version if shown else None,
        "live_bundle_id": shown.bundle_id if shown else None,
        "mlflow_shows": registry.shown(name, channel),
        "up_to_date": bundle_id is not None and shown is not None and shown.bundle_id == bundle_id,
    }
