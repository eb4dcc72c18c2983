"""A candidate's sign-off as the form in Prefect's pages needs it."""

from __future__ import annotations

from functools import partial

from hydraopt.errors import RecordError
from infra.approvals import approve_asserted, reject_asserted
from infra.approvers import approvers_of
from infra.candidates import CandidateStatus, read_candidate
from infra.pipeline_spec import load_specs
from infra.settings import Settings
from infra.supply_chain.service_key import service_key
from tasks.store import object_store
from tasks.verb import verb


@verb(task_run_name="see where {name} {bundle_id} stands")
def candidate_status(settings: Settings, name: str, bundle_id: str) -> CandidateStatus:
    """Where one candidate stands."""
    found = read_candidate(object_store(settings), name, bundle_id, partial(approvers_of, settings.home))
    if found is None:
        raise RecordError(f"there is no candidate {bundle_id} of {name!r}: see `hydraopt candidates`")
    return found


@verb(task_run_name="note what {who} says of {name}")
def decide_asserted(  # noqa: PLR0917 - a sentence: who says what of which bundle
    settings: Settings, name: str, bundle_id: str, decision: str, who: str, reason: str
) -> None:
    """Record what somebody who calls himself ``who`` decided in the form."""
    key, approvers = service_key(settings.home), approvers_of(settings.home, name)
    store = object_store(settings)
    if decision == "approve":
        approve_asserted(store, name, bundle_id, who, key, approvers)
    else:
        reject_asserted(store, name, bundle_id, who, reason, approvers)


def channel_of(settings: Settings, name: str) -> str:
    """The channel that an approved bundle is published to."""
    return next((spec.channel for spec in load_specs(settings.home) if spec.name == name), "stable")


def asks_in_ui(settings: Settings, name: str) -> bool:
    """Whether the bundle's policy counts what the form is told."""
    approvers = approvers_of(settings.home, name)
    return approvers.policy is not None and approvers.policy.asserted > 0
