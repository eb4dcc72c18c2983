"""What a device has after a pull: the live bundle, whole and approved, or exactly what it had before."""

from __future__ import annotations

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import hydraopt
from hydraopt.errors import HydraoptError, RecordError, RefusedError
from infra.approvers import Approvers
from infra.blobs import BlobRef
from infra.bundle_store import read_manifest
from infra.channels import log_key, pointer_key
from infra.device_pull import pull
from infra.object_store import ObjectStore
from infra.publishing import publish, rollback
from infra.records import canonical, manifest_key, record_key

pytestmark = pytest.mark.integration


@pytest.fixture
def out(tmp_path):
    return tmp_path / "device" / "bundle"


def release(manager, seed, channel="stable"):
    bundle_id = manager.approved(seed)
    publish(manager.store, manager.name, bundle_id, channel, manager.trusted)
    return bundle_id


def pulled(manager, out, **changes):
    arguments = {"store": manager.store, "trusted": manager.trusted.keys} | changes
    return pull(arguments["store"], manager.name, "stable", out, Approvers(arguments["trusted"]))


def tree(folder):
    """Every file and link below ``folder`` with its content."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def overwrite(manager, key, data):
    manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=data)


def test_first_pull_brings_the_whole_bundle(manager, out):
    bundle_id = release(manager, 1)
    done = pulled(manager, out)
    assert (done.bundle_id, done.version, done.changed) == (bundle_id, 1, True)
    files = read_manifest(manager.store, manager.name, bundle_id).files()
    assert (done.fetched_files, done.reused_files) == (3, 0)
    assert done.fetched_bytes == sum(entry.bytes for entry in files.values())
    assert hydraopt.Bundle.load(out).id == bundle_id
    assert out.is_symlink()


def test_second_pull_fetches_nothing(manager, out):
    release(manager, 1)
    pulled(manager, out)
    before = tree(out.parent)
    again = pulled(manager, out)
    assert (again.changed, again.fetched_files, again.fetched_bytes, again.reused_files) == (False, 0, 0, 3)
    assert tree(out.parent) == before


def test_the_folder_one_is_in_is_not_replaced(manager, out, monkeypatch):
    release(manager, 1)
    out.mkdir(parents=True)
    monkeypatch.chdir(out)
    with pytest.raises(HydraoptError, match="the folder you are in"):
        pulled(manager, out)
    assert list(out.parent.iterdir()) == [out]


def test_an_older_pointer_brought_back_moves_no_device(manager, out):
    release(manager, 1)
    old = manager.store.read(pointer_key(manager.name, "stable"))[0]
    second = release(manager, 2)
    overwrite(manager, pointer_key(manager.name, "stable"), old)
    assert pulled(manager, out).bundle_id == second
    manager.store._client.delete_object(Bucket=manager.store.bucket, Key=pointer_key(manager.name, "stable"))
    assert pulled(manager, out).bundle_id == second


def test_only_files_the_device_lacks_are_fetched(manager, out):
    first, second = release(manager, 1), manager.approved(2)
    pulled(manager, out)
    publish(manager.store, manager.name, second, "stable", manager.trusted)
    files = read_manifest(manager.store, manager.name, second).files()
    # Task a's file of the second bundle is at hand, under another name in the first one.
    entry = files["tasks/a.safetensors"]
    here = out.parent / ".bundle.bundles" / first / "tasks" / "other.safetensors"
    manager.store.fetch_blob(BlobRef(**entry.model_dump()), here)
    held = {one.sha256 for one in read_manifest(manager.store, manager.name, first).files().values()}
    lacking = [one for one in files.values() if one.sha256 not in held | {entry.sha256}]
    done = pulled(manager, out)
    assert done.fetched_files == len(lacking) < len(files)
    assert done.reused_files == len(files) - len(lacking)
    assert done.fetched_bytes == sum(one.bytes for one in lacking)
    assert hydraopt.verify(out).id == second


def test_the_bundle_before_stays_and_older_ones_go(manager, out):
    ids = []
    for seed in range(3):
        ids.append(release(manager, seed))
        pulled(manager, out)
    home = out.parent / ".bundle.bundles"
    assert {path.name for path in home.iterdir() if path.is_dir()} == set(ids[1:])
    pulled(manager, out)
    assert {path.name for path in home.iterdir() if path.is_dir()} == set(ids[1:])


def test_rollback_comes_back_without_fetching(manager, out):
    first = release(manager, 1)
    pulled(manager, out)
    release(manager, 2)
    pulled(manager, out)
    rollback(manager.store, manager.name, "stable", manager.trusted)
    done = pulled(manager, out)
    assert (done.bundle_id, done.version, done.fetched_files, done.changed) == (first, 1, 0, True)
    assert hydraopt.verify(out).id == first


def test_reading_rights_are_enough(manager, out, running_store, tmp_path):
    bundle_id = release(manager, 1)
    reader = ObjectStore(running_store.reader_settings(tmp_path))
    assert pulled(manager, out, store=reader).bundle_id == bundle_id


def test_nothing_published_is_told(manager, out):
    with pytest.raises(RecordError, match="nothing is published"):
        pulled(manager, out)
    assert not out.parent.exists()


def test_strangers_approval_is_refused(manager, out):
    release(manager, 1)
    for trusted in ({}, {"alice": Ed25519PrivateKey.generate().public_key()}):
        with pytest.raises(RecordError, match="not signed by anybody trusted"):
            pulled(manager, out, trusted=trusted)
    assert not out.exists()


@pytest.mark.parametrize("what", ["blob", "manifest", "approval", "pointer", "version", "rejected"])
def test_tampered_release_is_refused_and_the_old_bundle_stays(manager, out, what):
    first = release(manager, 1)
    pulled(manager, out)
    before = tree(out.parent)
    second = release(manager, 2)
    restore = None
    if what == "blob":
        entry = read_manifest(manager.store, manager.name, second).files()["tasks/b.safetensors"]
        restore = (f"blobs/sha256/{entry.sha256}", manager.store.read_blob(BlobRef(**entry.model_dump())))
        overwrite(manager, restore[0], b"\0" * entry.bytes)
    elif what == "manifest":
        overwrite(manager, manifest_key(manager.name, second), b"{}")
    elif what == "approval":
        data, _ = manager.store.read(record_key(manager.name, first, "approved"))
        overwrite(manager, record_key(manager.name, second, "approved"), data)
    elif what == "pointer":
        key = pointer_key(manager.name, "stable")
        pointer = json.loads(manager.store.read(key)[0])
        overwrite(manager, key, canonical(pointer | {"bundle_id": "0" * 64}))
    elif what == "version":
        overwrite(manager, f"bundles/{manager.name}/versions/000002.json", b"{}")
    else:
        overwrite(manager, record_key(manager.name, second, "rejected"), b"{}")
    with pytest.raises(RefusedError if what == "rejected" else RecordError):
        pulled(manager, out)
    whole = {path: data for path, data in tree(out.parent).items() if ".incoming-" not in path}
    assert whole == before
    assert hydraopt.verify(out).id == first
    if restore:
        overwrite(manager, *restore)
        done = pulled(manager, out)
        assert done.bundle_id == second
        assert done.fetched_files < 3  # those that had arrived were kept


def test_downgrade_to_what_was_never_approved_is_refused(manager, out):
    """Somebody with the store's key, but no approver's, points a channel at a bundle of their own."""
    release(manager, 1)
    pulled(manager, out)
    mine = manager.judged(2)[0]
    overwrite(
        manager,
        f"bundles/{manager.name}/versions/000009.json",
        canonical({"version": 9, "bundle_id": mine}),
    )
    key = pointer_key(manager.name, "stable")
    pointer = json.loads(manager.store.read(key)[0])
    for one in (key, log_key(manager.name, "stable", 1)):
        overwrite(manager, one, canonical(pointer | {"version": 9, "bundle_id": mine}))
    with pytest.raises(RefusedError, match="not approved"):
        pulled(manager, out)


@pytest.mark.parametrize("damage", ["byte", "missing", "manifest"])
def test_damaged_bundle_on_the_device_is_repaired(manager, out, damage):
    bundle_id = release(manager, 1)
    pulled(manager, out)
    file = out / ("manifest.json" if damage == "manifest" else "tasks/a.safetensors")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    done = pulled(manager, out)
    assert done.fetched_files == (0 if damage == "manifest" else 1)
    assert hydraopt.verify(out).id == bundle_id


def test_nothing_is_written_through_a_link_on_the_device(manager, out, tmp_path):
    bundle_id = release(manager, 1)
    pulled(manager, out)
    elsewhere = tmp_path / "elsewhere"
    (out / "tasks").rename(elsewhere)
    (out / "tasks").symlink_to(elsewhere)
    (elsewhere / "a.safetensors").write_bytes(b"mine")
    before = tree(elsewhere)
    assert pulled(manager, out).fetched_files == 2
    assert tree(elsewhere) == before
    assert not (out / "tasks").is_symlink()
    assert hydraopt.verify(out).id == bundle_id


def test_a_manifest_that_names_a_file_outside_is_refused(manager, out):
    """By somebody with the store's key: everything else about the bundle is as it should be."""
    good = release(manager, 1)
    text, _ = manager.store.read(manifest_key(manager.name, good))
    forged = text.replace(b'"a":', b'"../../../evil":')
    evil = hashlib.sha256(forged).hexdigest()
    overwrite(manager, manifest_key(manager.name, evil), forged)
    for state in ("described", "approved"):
        overwrite(
            manager,
            record_key(manager.name, evil, state),
            manager.store.read(record_key(manager.name, good, state))[0],
        )
    pointer = canonical(
        json.loads(manager.store.read(pointer_key(manager.name, "stable"))[0]) | {"bundle_id": evil}
    )
    for key in (pointer_key(manager.name, "stable"), log_key(manager.name, "stable", 1)):
        overwrite(manager, key, pointer)
    overwrite(
        manager, f"bundles/{manager.name}/versions/000001.json", canonical({"version": 1, "bundle_id": evil})
    )
    with pytest.raises(HydraoptError, match=r"task name '\.\./\.\./\.\./evil' is not allowed"):
        pulled(manager, out)
    assert not out.parent.exists()


