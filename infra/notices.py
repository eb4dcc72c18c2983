"""What people should be told: worked out from the state of things, so that no event has to be caught.

``<home>/notifications.yaml`` says who is told what::

    tell: [apprise-url/releases, slack-webhook/ops]   # notification blocks in Prefect, by type and name
    events: [candidate-ready, rejected, released, drift, approval-old, reconcile-silent]   # default: all
    drift_hours: 24           # desired is not live
    approval_hours: 48        # a candidate waits for a signature
    silent_minutes: 30        # no reconcile succeeded
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.yaml_file import explain, read_yaml
from infra.candidates import CandidateStatus
from infra.channels import Move

FILE = "notifications.yaml"

Event = Literal["candidate-ready", "rejected", "released", "drift", "approval-old", "reconcile-silent"]
_ALL: tuple[Event, ...] = (
    "candidate-ready",
    "rejected",
    "released",
    "drift",
    "approval-old",
    "reconcile-silent",
)


class NoticeRules(BaseModel):
    """Who is told what, and how long things may take before somebody is told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tell: tuple[str, ...] = Field((), description="Prefect's notification blocks, TYPE/NAME.")
    events: tuple[Event, ...] = Field(_ALL, description="What is told.")
    drift_hours: float = Field(24, gt=0, allow_inf_nan=False)
    approval_hours: float = Field(48, gt=0, allow_inf_nan=False)
    silent_minutes: float = Field(30, gt=0, allow_inf_nan=False)

    @classmethod
    def load(cls, home: Path) -> Self:
        """The rules of a home; without a file nobody is told anything.

        Raises:
            TaskFileError: If the file cannot be used.
        """
        path = home / FILE
        if not path.exists():
            return cls()
        try:
            rules = cls.model_validate(read_yaml(path))
        except ValidationError as error:
            raise TaskFileError(f"{path}: {explain(error)}") from None
        for block in rules.tell:
            if block.count("/") != 1 or not all(block.split("/")):
                raise TaskFileError(
                    f"{path}: {block!r} is no block: write TYPE/NAME, such as slack-webhook/ops"
                )
        return rules


class Notice(NamedTuple):
    """One thing to tell, once."""

    event: Event
    about: str  # what makes it this notice and no other; part of an object key
    subject: str
    body: str


def candidate_notices(
    rules: NoticeRules, candidates: Iterable[CandidateStatus], now: datetime
) -> list[Notice]:
    """Candidates that wait, that wait too long, and that were rejected."""
    notices = []
    for one in candidates:
        about, short = f"{one.name}/{one.bundle_id}", f"{one.name} {one.bundle_id[:12]}"
        waits = f"{one.approvals} of {one.approvals_needed} approvals"
        if one.state == "awaiting-approval":
            drop = "not measured" if one.mean_drop_percent is None else f"{one.mean_drop_percent:.2f} %"
            body = (
                f"{len(one.tasks)} tasks, {one.storage_ratio:.3f} of the input bytes, mean drop {drop}. {waits}. "
                f"hydraopt approve {one.bundle_id[:12]} --as WHO --key FILE"
            )
            notices.append(Notice("candidate-ready", about, f"{short} is ready for approval", body))
            if now - datetime.fromisoformat(one.merged_at) > timedelta(hours=rules.approval_hours):
                subject = f"{short} has waited for approval since {one.merged_at}"
                notices.append(Notice("approval-old", about, subject, waits))
        if one.state == "rejected":
            subject = f"{short} was rejected by {one.decided_by}"
            notices.append(Notice("rejected", about, subject, one.reason or "no reason was given"))
    return notices


def release_notices(moves: Mapping[tuple[str, str], Move]) -> list[Notice]:
    """What each channel shows now, by bundle name and channel."""
    return [
        Notice(
            "released",
            f"{name}/{channel}-{move.sequence:06d}",
            f"{name}, channel {channel}: version {move.version} is live",
            f"{move.action} by {move.by or 'somebody'} at {move.time}, bundle {move.bundle_id}"
            + (f": {move.reason}" if move.reason else ""),
        )
        for (name, channel), move in moves.items()
    ]


def drift_notice(
    rules: NoticeRules, name: str, stand: Mapping[str, Any], since: datetime, now: datetime
) -> Notice | None:
    """A bundle whose desired set is not what devices see, for too long.

    Args:
        rules: How long is too long.
        name: Bundle name.
        stand: Desired and live, see tasks.standing.
        since: When they began to differ.
        now: The present moment.
    """
    if now - since <= timedelta(hours=rules.drift_hours):
        return None
    wanted = stand["desired_bundle_id"] or "not merged yet"
    return Notice(
        "drift",
        f"{name}/{since.strftime('%Y%m%dT%H%M%S')}",
        f"{name}: what devices see has not been what is desired since {since.isoformat(timespec='minutes')}",
        f"desired {wanted} ({stand['desired_state'] or 'no state'}), live {stand['live_bundle_id'] or 'nothing'} on "
        f"{stand['channel']}. See `hydraopt status`",
    )


def silence_notice(rules: NoticeRules, last: datetime, now: datetime) -> Notice | None:
    """No reconcile has succeeded for too long.

    Args:
        rules: How long is too long.
        last: When one last did.
        now: The present moment.
    """
    if now - last <= timedelta(minutes=rules.silent_minutes):
        return None
    return Notice(
        "reconcile-silent",
        last.strftime("%Y%m%dT%H%M%S"),
        f"no reconcile has succeeded since {last.isoformat(timespec='minutes')}",
        "Candidates are not brought up to date and approvals are not released. See `hydraopt status`",
    )
