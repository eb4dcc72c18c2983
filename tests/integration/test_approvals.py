"""An approval holds exactly as long as nothing it rests on was changed. On a real store."""

from __future__ import annotations

import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.errors import BundleError, HydraoptError, RecordError, RefusedError
from hydraopt.evaluation.gates import judge
from infra.approvals import approve, reject, verify_sign_off
from infra.approvers import Approvers
from infra.bundle_store import claim_fingerprint, find_by_fingerprint, upload_bundle
from infra.candidates import list_candidates, resolve
from infra.evidence import read_evidence, read_gate_report, write_evidence, write_gate_report
from infra.records import canonical, manifest_key, record_key
from infra.signatures import sign

pytestmark = pytest.mark.integration


def change(store, key, edit):
    """Change a stored JSON object behind our back, as somebody with the store's key could."""
    content = json.loads(store.read(key)[0])
    edit(content)
    store._client.put_object(Bucket=store.bucket, Key=key, Body=canonical(content))


def verify(manager, bundle_id, trusted=None):
    approvers = Approvers(trusted) if trusted else manager.trusted
    return verify_sign_off(manager.store, manager.name, bundle_id, approvers)


def test_uploading_again_changes_nothing(manager):
    folder = manager.bundle_folder(1)
    first = upload_bundle(manager.store, manager.name, folder)
    keys = list(manager.store.keys("records/"))
    assert upload_bundle(manager.store, manager.name, folder) == first
    assert list(manager.store.keys("records/")) == keys


def test_damaged_bundle_is_not_uploaded(manager):
    folder = manager.bundle_folder(1)
    file = folder / "shared.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BundleError):
        upload_bundle(manager.store, manager.name, folder)
    assert list(manager.store.keys(f"bundles/{manager.name}/")) == []


def test_first_bundle_of_a_set_is_the_one(manager):
    fingerprint = "cd" * 32
    assert find_by_fingerprint(manager.store, manager.name, fingerprint) is None
    ids = [manager.merged(seed) for seed in range(3)] * 3
    with ThreadPoolExecutor(9) as pool:
        won = set(pool.map(lambda one: claim_fingerprint(manager.store, manager.name, fingerprint, one), ids))
    assert won == {find_by_fingerprint(manager.store, manager.name, fingerprint)}


def test_approval_verifies_and_repeats(manager):
    bundle_id, report = manager.judged(1)
    payload = approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    sign_off = verify(manager, bundle_id)
    assert (sign_off.by, sign_off.gate_report_sha256) == (("alice",), (report.digest,))
    again = approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    assert again == payload


def test_nothing_is_approved_by_default(manager):
    bundle_id, _ = manager.judged(1)
    with pytest.raises(RefusedError, match="is not approved"):
        verify(manager, bundle_id)


@pytest.mark.parametrize(
    ("state", "edit"),
    [
        ("gated", lambda record: record["report"].update(passed=False)),
        ("gated", lambda record: record.update(time="2000-01-01T00:00:00+00:00")),
        ("gated", lambda record: record["report"]["rules"].update(min_samples=1)),
        ("evaluated", lambda record: record["merged"]["b"].update(value=0.99)),
        ("evaluated", lambda record: record["own"].pop("a")),
        ("evaluated", lambda record: record.update(storage_ratio=0.01)),
        ("approved", lambda record: record["signed"].update(payload="e30=")),
        ("approved", lambda record: record["signed"]["signatures"][0].update(sig="AAAA")),
        ("approved", lambda record: record.update(signed=None)),
        ("approved", lambda record: record.clear()),
    ],
    ids=str,
)
def test_changed_record_voids_the_approval(manager, state, edit):
    bundle_id = manager.approved(1)
    change(manager.store, record_key(manager.name, bundle_id, state), edit)
    with pytest.raises(RecordError):
        verify(manager, bundle_id)


def test_changed_manifest_voids_the_approval(manager):
    bundle_id = manager.approved(1)
    change(
        manager.store, manifest_key(manager.name, bundle_id), lambda content: content.update(relative_error=0)
    )
    with pytest.raises(RecordError, match="not the manifest its name promises"):
        verify(manager, bundle_id)


def test_another_bundles_manifest_in_its_place_voids_the_approval(manager):
    bundle_id, other = manager.approved(1), manager.merged(2)
    data, _ = manager.store.read(manifest_key(manager.name, other))
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=manifest_key(manager.name, bundle_id), Body=data
    )
    with pytest.raises(RecordError, match="not the manifest"):
        verify(manager, bundle_id)


