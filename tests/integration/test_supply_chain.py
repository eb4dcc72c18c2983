"""What vouches for a published bundle cannot be changed or exchanged without a device noticing. On a real store."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import hydraopt
from hydraopt.errors import RecordError, RefusedError
from infra.approvals import approve
from infra.approvers import SERVICES, Approvers, trust
from infra.bundle_store import read_manifest
from infra.device_pull import pull
from infra.publishing import publish
from infra.records import canonical, record_key
from infra.signatures import public_key_pem
from infra.supply_chain.bom import bill_of_materials
from infra.supply_chain.describe import describe_bundle
from infra.supply_chain.provenance import signed_provenance
from infra.supply_chain.release_file import ReleaseFile, beside, parse_description, read_description

pytestmark = pytest.mark.integration


def release(manager, seed):
    bundle_id = manager.approved(seed)
    publish(manager.store, manager.name, bundle_id, "stable", manager.trusted)
    return bundle_id


def overwrite(manager, key, data):
    manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=data)


def refs(manager, bundle_id):
    return parse_description(read_description(manager.store, manager.name, bundle_id))


def refuse(manager, bundle_id, tmp_path, match, approvers=None):
    """Neither a device nor a publisher takes the bundle."""
    approvers = approvers or manager.trusted
    with pytest.raises(RecordError, match=match):
        pull(manager.store, manager.name, "stable", tmp_path / "device", approvers)
    assert not (tmp_path / "device").exists()
    with pytest.raises(RecordError, match=match):
        publish(manager.store, manager.name, bundle_id, "canary", approvers)


@pytest.mark.parametrize("what", ["provenance", "bom"])
def test_changed_document_is_refused(manager, tmp_path, what):
    bundle_id = release(manager, 1)
    ref = getattr(refs(manager, bundle_id), what)
    data = manager.store.read_blob(ref)
    overwrite(manager, ref.key, data[:-1] + b" ")
    refuse(manager, bundle_id, tmp_path, "not what its name promises")
    overwrite(manager, ref.key, data)


def test_other_documents_of_the_same_bundle_are_refused(manager, tmp_path):
    """Somebody with the store's key and even the service's, but no approver's, tells another story."""
    bundle_id = release(manager, 1)
    manifest = read_manifest(manager.store, manager.name, bundle_id)
    story = signed_provenance(
        manager.name, bundle_id, manifest, {}, fingerprint="e" * 64, key=manager.service
    )
    content = read_description(manager.store, manager.name, bundle_id).content
    content["provenance"] = manager.store.put_blob(story).model_dump()
    overwrite(manager, record_key(manager.name, bundle_id, "described"), canonical(content))
    refuse(manager, bundle_id, tmp_path, "was replaced after it was approved")


def test_documents_of_another_bundle_are_refused(manager, tmp_path):
    bundle_id, other = release(manager, 1), manager.judged(2)[0]
    data, _ = manager.store.read(record_key(manager.name, other, "described"))
    overwrite(manager, record_key(manager.name, bundle_id, "described"), data)
    refuse(manager, bundle_id, tmp_path, "names another")


def test_a_changed_model_card_cannot_be_approved(manager):
    """Its numbers are checked by no one but bound by every approval; its parts are checked."""
    bundle_id, _ = manager.judged(1)
    other = manager.judged(2)[0]
    manifest = read_manifest(manager.store, manager.name, other)
    bill = bill_of_materials(manager.name, other, manifest, {}, merged_at="2026-01-01T00:00:00+00:00")
    content = read_description(manager.store, manager.name, bundle_id).content
    content["bom"] = manager.store.put_blob(bill).model_dump()
    overwrite(manager, record_key(manager.name, bundle_id, "described"), canonical(content))
    with pytest.raises(RecordError, match="bill of materials"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)