def test_interrupted_pull_goes_on_where_it_stopped(manager, out, monkeypatch):
    bundle_id = release(manager, 1)
    fetch, seen = manager.store.fetch_blob, []

    def stop_at_the_last(ref, target):
        seen.append(target)
        if len(seen) == 3:
            (target.parent / f".{target.name}.x.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        fetch(ref, target)

    monkeypatch.setattr("infra.device_pull._FETCHES", 1)
    monkeypatch.setattr(
        type(manager.store), "fetch_blob", lambda self, ref, target: stop_at_the_last(ref, target)
    )
    with pytest.raises(KeyboardInterrupt):
        pulled(manager, out)
    assert not out.exists()
    monkeypatch.setattr(type(manager.store), "fetch_blob", lambda self, ref, target: fetch(ref, target))
    done = pulled(manager, out)
    assert (done.bundle_id, done.fetched_files, done.reused_files) == (bundle_id, 1, 2)
    assert hydraopt.verify(out).id == bundle_id


def test_racing_pulls_agree(manager, out):
    bundle_id = release(manager, 1)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: pulled(manager, out), range(4)))
    assert {one.bundle_id for one in done} == {bundle_id}
    assert sum(one.changed for one in done) == 1
    assert hydraopt.verify(out).id == bundle_id


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_not_ours_is_left_alone(manager, out, tmp_path, kind):
    release(manager, 1)
    out.parent.mkdir()
    if kind == "file":
        out.write_text("mine")
    elif kind == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path)
    before = tree(out.parent)
    with pytest.raises(HydraoptError, match=str(out)):
        pulled(manager, out)
    assert tree(out.parent) == before


def test_place_that_cannot_be_written_is_told(manager, out):
    release(manager, 1)
    out.parent.write_text("a file where a folder should be")
    with pytest.raises(HydraoptError, match=f"{out} cannot be written"):
        pulled(manager, out)


def test_empty_folder_and_relative_path_are_fine(manager, out, monkeypatch):
    bundle_id = release(manager, 1)
    out.mkdir(parents=True)
    monkeypatch.chdir(out.parent)
    pull(manager.store, manager.name, "stable", out.relative_to(out.parent), manager.trusted)
    assert hydraopt.verify(out).id == bundle_id


def test_device_folder_may_be_moved(manager, out, tmp_path):
    """The link is relative: a card or an image can be mounted elsewhere."""
    bundle_id = release(manager, 1)
    pulled(manager, out)
    shutil.move(out.parent, tmp_path / "elsewhere")
    assert hydraopt.verify(tmp_path / "elsewhere" / "bundle").id == bundle_id


def test_progress_counts_every_file(manager, out):
    release(manager, 1)
    told = []
    pull(
        manager.store,
        manager.name,
        "stable",
        out,
        manager.trusted,
        lambda done, total, what: told.append((done, total)),
    )
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
