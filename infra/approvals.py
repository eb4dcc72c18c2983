"""The release managers' word on a candidate: signed approvals, or a rejection. Either is final.

An approval signs the bundle's id, the gate report, the record that holds it, the record of the bundle's
documents and the policy; through these it binds the manifest, every file, the gates' rules, every measurement,
provenance and bill of materials, and who else must approve.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.errors import RecordError, RefusedError
from hydraopt.evaluation.gates import GateReport
from hydraopt.names import check_name
from infra.approvers import Approvers
from infra.bundle_store import read_manifest
from infra.evidence import check_judgement, find_record, parse_judgement
from infra.object_store import ObjectStore
from infra.records import (
    append_record,
    check_bundle,
    create_record,
    latest_record,
    now,
    read_record,
    read_records,
)
from infra.sign_off import (
    APPROVAL,
    SignOff,
    check_description_signed,
    count_approvals,
    open_approval,
    released_at,
    require,
)
from infra.signatures import key_id, sign
from infra.supply_chain.describe import check_description

_LONGEST_REASON = 2000

Decision = Literal["approved", "rejected"]


def approve(  # noqa: PLR0917 - a sentence: who signs what with which key, among whom
    store: ObjectStore, name: str, bundle_id: str, who: str, key: Ed25519PrivateKey, approvers: Approvers
) -> dict[str, Any]:
    """Record that ``who`` approves a candidate whose gates passed; safe to repeat.

    It is signed off for good once as many people approved as the policy wants; until then it may be rejected.

    Returns:
        What was signed; of the same person's earlier approval, if that counts.

    Raises:
        RefusedError: If the gates failed, the candidate was rejected, or ``who`` may not approve it.
        RecordError: If the candidate does not exist, or its records do not hold together.
    """
    check_name(who, "approver name")
    _check_trusted(who, key, approvers)
    return _approve(store, name, bundle_id, who, key, approvers, asserted=False)


def approve_asserted(  # noqa: PLR0917 - the same sentence
    store: ObjectStore, name: str, bundle_id: str, who: str, key: Ed25519PrivateKey, approvers: Approvers
) -> dict[str, Any]:
    """Record what somebody who calls himself ``who`` said in a form, signed with the service's own ``key``.

    Raises:
        RefusedError: If the policy does not count such approvals, or as for :func:`approve`.
    """
    _check_may_assert(who, name, approvers)
    if key_id(key) not in {key_id(one) for one in approvers.services.values()}:
        raise RefusedError("this service's key is not trusted here: an approval with it would not count")
    return _approve(store, name, bundle_id, who, key, approvers, asserted=True)


def reject_asserted(  # noqa: PLR0917 - the same sentence, with a no
    store: ObjectStore, name: str, bundle_id: str, who: str, reason: str, approvers: Approvers
) -> dict[str, Any]:
    """Reject for somebody who calls himself ``who`` in a form.

    Raises:
        RefusedError: If the policy does not count what a form is told, or as for :func:`reject`.
    """
    _check_may_assert(who, name, approvers)
    return reject(store, name, bundle_id, who, reason)


def reject(store: ObjectStore, name: str, bundle_id: str, who: str, reason: str) -> dict[str, Any]:
    """Record that a candidate must never be published; safe to repeat, the first reason stays.

    Raises:
        RefusedError: If it was approved.
        RecordError: If it does not exist, or the reason is empty or too long.
    """
    check_name(who, "approver name")
    reason = reason.strip()
    if not 1 <= len(reason) <= _LONGEST_REASON:
        raise RecordError(f"a reason has 1 to {_LONGEST_REASON} characters, got {len(reason)}")
    read_manifest(store, name, bundle_id)
    _decide(store, name, bundle_id, "rejected", who)
    return create_record(store, name, bundle_id, "rejected", {"as": who, "reason": reason}).content


def verify_sign_off(
    store: ObjectStore, name: str, bundle_id: str, approvers: Approvers, *, released: bool = False
) -> SignOff:
    """Check the approvals with all they rest on, as if nobody had checked before.

    The signatures, the policy, the manifest, provenance and bill of materials, the gate reports, and the gates
    judged again from the recorded measurements.

    Args:
        store: Where.
        name: Bundle name.
        bundle_id: Bundle id.
        approvers: Whose word counts.
        released: Whether it was released before: approvals that were in time then stay good.

    Raises:
        RefusedError: If the bundle was rejected, too few approvals count, or gates failed.
        RecordError: If anything was changed since the approvals, or no trusted key signed them.
    """
    check_not_rejected(store, name, bundle_id)
    at = released_at(store, name, bundle_id) if released else None
    manifest = read_manifest(store, name, bundle_id)
    described, made = check_description(store, name, bundle_id, manifest, approvers)
    records = read_records(store, name, bundle_id, "approved")
    sign_off = require(
        count_approvals(records, name, bundle_id, approvers, made, released=at), bundle_id, name
    )
    check_description_signed(sign_off, described.sha256, bundle_id)
    for sha256 in sign_off.gated_sha256:
        gated = find_record(store, name, bundle_id, "gated", sha256)
        if gated is None:
            raise RecordError(
                f"the gate report of bundle {bundle_id} is gone or was changed after it was approved"
            )
        _check_passed(check_judgement(store, name, bundle_id, gated))
        if parse_judgement(gated).report_sha256 not in sign_off.gate_report_sha256:
            raise RecordError(f"the approval of bundle {bundle_id} names another gate report")
    newest = latest_record(store, name, bundle_id, "gated")
    if newest is not None and newest.sha256 not in sign_off.gated_sha256:
        _check_passed(parse_judgement(newest).report)
    return sign_off


def conclude(store: ObjectStore, name: str, bundle_id: str, sign_off: SignOff) -> None:
    """Make a complete sign-off the one decision there is, before anything is published on it.

    Raises:
        RefusedError: If somebody rejected the bundle meanwhile.
    """
    _decide(store, name, bundle_id, "approved", ", ".join(sign_off.by))


def check_not_rejected(store: ObjectStore, name: str, bundle_id: str) -> None:
    """Refuse a bundle that was rejected.

    Raises:
        RefusedError: If it was.
    """
    check_bundle(name, bundle_id)
    if read_record(store, name, bundle_id, "rejected") or _decision(store, name, bundle_id) == "rejected":
        raise RefusedError(f"bundle {bundle_id} of {name!r} was rejected: it must not be used")


def _approve(  # noqa: PLR0917 - as approve
    store: ObjectStore,
    name: str,
    bundle_id: str,
    who: str,
    key: Ed25519PrivateKey,
    approvers: Approvers,
    *,
    asserted: bool,
) -> dict[str, Any]:
    manifest = read_manifest(store, name, bundle_id)
    gated = latest_record(store, name, bundle_id, "gated")
    if gated is None:
        raise RefusedError(
            f"bundle {bundle_id} of {name!r} was not judged by the gates yet: run `hydraopt reconcile`"
        )
    _check_passed(check_judgement(store, name, bundle_id, gated))
    if _decision(store, name, bundle_id) == "rejected":
        _decide(store, name, bundle_id, "approved", who)  # says who rejected it
    described, made = check_description(store, name, bundle_id, manifest, approvers)
    _check_is_no_maker(who, made, name, bundle_id, approvers)

    def count() -> SignOff:
        records = read_records(store, name, bundle_id, "approved")
        return count_approvals(records, name, bundle_id, approvers, made)

    sign_off = count()
    payload = _own(store, name, bundle_id, who, approvers, sign_off)
    if payload is None:
        payload = {
            "schema": APPROVAL,
            "name": name,
            "bundle_id": bundle_id,
            "decision": "approved",
            "gate_report_sha256": parse_judgement(gated).report_sha256,
            "gated_sha256": gated.sha256,
            "described_sha256": described.sha256,
            "policy": approvers.terms.model_dump(mode="json"),
            "policy_sha256": approvers.terms.sha256,
            "as": who,
            "asserted": asserted,
            "time": now(),
        }
        content = {"signed": sign(payload, key)}
        append_record(store, name, bundle_id, "approved", content, unless_same=("signed",))
        sign_off = count()
    if sign_off.complete:
        conclude(store, name, bundle_id, sign_off)
    return payload


def _own(  # noqa: PLR0917 - private, and called once
    store: ObjectStore, name: str, bundle_id: str, who: str, approvers: Approvers, sign_off: SignOff
) -> dict[str, Any] | None:
    """What ``who`` signed before, if it counts."""
    for record in read_records(store, name, bundle_id, "approved"):
        if record.sha256 in sign_off.records:
            approval = open_approval(record, name, bundle_id, approvers)
            if approval.who == who:
                return approval.payload
    return None


def _check_may_assert(who: str, name: str, approvers: Approvers) -> None:
    check_name(who, "approver name")
    terms = approvers.terms
    if terms.asserted == 0:
        raise RefusedError(
            f"the policy of bundle {name!r} counts nothing that a form is told: use `hydraopt approve`, or give "
            "`asserted: 1` in its approval section"
        )
    if terms.approvers is not None and who not in terms.approvers:
        raise RefusedError(
            f"{who!r} may not decide on {name!r}: its policy names {', '.join(terms.approvers)}"
        )


def _check_is_no_maker(who: str, made: set[str], name: str, bundle_id: str, approvers: Approvers) -> None:
    if not approvers.terms.self_approval and who.casefold() in {one.casefold() for one in made}:
        raise RefusedError(
            f"{who!r} trained or brought in an adapter of bundle {bundle_id}, and the policy of {name!r} forbids "
            "self-approval: another approver must sign"
        )


def _check_trusted(who: str, key: Ed25519PrivateKey, approvers: Approvers) -> None:
    known = approvers.people.get(who)
    if known is None or key_id(known) != key_id(key):
        raise RefusedError(
            f"this key is not trusted as {who!r} here (trusted: {', '.join(sorted(approvers.people)) or 'nobody'}): "
            "an approval with it would not count. Make and trust a key with `hydraopt keygen`"
        )


def _check_passed(report: GateReport) -> None:
    if not report.passed:
        failed = "; ".join(verdict.reason for verdict in report.verdicts if not verdict.passed)
        raise RefusedError(f"bundle {report.bundle_id} failed its gates: {failed}")


def _decide(store: ObjectStore, name: str, bundle_id: str, decision: Decision, who: str) -> None:
    """Claim the one decision there can be, so that an approval and a rejection cannot both win a race."""
    record = create_record(store, name, bundle_id, "decided", {"decision": decision, "as": who})
    found = record.content.get("decision")
    if found != decision:
        way_out = (
            "roll back if it is live; if it is not and an approval expired, it stays out unless approved again"
            if found == "approved"
            else "a changed adapter gives a new candidate"
        )
        raise RefusedError(
            f"bundle {bundle_id} of {name!r} was {found} by {record.content.get('as')!r}, and that is final: {way_out}"
        )


def _decision(store: ObjectStore, name: str, bundle_id: str) -> Decision | None:
    record = read_record(store, name, bundle_id, "decided")
    return cast("Decision", record.content.get("decision")) if record else None
