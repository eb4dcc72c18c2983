"""Who must approve a bundle, and which approvals count for nothing. On a real store."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import hydraopt
from hydraopt.errors import RecordError, RefusedError
from infra.adapter_store import store_adapter
from infra.approval_policy import ApprovalPolicy
from infra.approvals import approve, approve_asserted, reject, verify_sign_off
from infra.approvers import Approvers
from infra.bundle_store import read_manifest, upload_bundle
from infra.candidates import list_candidates
from infra.publishing import publish, rollback
from infra.records import canonical, record_key
from infra.signatures import public_key_pem, sign
from infra.supply_chain.release_file import read_release

pytestmark = pytest.mark.integration

PEOPLE = ("ana", "bo", "cy")


class Office:
    """A bundle, three people and a service with keys, and a policy."""

    def __init__(self, manager, **policy):
        self.manager = manager
        self.keys = {who: Ed25519PrivateKey.generate() for who in PEOPLE}
        self.service = Ed25519PrivateKey.generate()
        self.policy = ApprovalPolicy(**policy)

    @property
    def approvers(self):
        public = {who: key.public_key() for who, key in self.keys.items()}
        services = {"form": self.service.public_key(), **self.manager.trusted.services}
        return Approvers(public, services, self.policy)

    def approve(self, bundle_id, who, approvers=None):
        where = self.manager.store, self.manager.name, bundle_id
        return approve(*where, who, self.keys[who], approvers or self.approvers)

    def assert_name(self, bundle_id, who, key=None):
        where = self.manager.store, self.manager.name, bundle_id
        return approve_asserted(*where, who, key or self.service, self.approvers)

    def verify(self, bundle_id, **changes):
        return verify_sign_off(self.manager.store, self.manager.name, bundle_id, self.approvers, **changes)

    def publish(self, bundle_id):
        return publish(self.manager.store, self.manager.name, bundle_id, "stable", self.approvers)

    def state(self, bundle_id):
        found = list_candidates(self.manager.store, self.manager.name, lambda _name: self.approvers)
        return next(one for one in found if one.bundle_id == bundle_id)

    def forge(self, bundle_id, who, key=None, **changes):
        """An approval record that ``approve`` would not write, signed with ``who``'s real key."""
        payload = self.approve(bundle_id, who) | changes
        record = record_key(self.manager.name, bundle_id, "approved")
        content = canonical({"signed": sign(payload, key or self.keys[who])})
        self.manager.store._client.put_object(Bucket=self.manager.store.bucket, Key=record, Body=content)


def on_device(manager, bundle_id, approvers):
    release = read_release(manager.store, manager.name, bundle_id)
    return release.verify(read_manifest(manager.store, manager.name, bundle_id), approvers)


def test_two_people_must_approve_and_then_it_is_published(manager):
    office = Office(manager, needed=2)
    bundle_id, _ = manager.judged(1)
    office.approve(bundle_id, "ana")
    state = office.state(bundle_id)
    assert (state.state, state.approvals, state.approvals_needed) == ("awaiting-approval", 1, 2)
    with pytest.raises(RefusedError, match=r"1 of 2 approvals \(by ana\)"):
        office.publish(bundle_id)
    office.approve(bundle_id, "bo")
    state = office.state(bundle_id)
    assert (state.state, set(state.approved_by)) == ("approved", {"ana", "bo"})
    assert office.publish(bundle_id).version == 1


def test_one_person_counts_once(manager):
    """Also with the record copied, and with one key under two names."""
    office = Office(manager, needed=2)
    bundle_id, _ = manager.judged(1)
    office.approve(bundle_id, "ana")
    data, _ = manager.store.read(record_key(manager.name, bundle_id, "approved"))
    manager.store.create(record_key(manager.name, bundle_id, "approved", 2), data)
    office.approve(bundle_id, "ana")
    office.keys["bo"] = office.keys["ana"]
    office.approve(bundle_id, "bo")
    with pytest.raises(RefusedError, match="1 of 2"):
        office.verify(bundle_id)


def test_first_approval_of_two_leaves_room_for_a_rejection(manager):
    office = Office(manager, needed=2)
    bundle_id, _ = manager.judged(1)
    office.approve(bundle_id, "ana")
    reject(manager.store, manager.name, bundle_id, "bo", "wrong tone")
    assert (office.state(bundle_id).state, office.state(bundle_id).reason) == ("rejected", "wrong tone")
    for again in (lambda: office.approve(bundle_id, "cy"), lambda: office.publish(bundle_id)):
        with pytest.raises(RefusedError, match="reject"):
            again()


