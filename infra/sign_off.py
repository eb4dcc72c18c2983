"""Which approvals of a bundle count, and whether they are enough.

An approval counts if a trusted key signed it, for exactly this bundle, under a policy that lets the signer
approve, and if it has not expired. One person counts once, however many records or names there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.errors import RecordError, RefusedError
from hydraopt.names import check_name
from infra.approval_policy import ApprovalTerms
from infra.approvers import Approvers
from infra.object_store import ObjectStore
from infra.records import Record, check_bundle, read_record
from infra.signatures import key_id, open_signed

APPROVAL = "hydraopt.approval/2"
_CLOCKS_DIFFER = timedelta(minutes=10)


class Approval(NamedTuple):
    """One approval whose signature holds."""

    who: str
    key: str  # id of the key that signed it
    asserted: bool  # the name was typed into a form: a service signed, not the person
    time: datetime
    terms: ApprovalTerms
    payload: dict[str, Any]
    record_sha256: str


class SignOff(BaseModel):
    """What the approvals of a bundle amount to."""

    model_config = ConfigDict(frozen=True)

    needed: int
    by: tuple[str, ...] = Field(description="Whose approval counts.")
    asserted: tuple[str, ...] = Field((), description="Those of them whose name a form was told.")
    policy_sha256: str = Field(description="Of the terms they signed.")
    gated_sha256: tuple[str, ...] = Field((), description="The gate records they signed.")
    gate_report_sha256: tuple[str, ...] = ()
    described_sha256: tuple[str, ...] = Field((), description="The records of documents they signed.")
    records: tuple[str, ...] = Field((), description="SHA-256 of the records that count.")
    ignored: tuple[str, ...] = Field((), description="Why the others do not count, a sentence each.")
    broken: tuple[str, ...] = Field(
        (), description="Those of these sentences on records that nobody trusted signed."
    )

    @property
    def complete(self) -> bool:
        """Whether enough people approved."""
        return len(self.by) >= self.needed

    @property
    def missing(self) -> str:
        """What is still to come, in words."""
        by = f" (by {', '.join(self.by)})" if self.by else ""
        ignored = f"; not counted: {'; '.join(self.ignored)}" if self.ignored else ""
        return f"{len(self.by)} of {self.needed} approvals{by}{ignored}"


def count_approvals(
    records: Iterable[Record],
    name: str,
    bundle_id: str,
    approvers: Approvers,
    makers: Iterable[str] = (),
    *,
    released: datetime | None = None,
) -> SignOff:
    """Count the approvals of a bundle.

    Args:
        records: Its records of approvals, oldest first.
        name: Bundle name.
        bundle_id: Bundle id.
        approvers: Whose word counts. With a policy, this one counts; without, each approval counts under the
            terms that were signed with it.
        makers: Who trained or brought in one of its adapters.
        released: When the bundle was released, if it was: an approval that was in time stays good, also under
            a policy that was changed since; so does one that was given after it, when others had ceased to count.
            None: for a release now.
    """
    check_bundle(name, bundle_id)
    valid, broken = list[Approval](), list[str]()
    for record in records:
        try:
            valid.append(open_approval(record, name, bundle_id, approvers))
        except RecordError as error:
            broken.append(str(error))
    if approvers.policy is not None:
        own = approvers.terms
        return _count(valid, own, makers, released, broken, same_terms=released is None)
    terms = {one.terms.sha256: one.terms for one in valid} or {"": approvers.terms}
    counts = [_count(valid, one, makers, released, broken, same_terms=True) for one in terms.values()]
    return max(counts, key=lambda one: (one.complete, len(one.by)))


def released_at(store: ObjectStore, name: str, bundle_id: str) -> datetime:
    """When a bundle was first published; now, if no record says so (yet)."""
    record = read_record(store, name, bundle_id, "published")
    return moment(record.content.get("time")) if record else datetime.now(UTC)


def require(sign_off: SignOff, bundle_id: str, name: str) -> SignOff:
    """Return ``sign_off`` if it is complete.

    Raises:
        RefusedError: If approvals are missing, or given too early or under other rules.
        RecordError: If there are approvals, but none that can be trusted.
    """
    if sign_off.complete:
        return sign_off
    if sign_off.broken and not sign_off.by:
        raise RecordError(f"bundle {bundle_id[:12]} of {name!r}: {sign_off.broken[-1]}")
    raise RefusedError(
        f"bundle {bundle_id} of {name!r} is not approved: {sign_off.missing}. "
        f"Run `hydraopt approve {bundle_id[:12]} --as WHO --key FILE`"
    )


def check_description_signed(sign_off: SignOff, described_sha256: str, bundle_id: str) -> None:
    """Refuse documents other than those that the approvers signed.

    Raises:
        RecordError: If somebody signed others.
    """
    if sign_off.described_sha256 != (described_sha256,):
        raise RecordError(
            f"the provenance or the bill of materials of bundle {bundle_id} was replaced after it was approved"
        )


def open_approval(record: Record, name: str, bundle_id: str, approvers: Approvers) -> Approval:
    """What one approval record says, if a trusted key signed it for this bundle.

    Raises:
        RecordError: If not.
    """
    people = approvers.people
    payload, signer = open_signed(record.content.get("signed"), {**approvers.services, **people})
    asserted = signer not in people
    who = str(payload.get("as")) if asserted else signer
    expected = {
        "schema": APPROVAL,
        "name": name,
        "bundle_id": bundle_id,
        "decision": "approved",
        "as": who,
        "asserted": asserted,
    }
    for field, value in expected.items():
        if payload.get(field) != value:
            raise RecordError(
                f"the approval stored for bundle {bundle_id} of {name!r} says {field} {payload.get(field)!r}, "
                f"expected {value!r}: it was made for something else"
            )
    check_name(who, "approver name")
    try:
        terms = ApprovalTerms.model_validate(payload.get("policy"))
    except ValidationError:
        raise RecordError(f"the approval of {who!r} names no policy: approve again") from None
    if payload.get("policy_sha256") != terms.sha256:
        raise RecordError(f"the approval of {who!r} names another policy than it holds: approve again")
    key = key_id(approvers.services[signer] if asserted else people[signer])
    return Approval(who, key, asserted, moment(payload.get("time")), terms, payload, record.sha256)


def _count(
    valid: list[Approval],
    terms: ApprovalTerms,
    makers: Iterable[str],
    released: datetime | None,
    broken: list[str],
    *,
    same_terms: bool,
) -> SignOff:
    """Those of ``valid`` that count under ``terms``."""
    made = {one.casefold() for one in makers}
    counted: dict[str, Approval] = {}
    reasons = list(broken)
    for one in sorted(valid, key=lambda one: (one.asserted, one.time)):
        why_not = _why_not(one, terms, made, released, same_terms=same_terms)
        asserted = sum(other.asserted for other in counted.values())
        if why_not is None and one.asserted and asserted >= terms.asserted:
            why_not = f"the policy lets {terms.asserted} come from the form, where nobody proves a name"
        twice = one.who.casefold() in counted or (
            not one.asserted and one.key in {other.key for other in counted.values()}
        )
        if why_not is not None:
            reasons.append(f"{one.who!r}: {why_not}")
        elif not twice:
            counted[one.who.casefold()] = one
    return SignOff(
        needed=terms.needed,
        by=tuple(one.who for one in counted.values()),
        asserted=tuple(one.who for one in counted.values() if one.asserted),
        policy_sha256=terms.sha256,
        gated_sha256=_said(counted.values(), "gated_sha256"),
        gate_report_sha256=_said(counted.values(), "gate_report_sha256"),
        described_sha256=_said(counted.values(), "described_sha256"),
        records=tuple(one.record_sha256 for one in counted.values()),
        ignored=tuple(reasons),
        broken=tuple(broken),
    )


def _said(approvals: Iterable[Approval], field: str) -> tuple[str, ...]:
    """What they signed under ``field``, each value once."""
    return tuple(dict.fromkeys(str(one.payload.get(field)) for one in approvals))


def _why_not(
    one: Approval, terms: ApprovalTerms, made: set[str], released: datetime | None, *, same_terms: bool
) -> str | None:
    """Why an approval does not count; None if it does."""
    if same_terms and one.terms.sha256 != terms.sha256:
        return "given under another policy: approve again"
    if terms.approvers is not None and one.who not in terms.approvers:
        return f"the policy names {', '.join(terms.approvers)}"
    if terms.approvers is not None and not one.asserted and terms.approvers[one.who] != one.key:
        return "signed with another key than the policy binds the name to"
    if not terms.self_approval and one.who.casefold() in made:
        return "trained or brought in one of the adapters, and the policy forbids self-approval"
    return _out_of_time(one, terms, released or datetime.now(UTC))


def _out_of_time(one: Approval, terms: ApprovalTerms, at: datetime) -> str | None:
    latest = max(at, datetime.now(UTC))  # a device's own clock may stand still
    if one.time > latest + _CLOCKS_DIFFER:
        return f"dated {one.time.isoformat()}, after {latest.isoformat(timespec='seconds')}: check the clocks"
    if terms.expires_days is not None and at > one.time + timedelta(days=terms.expires_days):
        return f"expired {terms.expires_days:g} days after {one.time.isoformat()}: approve again"
    return None


def moment(text: object) -> datetime:
    """The moment that a record states.

    Raises:
        RecordError: If it is none.
    """
    try:
        found = datetime.fromisoformat(str(text))
    except ValueError:
        raise RecordError(f"a record is dated {text!r}, which is no moment") from None
    if found.tzinfo is None:
        raise RecordError(f"a record is dated {text!r}, without a time zone")
    return found
