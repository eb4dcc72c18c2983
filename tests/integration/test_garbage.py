"""What a collection removes, and what it must never. On a real store, in a bucket of its own."""

from __future__ import annotations

import secrets
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest

from hydraopt.errors import RecordError, RefusedError, ServiceError
from infra.adapter_store import fetch_adapter, store_adapter
from infra.approvals import reject
from infra.bundle_store import claim_fingerprint, find_by_fingerprint, read_manifest
from infra.garbage import collect_garbage
from infra.object_store import ObjectStore
from infra.publishing import promote, publish, rollback
from infra.records import manifest_key
from infra.serving_record import note_serving
from infra.supply_chain.release_file import parse_description, read_description

pytestmark = pytest.mark.integration

SET = "5e" * 32
"""Fingerprint of an adapter set."""


@pytest.fixture
def alone(manager, running_store, tmp_path):
    """The manager with a bucket that nobody else writes to."""
    settings = running_store.settings(tmp_path / "home", s3_bucket=f"gc-{secrets.token_hex(6)}")
    store = ObjectStore(settings)
    store._client.create_bucket(Bucket=store.bucket)
    return replace(manager, store=store)


def release(manager, seed, channel="stable"):
    bundle_id = manager.approved(seed)
    publish(manager.store, manager.name, bundle_id, channel, manager.trusted)
    return bundle_id


def collect(manager, *, days=0.0, versions=1, remove=True):
    return collect_garbage(
        manager.store, older_than=timedelta(days=days), keep_versions=versions, remove=remove
    )


def blobs(manager):
    return {key.rpartition("/")[2] for key in manager.store.keys("blobs/")}


def files(manager, bundle_id):
    return {entry.sha256 for entry in read_manifest(manager.store, manager.name, bundle_id).files().values()}


def documents(manager, *ids):
    named = [parse_description(read_description(manager.store, manager.name, one)) for one in ids]
    return {ref.sha256 for one in named for ref in (one.provenance, one.bom)}


def test_old_versions_go_and_everything_needed_stays(alone, adapter_folder, tmp_path):
    ids = [release(alone, seed) for seed in range(4)]
    waiting, refused = alone.judged(10)[0], alone.judged(11)[0]
    reject(alone.store, alone.name, refused, "bo", "no")
    version = store_adapter(alone.store, adapter_folder(5), task="a", source="test")
    stray = alone.store.put_blob(b"half an upload")
    found = collect(alone, remove=False)
    assert not found.removed
    assert stray.sha256 in blobs(alone)
    assert set(found.dropped_bundles) == {f"{alone.name}/{one}" for one in (ids[0], ids[1], refused)}
    done = collect(alone)
    assert (done.blobs, done.bytes) == (found.blobs, found.bytes)
    kept = files(alone, ids[3]) | files(alone, ids[2]) | files(alone, waiting)
    kept |= documents(alone, *ids, waiting, refused)
    assert blobs(alone) == kept | {ref.sha256 for ref in version.files.values()}
    assert rollback(alone.store, alone.name, "stable", alone.trusted).live_bundle_id == ids[2]
    assert fetch_adapter(alone.store, version, tmp_path / "cache").is_dir()
    with pytest.raises(RecordError, match="lacks files"):
        rollback(alone.store, alone.name, "stable", alone.trusted, to=1)
    assert collect(alone).blobs == 0


def test_every_channel_keeps_what_it_shows(alone):
    first = release(alone, 1)
    for seed in (2, 3, 4):
        last = release(alone, seed, "canary")
    collect(alone)
    assert files(alone, first) | files(alone, last) <= blobs(alone)


def test_the_newest_versions_stay(alone):
    ids = [release(alone, seed) for seed in range(4)]
    assert collect(alone, versions=4).blobs == 0
    assert files(alone, ids[0]) <= blobs(alone)


def test_what_was_made_of_the_adapters_that_serve_stays(alone):
    """They are what they were some versions ago; a set of fewer tasks is another set."""
    ids = [release(alone, seed) for seed in range(4)]
    base, made_of = "tests/tiny", read_manifest(alone.store, alone.name, ids[0]).adapters
    for task, digest in made_of.items():
        note_serving(alone.store, base, task, digest)
    assert set(collect(alone).dropped_bundles) == {f"{alone.name}/{ids[1]}"}
    assert files(alone, ids[0]) <= blobs(alone)
    note_serving(alone.store, base, "b", read_manifest(alone.store, alone.name, ids[3]).adapters["b"])
    assert f"{alone.name}/{ids[0]}" in collect(alone).dropped_bundles


