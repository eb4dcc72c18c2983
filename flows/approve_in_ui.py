"""The flow ``approve-in-ui``: a form in Prefect's pages that writes the same record as ``hydraopt approve``.

Prefect knows nobody by name: what the form says is signed with the service's own key, marked as asserted, and
counts only as far as the bundle's policy lets such approvals count (``asserted:``).
"""

from __future__ import annotations

from typing import Any, Literal

from prefect import flow
from prefect.deployments import run_deployment
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from pydantic import Field

from flows.release import release
from hydraopt.errors import HydraoptError, ServiceError
from infra.candidates import CandidateStatus
from infra.settings import Settings
from tasks.sign_off import candidate_status, channel_of, decide_asserted

_MOST_QUESTIONS = 20


class SignOffForm(RunInput):
    """What the form asks. Nothing has a default: an empty form must not approve."""

    decision: Literal["approve", "reject"] = Field(description="approve or reject")
    name: str = Field(min_length=1, max_length=100, description="Your name, as the policy spells it.")
    reason: str = Field(min_length=1, max_length=2000, description="Why, in a sentence.")


@flow(name="approve-in-ui", flow_run_name="approve {bundle} {bundle_id}")
def approve_in_ui(bundle: str, bundle_id: str) -> dict[str, Any]:
    """Ask until the candidate is decided; after an answer that cannot be taken, ask again and say why.

    The run suspends and costs nothing while it waits. Resumed, it goes through the earlier answers once more,
    which changes nothing, and on to the new one. A decision made elsewhere ends it.

    Args:
        bundle: Name of the bundle.
        bundle_id: Its whole id.
    """
    settings = Settings.load().require_services()
    said = ""
    for question in range(1, _MOST_QUESTIONS + 1):
        status = candidate_status(settings, bundle, bundle_id)
        if status.state != "awaiting-approval":
            break
        answer = suspend_flow_run(
            wait_for_input=SignOffForm.with_initial_data(description=_question(status, said)),
            key=f"{bundle_id[:16]}-{question}",
        )
        try:
            decide_asserted(
                settings, bundle, bundle_id, answer.decision, who=answer.name.strip(), reason=answer.reason
            )
        except ServiceError:
            raise
        except HydraoptError as error:
            said = f"**Not taken:** {error}\n\n"
        else:
            said = f"**{answer.name}: {answer.decision}.**\n\n"
    status = candidate_status(settings, bundle, bundle_id)
    result: dict[str, Any] = {"bundle": bundle, "bundle_id": bundle_id, "released": None}
    if status.state == "approved":
        result["released"] = release(bundle, bundle_id, channel_of(settings, bundle))
        status = candidate_status(settings, bundle, bundle_id)
    return {**result, "state": status.state}


def open_form(bundle: str, bundle_id: str) -> None:
    """Have one form in Prefect's pages for a candidate, however often this is called."""
    run_deployment(
        "approve-in-ui/approve-in-ui",
        parameters={"bundle": bundle, "bundle_id": bundle_id},
        timeout=0,
        idempotency_key=f"approve-in-ui-{bundle}-{bundle_id}",
        as_subflow=False,
    )


def _question(status: CandidateStatus, said: str) -> str:
    drop = "not measured" if status.mean_drop_percent is None else f"{status.mean_drop_percent:.2f} %"
    return (
        f"{said}## {status.name}: approve this candidate?\n\n`{status.bundle_id}`\n\n"
        f"{len(status.tasks)} tasks, {status.storage_ratio:.3f} of the input bytes, mean drop {drop}; the gates "
        f"passed (tables: see the artifacts). {status.approvals} of {status.approvals_needed} approvals so far. "
        "A rejection is final.\n"
    )
