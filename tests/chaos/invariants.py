"""What must hold of a store at any moment, whatever was killed or broken."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydraopt
from infra.approvals import verify_sign_off
from infra.approvers import Approvers
from infra.blobs import BlobRef
from infra.bundle_store import read_manifest
from infra.channels import Move, live
from infra.device_pull import pull
from infra.object_store import ObjectStore
from infra.publishing import read_version

_READS = 8


def check_store(store: ObjectStore, name: str, approvers: Approvers, channel: str = "stable") -> Move | None:
    """Fail unless the store of one bundle name is valid; returns what is live there."""
    check_blobs(store)
    check_manifests(store, name)
    claimed = versions(store, name)
    log = check_log(store, name, channel, claimed)
    shown = live(store, name, channel)
    if shown is None:
        # Killed between the first log entry and the pointer: nothing is live yet, and the next one settles it.
        assert len(log) <= 1, log
        return None
    assert shown in log
    check_live(store, name, channel, shown, approvers)
    return shown


def versions(store: ObjectStore, name: str) -> dict[int, str]:
    """The bundle of each version; no number is missing or given twice, no bundle has two."""
    numbers = [int(key[-11:-5]) for key in store.keys(f"bundles/{name}/versions/")]
    claimed = {number: read_version(store, name, number).bundle_id for number in numbers}
    assert numbers == list(range(1, len(numbers) + 1)), numbers
    assert len(set(claimed.values())) == len(claimed), claimed
    return claimed


def check_blobs(store: ObjectStore) -> None:
    """Every blob has the content its name promises."""

    def is_good(key: str) -> bool:
        data, _ = store.read(key)
        return hashlib.sha256(data).hexdigest() == key.rpartition("/")[2]

    keys = [entry.key for entry in store.entries("blobs/") if entry.bytes < 2**24]  # big ones: see the tests
    with ThreadPoolExecutor(_READS) as pool:
        bad = [key for key, good in zip(keys, pool.map(is_good, keys), strict=True) if not good]
    assert bad == []


def check_manifests(store: ObjectStore, name: str) -> None:
    """Where there is a manifest, there is a whole bundle."""
    for key in store.keys(f"bundles/{name}/"):
        if key.endswith("/manifest.json"):
            for path, entry in read_manifest(store, name, key.split("/")[2]).files().items():
                assert store.exists_blob(BlobRef(**entry.model_dump())), (key, path)


def check_log(store: ObjectStore, name: str, channel: str, claimed: dict[int, str]) -> list[Move]:
    """The channel's moves follow each other, each to a version of the bundle it names."""
    keys = store.keys(f"channels/{name}/{channel}/log/")
    log = [Move.model_validate(json.loads(store.read(key)[0])) for key in keys]
    assert [one.sequence for one in log] == list(range(1, len(log) + 1))
    assert all(claimed[one.version] == one.bundle_id for one in log)
    assert all(after.previous == before.version for before, after in itertools.pairwise(log))
    published = [one.version for one in log if one.action == "publish"]
    assert len(set(published)) == len(published), "a version was published twice"
    return log


def check_live(store: ObjectStore, name: str, channel: str, shown: Move, approvers: Approvers) -> None:
    """What is live is signed and approved, and a device that has nothing gets all of it."""
    assert verify_sign_off(store, name, shown.bundle_id, approvers, released=True).complete
    with tempfile.TemporaryDirectory() as folder:
        pulled = pull(store, name, channel, Path(folder) / "device", approvers)
        assert pulled.bundle_id == shown.bundle_id
        assert hydraopt.Bundle.load(Path(folder) / "device").id == shown.bundle_id