def test_rejection_between_the_last_approval_and_the_publish_wins(manager):
    """A publisher that counted its approvals still has to claim the decision."""
    office = Office(manager, needed=1)
    bundle_id, _ = manager.judged(1)
    office.approve(bundle_id, "ana")
    key = record_key(manager.name, bundle_id, "decided")
    body = canonical({"decision": "rejected", "as": "bo"})
    manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=body)
    with pytest.raises(RefusedError, match="rejected"):
        office.publish(bundle_id)


def test_only_named_people_may_approve(manager):
    office = Office(manager, approvers=("ana",))
    bundle_id, _ = manager.judged(1)
    with pytest.raises(RefusedError, match="not trusted as 'bo'"):
        office.approve(bundle_id, "bo")
    lax = replace(office.approvers, policy=None)
    office.approve(bundle_id, "bo", lax)
    assert verify_sign_off(manager.store, manager.name, bundle_id, lax).by == ("bo",)
    with pytest.raises((RefusedError, RecordError)):
        office.verify(bundle_id)


def test_pinned_key_is_the_one_that_counts(manager):
    office = Office(manager)
    stranger = Ed25519PrivateKey.generate()
    office.policy = ApprovalPolicy(approvers=("dora",), keys={"dora": public_key_pem(stranger)})
    bundle_id, _ = manager.judged(1)
    approve(manager.store, manager.name, bundle_id, "dora", stranger, office.approvers)
    assert office.verify(bundle_id).by == ("dora",)
    office.policy = ApprovalPolicy(keys={"ana": public_key_pem(stranger)})
    with pytest.raises(RecordError, match="pins another key for 'ana'"):
        office.verify(bundle_id)


def test_approval_under_another_policy_counts_nothing_until_given_again(manager):
    office = Office(manager)
    bundle_id, _ = manager.judged(1)
    first = office.approve(bundle_id, "ana")
    office.policy = ApprovalPolicy(expires_days=3)
    with pytest.raises(RefusedError, match="another policy"):
        office.publish(bundle_id)
    assert office.state(bundle_id).state == "awaiting-approval"
    second = office.approve(bundle_id, "ana")
    assert first["policy_sha256"] != second["policy_sha256"] == office.approvers.terms.sha256
    assert office.publish(bundle_id).version == 1


def test_changed_terms_in_an_approval_are_found(manager):
    office = Office(manager)
    bundle_id, _ = manager.judged(1)
    office.forge(bundle_id, "ana", policy_sha256="0" * 64)
    with pytest.raises(RecordError, match="another policy"):
        office.verify(bundle_id)


@pytest.mark.parametrize(
    ("age", "counts"),
    [(timedelta(days=1), True), (timedelta(days=2, minutes=1), False), (timedelta(days=-1), False)],
)
def test_approval_counts_for_its_time_only(manager, age, counts):
    """Neither after it expired, nor when it is dated in the future to last longer."""
    office = Office(manager, expires_days=2)
    bundle_id, _ = manager.judged(1)
    office.forge(bundle_id, "ana", time=(datetime.now(UTC) - age).isoformat(timespec="seconds"))
    if counts:
        assert office.publish(bundle_id).version == 1
        return
    with pytest.raises(RefusedError, match=r"expired|check the clocks"):
        office.publish(bundle_id)
    waiting = office.state(bundle_id)
    assert (waiting.state, waiting.approvals, waiting.decided_by) == ("awaiting-approval", 0, None)
    office.approve(bundle_id, "ana")
    assert office.publish(bundle_id).version == 1


def test_what_was_released_in_time_stays_good(manager):
    """Else a rollback would fail when it is needed most, and devices would refuse what they run."""
    office = Office(manager, expires_days=2)
    ids = [manager.judged(seed)[0] for seed in (1, 2)]
    for bundle_id in ids:
        office.approve(bundle_id, "ana")
        office.publish(bundle_id)
    old = datetime.now(UTC) - timedelta(days=30)
    office.forge(ids[0], "ana", time=old.isoformat())
    key = record_key(manager.name, ids[0], "published")
    body = canonical({"version": 1, "time": (old + timedelta(days=1)).isoformat()})
    manager.store._client.put_object(Bucket=manager.store.bucket, Key=key, Body=body)
    office.policy = ApprovalPolicy(expires_days=5)
    assert rollback(manager.store, manager.name, "stable", office.approvers).live_version == 1
    assert on_device(manager, ids[0], office.approvers).by == ("ana",)
    with pytest.raises(RefusedError):
        office.verify(ids[0])


