"""Candidates: where each stands, and in one place every verb on one, from the merge to the decision."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from hydraopt.errors import RecordError
from hydraopt.evaluation.gates import Verdict
from hydraopt.names import check_name
from infra.approvals import approve, reject
from infra.approvers import Approvers
from infra.bundle_store import claim_fingerprint, find_by_fingerprint, read_manifest, upload_bundle
from infra.evidence import read_evidence, read_gate_report, write_evidence, write_gate_report
from infra.object_store import ObjectStore
from infra.records import State, check_bundle, read_record, read_records
from infra.sign_off import SignOff, count_approvals
from infra.supply_chain.describe import stored_adapters

CandidateState = Literal["merged", "gated-failed", "awaiting-approval", "approved", "rejected", "published"]

_SHORTEST_PREFIX = 4
_READS = 8  # candidates read at the same time


class CandidateStatus(BaseModel):
    """Where one candidate stands, as its records tell; nothing is verified again here."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(description="Bundle name.")
    bundle_id: str
    state: CandidateState
    version: int | None = Field(None, description="Number under which it was published.")
    merged_at: str = Field(description="UTC time.")
    tasks: tuple[str, ...] = Field(description="Task names.")
    storage_ratio: float = Field(description="Bundle bytes over the adapters' bytes.")
    mean_drop_percent: float | None = Field(None, description="Mean loss of the tasks' metrics, percent.")
    failures: tuple[str, ...] = Field((), description="What the gates found wrong.")
    decided_by: str | None = Field(None, description="Who approved or rejected it.")
    decided_at: str | None = Field(None, description="UTC time.")
    reason: str | None = Field(None, description="Why it was rejected.")
    approvals: int | None = Field(None, description="How many approvals count; None where nobody counted.")
    approvals_needed: int | None = Field(None, description="How many the policy wants.")
    approved_by: tuple[str, ...] = Field((), description="Whose approval counts.")


def list_candidates(
    store: ObjectStore,
    name: str | None = None,
    approvers_of: Callable[[str], Approvers] | None = None,
    *,
    only: Callable[[Collection[str]], bool] = lambda _states: True,
) -> list[CandidateStatus]:
    """Every candidate (of one bundle name), newest first.

    Args:
        store: Where.
        name: Bundle name; None: all.
        approvers_of: Whose word counts for a bundle name: then approvals are counted for what is not published.
        only: Given the states that a candidate has records of: whether it is wanted. The others are not read.

    Raises:
        RecordError: If a record is damaged.
    """
    prefix = "records/" if name is None else f"records/{check_name(name, 'bundle name')}/"
    found = [(which, seen) for which, seen in _states(store, prefix).items() if only(seen)]
    with ThreadPoolExecutor(_READS) as pool:  # there are more of them every day
        read = list(pool.map(lambda one: _status(store, one[0], one[1], approvers_of), found))
    return sorted(read, key=lambda one: (one.merged_at, one.bundle_id), reverse=True)


def read_candidate(
    store: ObjectStore,
    name: str,
    bundle_id: str,
    approvers_of: Callable[[str], Approvers] | None = None,
) -> CandidateStatus | None:
    """One candidate; None if there is none of that id.

    Raises:
        RecordError: If a record is damaged.
    """
    check_bundle(name, bundle_id)
    for which, seen in _states(store, f"records/{name}/{bundle_id}/").items():
        return _status(store, which, seen, approvers_of)
    return None


def _states(store: ObjectStore, prefix: str) -> dict[tuple[str, str], set[str]]:
    """The states that records below ``prefix`` tell of, by bundle name and id, of all that were merged."""
    states: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
    for key in store.keys(prefix):
        parts = key.split("/")
        if len(parts) == 4:
            states[parts[1], parts[2]].add(re.split(r"[-.]", parts[3])[0])
    return {which: seen for which, seen in states.items() if "merged" in seen}


