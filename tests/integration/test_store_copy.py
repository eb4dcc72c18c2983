"""A store that was copied out and back is the same store. On a real one, in buckets of their own."""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import replace

import pytest

import hydraopt
from hydraopt.errors import RecordError, ServiceError
from infra.adapter_store import store_adapter
from infra.device_pull import pull
from infra.object_store import ObjectStore
from infra.publishing import publish, rollback
from infra.records import record_key
from infra.serving_record import copy_serving, note_serving, serving_records
from infra.store_copy import export_store, restore_store

pytestmark = pytest.mark.integration


@pytest.fixture
def bucket(running_store, tmp_path):
    """``bucket()``: an empty one."""

    def make() -> ObjectStore:
        settings = running_store.settings(tmp_path / "home", s3_bucket=f"copy-{secrets.token_hex(6)}")
        store = ObjectStore(settings)
        store._client.create_bucket(Bucket=store.bucket)
        return store

    return make


@pytest.fixture
def full(manager, bucket, adapter_folder):
    """A store with an adapter, a live version, a former one and a candidate."""
    here = replace(manager, store=bucket())
    version = store_adapter(here.store, adapter_folder(1), task="a", source="test")
    note_serving(here.store, version.base_model, "a", version.digest)
    for seed in (1, 2):
        publish(here.store, here.name, here.approved(seed), "stable", here.trusted)
    here.judged(3)
    return here


def quiet(done, total, what):
    del done, total, what


def content(store):
    return {key: store.read(key)[0] for key in store.keys("") if not key.startswith("self-test/")}


def test_out_and_back_is_the_same(full, bucket, tmp_path):
    copied = export_store(full.store, tmp_path / "copy", quiet)
    assert copied.copied == copied.objects == len(content(full.store))
    target = bucket()
    restored = restore_store(target, tmp_path / "copy", quiet)
    assert restored.copied == copied.objects
    assert content(target) == content(full.store)
    there = replace(full, store=target)
    device = tmp_path / "device"
    pull(target, full.name, "stable", device, full.trusted)
    assert hydraopt.verify(device).id == pull(target, full.name, "stable", device, full.trusted).bundle_id
    assert rollback(there.store, full.name, "stable", full.trusted).live_version == 1