def test_approval_counts_for_one_bundle_only(manager):
    approved, other = manager.approved(1), manager.judged(2)[0]
    data, _ = manager.store.read(record_key(manager.name, approved, "approved"))
    manager.store.create(record_key(manager.name, other, "approved"), data)
    with pytest.raises(RecordError, match="made for something else"):
        verify(manager, other)


def test_approval_counts_for_one_name_only(manager):
    """The same bundle under another name may be meant for other devices."""
    bundle_id = manager.approved(1)
    elsewhere = manager.name + "-x"
    for key in list(manager.store.keys(f"records/{manager.name}/{bundle_id}/")):
        manager.store.create(key.replace(manager.name, elsewhere), manager.store.read(key)[0])
    data, _ = manager.store.read(manifest_key(manager.name, bundle_id))
    manager.store.create(manifest_key(elsewhere, bundle_id), data)
    with pytest.raises(RecordError, match="another bundle than it holds"):
        verify_sign_off(manager.store, elsewhere, bundle_id, manager.trusted)


def test_strangers_key_does_not_count(manager):
    bundle_id = manager.approved(1)
    with pytest.raises(RecordError, match="not signed by anybody trusted"):
        verify(manager, bundle_id, {"alice": Ed25519PrivateKey.generate().public_key()})


def test_name_of_another_person_does_not_count(manager):
    """Bob's key signs as Alice: both are trusted, but not one as the other."""
    bundle_id = manager.approved(1)
    with pytest.raises(RecordError, match="made for something else"):
        verify(manager, bundle_id, {"bob": manager.key.public_key()})


def test_untrusted_key_cannot_take_the_place_of_an_approval(manager):
    bundle_id, _ = manager.judged(1)
    stranger = Ed25519PrivateKey.generate()
    with pytest.raises(RefusedError, match="not trusted as 'alice'"):
        approve(manager.store, manager.name, bundle_id, "alice", stranger, manager.trusted)
    manager.store.create(
        record_key(manager.name, bundle_id, "approved"), canonical({"signed": sign({"a": 1}, stranger)})
    )
    approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    assert verify(manager, bundle_id).by == ("alice",)


def test_failed_gates_cannot_be_approved(manager):
    bundle_id, report = manager.judged(1, value=0.5)
    assert not report.passed
    with pytest.raises(RefusedError, match="failed its gates") as caught:
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    assert caught.value.exit_code == 3
    assert "37.50" in str(caught.value)


def test_forged_pass_of_failed_gates_cannot_be_approved(manager):
    """The verdict is judged again from the measurements, not believed."""
    bundle_id, _ = manager.judged(1, value=0.5)
    change(
        manager.store,
        record_key(manager.name, bundle_id, "gated"),
        lambda record: record["report"].update(passed=True),
    )
    with pytest.raises(RecordError, match="does not follow from its measurements"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)


def test_forged_pass_with_a_matching_digest_cannot_be_approved(manager):
    bundle_id, report = manager.judged(1, value=0.5)
    verdicts = tuple(one.model_copy(update={"passed": True}) for one in report.verdicts)
    forged = report.model_copy(update={"passed": True, "verdicts": verdicts})
    change(
        manager.store,
        record_key(manager.name, bundle_id, "gated"),
        lambda record: record.update(report=forged.model_dump(mode="json"), report_sha256=forged.digest),
    )
    with pytest.raises(RecordError, match="does not follow from its measurements"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)


def test_approval_outlives_a_later_version_that_words_its_reasons_otherwise(manager, monkeypatch):
    """Else an update of hydraopt would make a rollback to an older bundle impossible."""
    bundle_id = manager.approved(1)

    def reworded(*arguments, **more):
        report = judge(*arguments, **more)
        verdicts = [one.model_copy(update={"reason": "other words"}) for one in report.verdicts]
        added = verdicts[0].model_copy(update={"rule": "a new rule"})
        return report.model_copy(update={"verdicts": (*verdicts, added)})

    monkeypatch.setattr("infra.evidence.judge", reworded)
    assert verify(manager, bundle_id)


def test_unjudged_bundle_cannot_be_approved(manager):
    bundle_id = manager.merged(1)
    with pytest.raises(RefusedError, match="not judged"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)


def test_rejection_is_final(manager):
    bundle_id, _ = manager.judged(1)
    reject(manager.store, manager.name, bundle_id, "bob", "sounds wrong")
    first = reject(manager.store, manager.name, bundle_id, "carol", "other reason")
    assert (first["as"], first["reason"]) == ("bob", "sounds wrong")
    with pytest.raises(RefusedError, match="rejected by 'bob'"):
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    with pytest.raises(RefusedError, match="was rejected"):
        verify(manager, bundle_id)