def resolve(store: ObjectStore, id_prefix: str, name: str | None = None) -> tuple[str, str]:
    """The bundle name and whole id of the one candidate whose id starts with ``id_prefix``.

    Args:
        store: Where.
        id_prefix: The first characters of the id, or ``NAME/`` and these.
        name: Bundle name; None looks at all.

    Raises:
        RecordError: If the prefix is too short or no hex, or none or several candidates match.
    """
    if name is None and "/" in id_prefix:
        name, id_prefix = id_prefix.split("/", 1)
    if not re.fullmatch(rf"[0-9a-f]{{{_SHORTEST_PREFIX},64}}", id_prefix):
        raise RecordError(f"{id_prefix!r} is no bundle id: give {_SHORTEST_PREFIX} to 64 of 0-9 and a-f")
    prefix = "records/" if name is None else f"records/{check_name(name, 'bundle name')}/"
    parts = (key.split("/") for key in store.keys(prefix))
    found = sorted({(one[1], one[2]) for one in parts if len(one) == 4 and one[2].startswith(id_prefix)})
    if not found:
        raise RecordError(f"no candidate's id starts with {id_prefix!r}: see `hydraopt candidates`")
    if len(found) > 1:
        names = ", ".join(f"{bundle}/{bundle_id[:16]}" for bundle, bundle_id in found[:5])
        raise RecordError(
            f"{len(found)} candidates start with {id_prefix!r} ({names}): give more of the id, or NAME/ID"
        )
    return found[0]


def _failure(verdict: Verdict, bundle_id: str) -> str:
    return verdict.reason if verdict.subject == bundle_id else f"{verdict.subject}: {verdict.reason}"


def _status(
    store: ObjectStore,
    which: tuple[str, str],
    seen: set[str],
    approvers_of: Callable[[str], Approvers] | None,
) -> CandidateStatus:
    name, bundle_id = which

    def content(state: State) -> dict[str, Any]:
        record = read_record(store, name, bundle_id, state) if state in seen else None
        return record.content if record else {}

    merged, decided, published = content("merged"), content("decided"), content("published")
    report = read_gate_report(store, name, bundle_id) if "gated" in seen else None
    decision, sign_off = decided.get("decision"), None
    if approvers_of is not None and report is not None and report.passed and not published:
        sign_off = count(store, name, bundle_id, approvers_of(name))
        if decision != "rejected":
            decision = "approved" if sign_off.complete else None
    try:
        return CandidateStatus(
            name=name,
            bundle_id=bundle_id,
            state=_state(published, decision, None if report is None else report.passed),
            version=published.get("version"),
            merged_at=merged["time"],
            tasks=tuple(sorted(merged["adapters"])),
            storage_ratio=merged["storage_ratio"],
            mean_drop_percent=report.mean_drop_percent if report else None,
            failures=tuple(_failure(one, bundle_id) for one in report.verdicts if not one.passed)
            if report
            else (),
            decided_by=decided.get("as") if decision else None,
            decided_at=decided.get("time") if decision else None,
            reason=content("rejected").get("reason"),
            approvals=len(sign_off.by) if sign_off else None,
            approvals_needed=sign_off.needed if sign_off else None,
            approved_by=sign_off.by if sign_off else (),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"the records of bundle {bundle_id} of {name!r} are damaged") from error


def count(store: ObjectStore, name: str, bundle_id: str, approvers: Approvers) -> SignOff:
    """The approvals so far; who trained is looked up, where it matters, as the adapters' records say."""
    records = list(read_records(store, name, bundle_id, "approved"))
    made: set[str] = set()
    if records and not approvers.terms.self_approval:
        versions = stored_adapters(store, read_manifest(store, name, bundle_id)).values()
        made = {who for version in versions for who in version.made_by}
    return count_approvals(records, name, bundle_id, approvers, made)


def _state(published: dict[str, Any], decision: Any, passed: bool | None) -> CandidateState:
    if published:
        return "published"
    if decision in {"approved", "rejected"}:
        return "approved" if decision == "approved" else "rejected"
    if passed is None:
        return "merged"
    return "awaiting-approval" if passed else "gated-failed"


__all__ = [
    "CandidateState",
    "CandidateStatus",
    "approve",
    "claim_fingerprint",
    "count",
    "find_by_fingerprint",
    "list_candidates",
    "read_candidate",
    "read_evidence",
    "read_gate_report",
    "read_manifest",
    "reject",
    "resolve",
    "upload_bundle",
    "write_evidence",
    "write_gate_report",
]