@pytest.mark.parametrize("lost", ["its signer's key", "a policy"])
def test_what_lost_its_approval_after_its_release_gets_another(manager, lost):
    """Released a month ago; then whoever signed is trusted no more, or another policy holds."""
    office = Office(manager)
    first, second = (manager.judged(seed)[0] for seed in (1, 2))
    office.approve(first, "ana")
    office.publish(first)
    old = datetime.now(UTC) - timedelta(days=30)
    office.forge(first, "ana", time=old.isoformat())
    key = record_key(manager.name, first, "published")
    manager.store._client.put_object(
        Bucket=manager.store.bucket, Key=key, Body=canonical({"version": 1, "time": old.isoformat()})
    )
    office.approve(second, "bo")
    office.publish(second)
    if lost == "a policy":
        office.policy = ApprovalPolicy(needed=2, approvers=("bo", "cy"), expires_days=3)
    else:
        del office.keys["ana"]
    with pytest.raises((RefusedError, RecordError)):
        rollback(manager.store, manager.name, "stable", office.approvers)
    again = ("bo", "cy") if lost == "a policy" else ("bo",)
    for who in again:
        office.approve(first, who)
    assert rollback(manager.store, manager.name, "stable", office.approvers).live_version == 1
    assert on_device(manager, first, office.approvers).by == again


def test_who_trained_an_adapter_may_not_approve_it(manager, adapter_folder):
    office = Office(manager)
    folders = {"a": adapter_folder(21), "b": adapter_folder(22)}
    store_adapter(manager.store, folders["a"], task="a", source="test", made_by="Ana")
    store_adapter(manager.store, folders["a"], task="a", source="test", made_by="bo")
    folder = folders["a"].parent / "own-bundle"
    hydraopt.merge(folders, budget=0.9, device="cpu").save(folder)
    bundle_id = upload_bundle(manager.store, manager.name, folder)

    manager.judge(bundle_id)
    for who in ("ana", "bo"):
        with pytest.raises(RefusedError, match="self-approval"):
            office.approve(bundle_id, who)
    lax = replace(office.approvers, policy=ApprovalPolicy(self_approval=True))
    office.approve(bundle_id, "ana", lax)
    with pytest.raises((RefusedError, RecordError)):
        office.publish(bundle_id)
    office.approve(bundle_id, "cy")
    assert office.publish(bundle_id).version == 1


def test_asserted_names_count_only_where_the_policy_says_so(manager):
    office = Office(manager, needed=2, asserted=1)
    bundle_id, _ = manager.judged(1)
    assert office.assert_name(bundle_id, "bo")["asserted"]
    office.assert_name(bundle_id, "cy")
    with pytest.raises(RefusedError, match="1 of 2"):
        office.verify(bundle_id)
    office.approve(bundle_id, "ana")
    sign_off = office.verify(bundle_id)
    assert sign_off.by == ("ana", "bo")
    assert sign_off.asserted == ("bo",)
    office.policy = ApprovalPolicy(needed=2)
    with pytest.raises(RefusedError, match="0 of 2"):
        office.verify(bundle_id)
    with pytest.raises(RefusedError, match="counts nothing that a form is told"):
        office.assert_name(bundle_id, "bo")


def test_a_strangers_service_asserts_nothing(manager):
    office = Office(manager, asserted=1)
    bundle_id, _ = manager.judged(1)
    with pytest.raises(RefusedError, match="key is not trusted"):
        office.assert_name(bundle_id, "bo", Ed25519PrivateKey.generate())
    office.forge(bundle_id, "ana", key=office.service)  # the service signs as if Ana herself had
    with pytest.raises(RecordError, match="asserted"):
        office.verify(bundle_id)


def test_a_device_without_a_policy_counts_by_the_signed_one(manager):
    office = Office(manager, needed=2)
    bundle_id, _ = manager.judged(1)
    device = Approvers(office.approvers.keys)
    office.approve(bundle_id, "ana")
    with pytest.raises(RefusedError, match="1 of 2"):
        on_device(manager, bundle_id, device)
    office.approve(bundle_id, "bo")
    assert on_device(manager, bundle_id, device).complete