def test_both_go_on_where_they_stopped(full, bucket, tmp_path):
    """And a later export brings what is new."""
    copy = tmp_path / "copy"
    export_store(full.store, copy, quiet)
    assert export_store(full.store, copy, quiet).copied == 0
    removed = sorted((copy / "objects" / "blobs" / "sha256").iterdir())[:2]
    removed[0].unlink()
    removed[1].write_bytes(b"half")
    full.judged(4)
    assert export_store(full.store, copy, quiet).copied > 2

    target, stops = bucket(), iter(range(5))

    def stop(done, total, what):
        if what == "restore" and next(stops, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_store(target, copy, stop)
    assert 0 < len(content(target)) < len(content(full.store))
    restore_store(target, copy, quiet)
    assert content(target) == content(full.store)
    assert restore_store(target, copy, quiet).copied == 0


@pytest.mark.parametrize("damage", ["blob", "record", "missing", "index", "no index"])
def test_a_damaged_copy_is_refused_before_anything_is_written(full, bucket, tmp_path, damage):
    copy = tmp_path / "copy"
    export_store(full.store, copy, quiet)
    blob = min((copy / "objects" / "blobs" / "sha256").iterdir())
    record = next((copy / "objects" / "records").rglob("approved.json"))
    if damage == "missing":
        record.unlink()
    elif damage == "index":
        index = json.loads((copy / "index.json").read_text())
        index["objects"]["records/../../escape"] = ["0" * 64, 1]
        (copy / "index.json").write_text(json.dumps(index))
    elif damage == "no index":
        (copy / "index.json").unlink()
    else:
        path = blob if damage == "blob" else record
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    target = bucket()
    with pytest.raises(RecordError, match="no key of ours" if damage == "index" else ""):
        restore_store(target, copy, quiet)
    assert content(target) == {}


@pytest.mark.parametrize("linked", ["blob", "record", "folder", "index"])
def test_a_link_out_of_a_copy_is_not_followed(full, bucket, tmp_path, linked):
    """Though what it leads to is right: a stranger's copy says which of our files are read and stored."""
    copy, away = tmp_path / "copy", tmp_path / "away"
    export_store(full.store, copy, quiet)
    path = {
        "blob": next((copy / "objects" / "blobs" / "sha256").iterdir()),
        "record": next(one for one in (copy / "objects" / "records").rglob("*") if one.is_file()),
        "folder": copy / "objects" / "blobs",
        "index": copy / "index.json",
    }[linked]
    path.rename(away)
    path.symlink_to(away)
    target = bucket()
    with pytest.raises(RecordError, match="link that leads out"):
        restore_store(target, copy, quiet)
    assert content(target) == {}


def test_nothing_in_the_store_is_replaced(full, bucket, tmp_path):
    copy = tmp_path / "copy"
    export_store(full.store, copy, quiet)
    target = bucket()
    bundle_id = next((copy / "objects" / "records" / full.name).iterdir()).name
    key = record_key(full.name, bundle_id, "merged")
    target.create(key, b"{}")
    with pytest.raises(RecordError, match="something else under"):
        restore_store(target, copy, quiet)
    assert target.read(key)[0] == b"{}"
    assert not list(target.keys("channels/"))


@pytest.mark.parametrize("other", ["another adapter", "another record"])
def test_another_store_is_refused_before_anything_is_written(full, bucket, adapter_folder, tmp_path, other):
    """It would be neither the one nor the other afterwards."""
    export_store(full.store, tmp_path / "copy", quiet)
    target = bucket()
    if other == "another adapter":
        store_adapter(target, adapter_folder(9), task="a", source="test")
    else:
        key = next(key for key in full.store.keys("serving/"))
        target.create(key, b"{}")
    before = content(target)
    with pytest.raises(RecordError, match="restore into an empty bucket"):
        restore_store(target, tmp_path / "copy", quiet)
    assert content(target) == before


def test_a_damaged_blob_is_not_exported(full, tmp_path):
    key = next(full.store.keys("blobs/"))
    data = full.store.read(key)[0]
    full.store._client.put_object(Bucket=full.store.bucket, Key=key, Body=data[:-1] + b"!")
    with pytest.raises(RecordError, match="damaged or tampered"):
        export_store(full.store, tmp_path / "copy", quiet)
    assert not (tmp_path / "copy" / "index.json").exists()


def test_what_serves_is_remembered_and_an_empty_registry_forgets_nothing(bucket):
    store = bucket()
    note_serving(store, "org/model", "a", "1" * 64)
    note_serving(store, "org/model", "b", "2" * 64)
    copy_serving(store, {("org/model", "a"): "3" * 64, ("org/other", "c"): "4" * 64})
    assert {one.base_model: one.adapters for one in serving_records(store)} == {
        "org/model": {"a": "3" * 64},
        "org/other": {"c": "4" * 64},
    }
    with pytest.raises(RecordError, match="hydraopt repair"):
        copy_serving(store, {})
    assert len(serving_records(store)) == 2
    with pytest.raises(RecordError, match="spelt too much like it"):
        note_serving(store, "ORG/model", "a", "1" * 64)


def test_reading_rights_are_not_enough_to_restore(full, bucket, running_store, tmp_path):
    copy = tmp_path / "copy"
    export_store(full.store, copy, quiet)
    reader = ObjectStore(running_store.reader_settings(tmp_path, s3_bucket=bucket().bucket))
    shutil.rmtree(copy / "objects" / "blobs")
    index = json.loads((copy / "index.json").read_text())
    index["objects"] = {k: v for k, v in index["objects"].items() if not k.startswith("blobs/")}
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(ServiceError):
        restore_store(reader, copy, quiet)