def test_a_set_that_comes_back_has_no_bundle_once_its_files_were_collected(alone):
    """So it is merged again: to the same bundle, which a rollback then makes live."""
    ids = [release(alone, seed) for seed in range(4)]
    assert claim_fingerprint(alone.store, alone.name, SET, ids[0]) == ids[0]
    assert find_by_fingerprint(alone.store, alone.name, SET) == ids[0]
    collect(alone)
    assert find_by_fingerprint(alone.store, alone.name, SET) is None
    assert alone.merged(0) == ids[0]
    assert claim_fingerprint(alone.store, alone.name, SET, ids[0]) == ids[0]
    assert find_by_fingerprint(alone.store, alone.name, SET) == ids[0]
    assert rollback(alone.store, alone.name, "stable", alone.trusted, to=1).live_bundle_id == ids[0]


def test_a_merge_that_gives_another_bundle_replaces_a_collected_one(alone):
    """As one onto a newer shared part does: it is approved and released like any other. One of many wins."""
    ids = [release(alone, seed) for seed in range(4)]
    claim_fingerprint(alone.store, alone.name, SET, ids[0])
    collect(alone)
    new = [alone.approved(seed) for seed in (10, 11, 12)]
    with ThreadPoolExecutor(3) as pool:
        won = set(pool.map(lambda one: claim_fingerprint(alone.store, alone.name, SET, one), new))
    (chosen,) = won
    assert chosen in new
    alone.merged(0)  # whole again, and too late
    assert claim_fingerprint(alone.store, alone.name, SET, ids[0]) == chosen
    assert find_by_fingerprint(alone.store, alone.name, SET) == chosen
    published = publish(alone.store, alone.name, chosen, "stable", alone.trusted)
    assert (published.live_bundle_id, published.live_version) == (chosen, 5)


def test_a_rejected_bundle_stays_the_answer_for_its_set(alone):
    """A no is final: collecting the files must not have the set merged and offered again."""
    refused = alone.judged(11)[0]
    claim_fingerprint(alone.store, alone.name, SET, refused)
    reject(alone.store, alone.name, refused, "bo", "no")
    assert collect(alone).blobs > 0
    assert find_by_fingerprint(alone.store, alone.name, SET) == refused
    assert claim_fingerprint(alone.store, alone.name, SET, alone.merged(12)) == refused


def test_what_is_young_stays(alone):
    """Somebody may be about to name it."""
    stray = alone.store.put_blob(b"a blob that no record names yet")
    found = collect(alone, days=1)
    assert (found.blobs, found.too_young) == (0, 1)
    assert stray.sha256 in blobs(alone)


def test_a_record_that_cannot_be_read_stops_it(alone):
    """What it names is not known: better nothing is removed."""
    bundle_id = release(alone, 1)
    alone.store.put_blob(b"garbage")
    before = blobs(alone)
    alone.store._client.put_object(
        Bucket=alone.store.bucket, Key=manifest_key(alone.name, bundle_id), Body=b"{}"
    )
    with pytest.raises(RecordError):
        collect(alone)
    alone.store._client.delete_object(Bucket=alone.store.bucket, Key=manifest_key(alone.name, bundle_id))
    alone.store.create("adapters/x/a/" + "0" * 64 + ".json", b"{}")
    with pytest.raises(RecordError):
        collect(alone)
    assert blobs(alone) == before


def test_reading_rights_remove_nothing(manager, running_store, tmp_path):
    blob = manager.store.put_blob(secrets.token_bytes(16))
    reader = ObjectStore(running_store.reader_settings(tmp_path))
    with pytest.raises(ServiceError):
        reader.remove(blob.key)
    assert manager.store.exists_blob(blob)


def test_canary_first_then_stable(manager):
    first = release(manager, 1, "canary")
    moved = promote(manager.store, manager.name, manager.trusted, source="canary", target="stable")
    assert (moved.live_bundle_id, moved.version, moved.moved) == (first, 1, True)
    again = promote(manager.store, manager.name, manager.trusted, source="canary", target="stable")
    assert (again.live_bundle_id, again.moved) == (first, False)
    second = release(manager, 2, "canary")
    promote(manager.store, manager.name, manager.trusted, source="canary", target="stable")
    rollback(manager.store, manager.name, "canary", manager.trusted)
    with pytest.raises(RecordError, match="stays at version 2"):
        promote(manager.store, manager.name, manager.trusted, source="canary", target="stable")
    for source, target in (("nowhere", "stable"), ("canary", "canary")):
        with pytest.raises(RecordError):
            promote(manager.store, manager.name, manager.trusted, source=source, target=target)
    assert second


def test_promotion_checks_the_approval_again(manager):
    bundle_id = release(manager, 1, "canary")
    manager.store.create(f"records/{manager.name}/{bundle_id}/rejected.json", b"{}")
    with pytest.raises(RefusedError, match="rejected"):
        promote(manager.store, manager.name, manager.trusted, source="canary", target="stable")
