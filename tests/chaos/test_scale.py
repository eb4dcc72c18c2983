"""Many adapters: every one of them is seen, however many pages a listing has."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from managers import Manager, measured
from tiny_adapters import write_adapter

pytest.importorskip("prefect")

import hydraopt
from hydraopt.evaluation.gates import GateRules
from infra import mlflow_access
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import AdapterVersion, fetch_adapter, store_adapter
from infra.approvals import approve
from infra.approvers import Approvers
from infra.candidates import list_candidates
from infra.device_pull import pull
from infra.evidence import write_evidence, write_gate_report
from infra.garbage import collect_garbage
from infra.mlflow_access import MlflowClient
from infra.publishing import publish
from infra.serving_record import serving_records
from infra.settings import Settings
from tasks.candidates import describe_candidate, find_candidate, show_candidate, upload_candidate
from tasks.desired import DesiredSet, read_desired
from tasks.store import object_store

pytestmark = pytest.mark.integration

MANY, FEWER = 1000, 50
PAGE = 20
"""Rows of a page in the short form; the long one leaves the pages as they are."""
_MLFLOW_PAGE, _STORE_PAGE = 200, 1000
WRITERS = 4


class Registry:
    """A store and an MLflow with many adapters, and how often each listing was asked for a page."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.store = object_store(settings)
        self.pages: Counter[str] = Counter()
        self.folder = settings.home / "adapters"

    def register(self, task: str, seed: int) -> AdapterVersion:
        folder = write_adapter(self.folder / f"{task}-{seed}", seed)
        version = store_adapter(self.store, folder, task=task, source="a test")
        AdapterRegistry(self.settings).register(version, f"s3://{self.store.bucket}/{version.key}")
        return version

    def desired(self) -> DesiredSet:
        """As a reconcile reads it."""
        (found,) = read_desired.fn(self.settings, remember=True)
        return found


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print how long the block took, and the most memory that this process has used so far."""
    started = time.monotonic()
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{what}: {time.monotonic() - started:.1f} s, {peak:.2f} GiB at most so far", flush=True)


@pytest.fixture
def registry(alone, running_store, tmp_path, monkeypatch, long_form) -> Registry:
    """A bucket and an MLflow of its own, whose listings are counted."""
    monkeypatch.chdir(tmp_path)  # without a server, MLflow puts artifacts below the current folder
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    made = Registry(running_store.settings(tmp_path / "home", s3_bucket=alone.store.bucket, mlflow_uri=uri))
    events = made.store._client.meta.events
    events.register("before-send.s3.ListObjectsV2", lambda **_: made.pages.update(["store"]))
    whole = MlflowClient.search_registered_models

    def search(client: MlflowClient, *args, **kwargs):
        made.pages["mlflow"] += 1
        return whole(client, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "search_registered_models", search)
    if not long_form:
        events.register(
            "before-parameter-build.s3.ListObjectsV2", lambda params, **_: params.update(MaxKeys=PAGE)
        )
        monkeypatch.setattr(mlflow_access, "_PAGE", PAGE)
    return made


def test_a_set_of_many_adapters_goes_all_the_way(registry, alone, tmp_path, long_form):
    """Registered, read, merged, judged, signed, released, pulled; garbage is told from what is needed."""
    count, page = (MANY, _MLFLOW_PAGE) if long_form else (FEWER, PAGE)
    seeds = {f"t{number:04d}": number for number in range(count)}
    with told(f"\n{count} adapters registered"), ThreadPoolExecutor(WRITERS) as pool:
        versions = dict(zip(seeds, pool.map(registry.register, seeds, seeds.values()), strict=True))

    registry.pages.clear()
    with told("read what is wanted"):
        desired = registry.desired()
    assert digests(desired) == {task: one.digest for task, one in versions.items()}
    assert registry.pages["mlflow"] == -(-count // page) > 1, registry.pages

    desired = change_three(registry, versions)
    bundle_id = merged(registry, desired, tmp_path)
    released(registry, alone, desired, bundle_id, tmp_path / "device")
    registry.pages.clear()
    with told("garbage looked for"):
        found = collect_garbage(registry.store, older_than=timedelta(0), keep_versions=1)
    blobs = sum(1 for _ in registry.store.keys("blobs/"))
    assert (found.blobs, found.kept_blobs) == (0, blobs)
    assert blobs >= 2 * count
    assert registry.pages["store"] > 2 * blobs / (_STORE_PAGE if long_form else PAGE)


def digests(desired: DesiredSet) -> dict[str, str]:
    return {task: one.digest for task, one in desired.versions.items()}


def change_three(registry: Registry, versions: dict[str, AdapterVersion]) -> DesiredSet:
    """One adapter is replaced, another put back to its former version, a third taken out."""
    shown = AdapterRegistry(registry.settings)
    replaced = registry.register("t0007", len(versions) + 7)
    registry.register("t0008", len(versions) + 8)
    shown.set_serving("tests/tiny", "t0008", versions["t0008"].digest)
    shown.remove("tests/tiny", "t0009")
    wanted = {task: one.digest for task, one in versions.items() if task != "t0009"}
    wanted["t0007"] = replaced.digest
    desired = registry.desired()
    assert digests(desired) == wanted
    assert serving_records(registry.store)[0].adapters == wanted
    return desired


def merged(registry: Registry, desired: DesiredSet, folder: Path) -> str:
    """The bundle of the set, judged and shown in MLflow."""
    settings, store, name = registry.settings, registry.store, desired.spec.name
    with told("fetched"):
        fetched = {
            task: fetch_adapter(store, one, folder / "cache") for task, one in desired.versions.items()
        }
    with told("merged"):
        hydraopt.merge(fetched, budget=0.9, device="cpu").save(folder / "merged")
    with told("uploaded and described"):
        bundle_id = upload_candidate.fn(settings, desired, folder / "merged")
        describe_candidate.fn(settings, desired, bundle_id)
    with told("judged and shown"):
        scores = {task: measured(task) for task in desired.versions}
        write_evidence(store, name, bundle_id, own=scores, merged=scores)
        report = write_gate_report(store, name, bundle_id, GateRules(max_storage_ratio=1))
        show_candidate.fn(settings, desired, bundle_id, report)
    with told("found again"):
        assert find_candidate.fn(settings, desired) == bundle_id
    return bundle_id


def released(registry: Registry, alone: Manager, desired: DesiredSet, bundle_id: str, device: Path) -> None:
    """Signed, live, and whole on a device."""
    store, name = registry.store, desired.spec.name
    trusted = Approvers({alone.who: alone.key.public_key()}, {"pipeline": alone.service.public_key()})
    with told("approved and published"):
        approve(store, name, bundle_id, alone.who, alone.key, trusted)
        publish(store, name, bundle_id, "stable", trusted)
    (listed,) = list_candidates(store, name)
    assert (listed.state, set(listed.tasks)) == ("published", set(desired.versions))
    with told("pulled"):
        pulled = pull(store, name, "stable", device, trusted)
    assert pulled.bundle_id == bundle_id
    assert set(hydraopt.Bundle.load(device).task_names) == set(desired.versions)