def test_approval_is_final(manager):
    bundle_id = manager.approved(1)
    with pytest.raises(RefusedError, match="approved by 'alice'"):
        reject(manager.store, manager.name, bundle_id, "bob", "too late")
    assert verify(manager, bundle_id)


def test_race_of_approval_and_rejection_has_one_outcome(manager):
    bundle_id, _ = manager.judged(1)

    def say_yes():
        approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
        return "approved"

    def say_no():
        reject(manager.store, manager.name, bundle_id, "bob", "no")
        return "rejected"

    def attempt(verb):
        with suppress(RefusedError):
            return verb()
        return None

    with ThreadPoolExecutor(8) as pool:
        said = {one for one in pool.map(attempt, [say_yes, say_no] * 4) if one}
    assert len(said) == 1
    assert list_candidates(manager.store, manager.name)[0].state == said.pop()


def test_other_rules_give_another_verdict_and_the_newest_counts(manager):
    bundle_id, failed = manager.judged(1, value=0.5)
    lenient = failed.rules.model_copy(update={"max_task_drop_percent": 50, "max_mean_drop_percent": 50})
    assert write_gate_report(manager.store, manager.name, bundle_id, lenient).passed
    approve(manager.store, manager.name, bundle_id, manager.who, manager.key, manager.trusted)
    assert verify(manager, bundle_id)
    write_gate_report(manager.store, manager.name, bundle_id, failed.rules)
    with pytest.raises(RefusedError, match="failed its gates"):
        verify(manager, bundle_id)


def test_measuring_and_judging_again_the_same_way_adds_nothing(manager):
    bundle_id, report = manager.judged(1)
    keys = list(manager.store.keys(f"records/{manager.name}/"))
    assert manager.judged(1) == (bundle_id, report)
    assert list(manager.store.keys(f"records/{manager.name}/")) == keys
    assert read_gate_report(manager.store, manager.name, bundle_id) == report


def test_what_was_not_measured_fails(manager):
    bundle_id = manager.merged(1)
    nan = (
        read_evidence(manager.store, manager.name, manager.judged(1)[0])
        .own["a"]
        .model_copy(update={"value": float("nan")})
    )
    evidence = write_evidence(manager.store, manager.name, bundle_id, own={"a": nan}, merged={})
    assert evidence.own["b"] is None
    report = write_gate_report(manager.store, manager.name, bundle_id, manager.judged(2)[1].rules)
    assert not report.passed


def test_measurements_of_strange_tasks_are_refused(manager):
    bundle_id, _ = manager.judged(1)
    measured = read_evidence(manager.store, manager.name, bundle_id).own["a"]
    for own in ({"zzz": measured.model_copy(update={"task": "zzz"})}, {"b": measured}):
        with pytest.raises(RecordError):
            write_evidence(manager.store, manager.name, bundle_id, own=own, merged={})


def test_list_tells_where_every_candidate_stands(manager):
    merged, failed = manager.merged(1), manager.judged(2, value=0.5)[0]
    waiting, approved, rejected = manager.judged(3)[0], manager.approved(4), manager.judged(5)[0]
    reject(manager.store, manager.name, rejected, "bob", "no")
    found = {one.bundle_id: one for one in list_candidates(manager.store, manager.name)}
    assert {one: found[one].state for one in (merged, failed, waiting, approved, rejected)} == {
        merged: "merged",
        failed: "gated-failed",
        waiting: "awaiting-approval",
        approved: "approved",
        rejected: "rejected",
    }
    assert found[failed].failures
    assert found[rejected].reason == "no"
    assert found[approved].decided_by == "alice"
    assert found[waiting].tasks == ("a", "b")


def test_id_may_be_shortened_while_it_is_clear(manager):
    """Other tests share the bucket: this bundle's seed is its own."""
    seed = secrets.randbelow(10**9) + 10**6
    bundle_id = manager.merged(seed)
    assert resolve(manager.store, bundle_id[:16]) == (manager.name, bundle_id)
    assert resolve(manager.store, bundle_id, manager.name) == (manager.name, bundle_id)
    upload_bundle(manager.store, manager.name + "-x", manager.bundle_folder(seed))
    with pytest.raises(RecordError, match=f"2 candidates start with .*{manager.name}-x/"):
        resolve(manager.store, bundle_id[:16])
    assert resolve(manager.store, f"{manager.name}/{bundle_id[:16]}") == (manager.name, bundle_id)
    for bad in ("", "abc", "XYZ!", "../..", "a/b/abcd", "0" * 64):
        with pytest.raises(HydraoptError):
            resolve(manager.store, bad)
