"""The release manager's word on a candidate: a signed approval, or a rejection. Either is final.

An approval signs the bundle's id, the gate report and the record that holds it; through these it binds the
manifest, every file, the gates' rules and every measurement.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hydraopt.errors import RecordError, RefusedError
from hydraopt.evaluation.gates import GateReport
from hydraopt.names import check_name
from infra.bundle_store import read_manifest
from infra.evidence import check_judgement, find_record, parse_judgement
from infra.object_store import ObjectStore
from infra.records import (
    Record,
    append_record,
    check_bundle,
    create_record,
    latest_record,
    now,
    read_record,
    read_records,
)
from infra.signatures import key_id, open_signed, sign

APPROVAL = "hydraopt.approval/1"
_LONGEST_REASON = 2000

Decision = Literal["approved", "rejected"]
Trusted = Mapping[str, Ed25519PublicKey]
"""Public key by name of everybody whose approval counts."""


def approve(  # noqa: PLR0917 - a sentence: who signs what with which key, trusted by whom
    store: ObjectStore, name: str, bundle_id: str, who: str, key: Ed25519PrivateKey, trusted: Trusted
) -> dict[str, Any]:
    """Record that ``who`` approves a candidate whose gates passed; safe to repeat.

    Returns:
        What was signed; of an earlier approval, if there is a valid one.

    Raises:
        RefusedError: If the gates failed, the candidate was rejected, or ``who`` is not trusted with this key.
        RecordError: If the candidate does not exist, or its records do not hold together.
    """
    check_name(who, "approver name")
    _check_trusted(who, key, trusted)
    read_manifest(store, name, bundle_id)
    gated = latest_record(store, name, bundle_id, "gated")
    if gated is None:
        raise RefusedError(
            f"bundle {bundle_id} of {name!r} was not judged by the gates yet: run `hydraopt reconcile`"
        )
    report = check_judgement(store, name, bundle_id, gated)
    _check_passed(report)
    _decide(store, name, bundle_id, "approved", who)
    for record in read_records(store, name, bundle_id, "approved"):
        try:
            return _open(record, name, bundle_id, trusted)
        except RecordError:
            continue  # signed by somebody who is not trusted (any more): ours comes after it
    payload = {
        "schema": APPROVAL,
        "name": name,
        "bundle_id": bundle_id,
        "decision": "approved",
        "gate_report_sha256": parse_judgement(gated).report_sha256,
        "gated_sha256": gated.sha256,
        "as": who,
        "time": now(),
    }
    content = {"signed": sign(payload, key)}
    append_record(store, name, bundle_id, "approved", content, unless_same=("signed",))
    return payload


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


def read_approval(store: ObjectStore, name: str, bundle_id: str, trusted: Trusted) -> dict[str, Any]:
    """What a trusted approver signed about exactly this bundle. Needs no more than reading rights.

    Raises:
        RefusedError: If the bundle was rejected, or nobody approved it.
        RecordError: If there are approvals, but none that a trusted key signed for this bundle.
    """
    check_bundle(name, bundle_id)
    if read_record(store, name, bundle_id, "rejected") or _decision(store, name, bundle_id) == "rejected":
        raise RefusedError(f"bundle {bundle_id} of {name!r} was rejected: it must not be used")
    problem: RecordError | None = None
    for record in read_records(store, name, bundle_id, "approved"):
        try:
            return _open(record, name, bundle_id, trusted)
        except RecordError as error:
            problem = error
    if problem:
        raise problem
    raise RefusedError(
        f"bundle {bundle_id} of {name!r} is not approved: run `hydraopt approve {bundle_id[:12]} --as WHO --key FILE`"
    )


def verify_approval(store: ObjectStore, name: str, bundle_id: str, trusted: Trusted) -> dict[str, Any]:
    """Check an approval with all it rests on, as if nobody had checked before; return what was signed.

    The signature, the manifest, the gate report, and the gates judged again from the recorded measurements.

    Raises:
        RefusedError: If the bundle was rejected or not approved, or gates failed.
        RecordError: If anything was changed since the approval, or no trusted key signed it.
    """
    payload = read_approval(store, name, bundle_id, trusted)
    read_manifest(store, name, bundle_id)
    gated = find_record(store, name, bundle_id, "gated", str(payload.get("gated_sha256")))
    if gated is None:
        raise RecordError(
            f"the gate report of bundle {bundle_id} is gone or was changed after {payload['as']!r} approved it"
        )
    report = check_judgement(store, name, bundle_id, gated)
    if parse_judgement(gated).report_sha256 != payload.get("gate_report_sha256"):
        raise RecordError(f"the approval of bundle {bundle_id} names another gate report")
    _check_passed(report)
    newest = latest_record(store, name, bundle_id, "gated")
    if newest is not None and newest.sha256 != gated.sha256:
        _check_passed(parse_judgement(newest).report)
    return payload


def _check_trusted(who: str, key: Ed25519PrivateKey, trusted: Trusted) -> None:
    known = trusted.get(who)
    if known is None or key_id(known) != key_id(key):
        raise RefusedError(
            f"this key is not trusted as {who!r} here (trusted: {', '.join(sorted(trusted)) or 'nobody'}): "
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
            "roll back if it is live" if found == "approved" else "a changed adapter gives a new candidate"
        )
        raise RefusedError(
            f"bundle {bundle_id} of {name!r} was {found} by {record.content.get('as')!r}, and that is final: {way_out}"
        )


def _decision(store: ObjectStore, name: str, bundle_id: str) -> Decision | None:
    record = read_record(store, name, bundle_id, "decided")
    return cast("Decision", record.content.get("decision")) if record else None


def _open(record: Record, name: str, bundle_id: str, trusted: Trusted) -> dict[str, Any]:
    """What one approval record says, if a trusted key signed it for this bundle."""
    payload, who = open_signed(record.content.get("signed"), trusted)
    expected = {
        "schema": APPROVAL,
        "name": name,
        "bundle_id": bundle_id,
        "decision": "approved",
        "as": who,
    }
    for field, value in expected.items():
        if payload.get(field) != value:
            raise RecordError(
                f"the approval stored for bundle {bundle_id} of {name!r} says {field} {payload.get(field)!r}, "
                f"expected {value!r}: it was made for something else"
            )
    return payload