def test_what_was_not_described_is_neither_approved_nor_published(manager):
    bundle_id = manager.approved(1)
    key = record_key(manager.name, bundle_id, "described")
    manager.store._client.delete_object(Bucket=manager.store.bucket, Key=key)
    with pytest.raises(RecordError, match="has no provenance"):
        publish(manager.store, manager.name, bundle_id, "stable", manager.trusted)
    with pytest.raises(RecordError, match="has no provenance"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)


def test_a_strangers_service_is_refused(manager, tmp_path):
    bundle_id = release(manager, 1)
    stranger = {"pipeline": Ed25519PrivateKey.generate().public_key()}
    refuse(manager, bundle_id, tmp_path, "not signed by anybody", replace(manager.trusted, services=stranger))


def test_the_first_documents_stay(manager):
    bundle_id, _ = manager.judged(1)
    first = refs(manager, bundle_id)
    describe_bundle(
        manager.store, manager.name, bundle_id, fingerprint="0" * 64, key=Ed25519PrivateKey.generate()
    )
    assert refs(manager, bundle_id) == first


@pytest.fixture
def pulled(manager, tmp_path):
    release(manager, 1)
    out = tmp_path / "device" / "bundle"
    pull(manager.store, manager.name, "stable", out, manager.trusted)
    return out


def run_verify(home, *arguments):
    """``hydraopt verify`` in a process of its own that knows no server."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HYDRAOPT_")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.command_line", "verify", *map(str, arguments), "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={**clean, "HYDRAOPT_HOME": str(home), "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, json.loads(done.stdout)


def test_verify_checks_a_pulled_bundle_offline(manager, pulled, tmp_path):
    """With the keys of the home, with a key given, and with nobody trusted; wrong keys are an error."""
    code, result = run_verify(tmp_path / "nobody", pulled)
    assert (code, result["signature"]) == (0, None)
    home = tmp_path / "home"
    trust(home, manager.who, public_key_pem(manager.key))
    trust(home, "pipeline-1", public_key_pem(manager.service), SERVICES)
    code, result = run_verify(home, pulled)
    assert code == 0, result
    assert result["signature"]["approved_by"] == ["alice"]
    assert result["signature"]["provenance_signature_checked"]
    stranger = tmp_path / "alice.pem"
    stranger.write_text(public_key_pem(Ed25519PrivateKey.generate()))
    code, result = run_verify(home, pulled, "--key", stranger)
    assert (code, result["kind"]) == (2, "RecordError")
    code, result = run_verify(home, pulled, "--key", home / "approvers" / "alice.pem")
    assert (code, result["signature"]["provenance_signature_checked"]) == (0, False)


@pytest.mark.parametrize("what", ["provenance", "bom", "approved", "described", "bundle_id"])
def test_verify_finds_a_changed_document(manager, pulled, what):
    path = beside(pulled)
    content = json.loads(path.read_text())
    if what == "approved":
        content[what] = []
    elif what == "described":
        content[what]["time"] = "2000-01-01T00:00:00+00:00"
    elif what == "bundle_id":
        content[what] = "0" * 64
    else:
        content[what] += " "
    path.write_text(json.dumps(content))
    with pytest.raises((RecordError, RefusedError)):
        ReleaseFile.load(path).verify(hydraopt.verify(pulled), manager.trusted)


def test_documents_go_with_their_bundle(manager, pulled):
    for seed in (2, 3):
        release(manager, seed)
        pull(manager.store, manager.name, "stable", pulled, manager.trusted)
    home = pulled.parent / ".bundle.bundles"
    folders = {path.name for path in home.iterdir() if path.is_dir()}
    assert {path.name.removesuffix(".release.json") for path in home.glob("*.json")} == folders
    assert ReleaseFile.load(beside(pulled)).verify(hydraopt.verify(pulled), manager.trusted).by == ("alice",)


def test_a_device_that_knows_no_service_relies_on_the_approvers(manager, tmp_path):
    release(manager, 1)
    only_people = Approvers(manager.trusted.keys)
    done = pull(manager.store, manager.name, "stable", tmp_path / "device", only_people)
    assert done.approved_by == ("alice",)
