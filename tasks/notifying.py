"""Tell people, through Prefect's notification blocks, what the state of things says they should know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial

from apprise import Apprise
from prefect.blocks.abstract import NotificationBlock
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from pydantic import Field, SecretStr

from hydraopt.errors import ServiceError, TaskFileError
from infra.approvers import approvers_of
from infra.candidates import CandidateStatus, list_candidates
from infra.channels import Move, channels_of, settle
from infra.notice_log import (
    beat,
    drifting_since,
    last_beat,
    mark_told,
    started,
    utc_now,
    was_told,
)
from infra.notices import (
    Notice,
    NoticeRules,
    candidate_notices,
    drift_notice,
    release_notices,
    silence_notice,
)
from infra.object_store import ObjectStore
from infra.settings import Settings
from infra.sign_off import moment
from tasks.standing import standing
from tasks.store import object_store
from tasks.verb import verb


class AppriseUrl(AppriseNotificationBlock):
    """Any service that Apprise knows, by its URL: mail (``mailtos://``), Slack, a web hook (``jsons://``) and more."""

    _block_type_name = "Apprise URL"
    _block_type_slug = "apprise-url"

    url: SecretStr = Field(description="Such as mailtos://user:password@example.com; kept secret by Prefect.")


@verb(task_run_name="note that reconcile succeeded")
def note_reconciled(settings: Settings) -> None:
    """Leave the sign of life that the dead man's switch looks for."""
    beat(object_store(settings))


@verb(task_run_name="look for what people should know")
def due_notices(settings: Settings) -> list[Notice]:
    """What the rules say should be told and was not yet; the same again until it was."""
    rules = NoticeRules.load(settings.home)
    if not rules.tell:
        return []
    store, now = object_store(settings), utc_now()
    start = started(store)
    found = []
    silence = silence_notice(rules, max(start, last_beat(store) or start), now)
    if silence is not None:
        found.append(silence)
    candidates = list_candidates(store, None, partial(approvers_of, settings.home))
    found += candidate_notices(rules, _news(candidates, start), now)
    found += release_notices(_moves(store, {one.name for one in candidates}, start))
    if "drift" in rules.events:
        found += _drifts(settings, rules, store, now)
    return [one for one in found if one.event in rules.events and not was_told(store, one)]


@verb(task_run_name="tell {notice.subject}")
def tell(settings: Settings, notice: Notice) -> None:
    """Send one notice to everybody on the list, then remember that it went out.

    Raises:
        ServiceError: If somebody could not be told. The others were, and everybody is told again later.
    """
    problems = [
        problem
        for block in NoticeRules.load(settings.home).tell
        if (problem := _send(block, notice.subject, notice.body))
    ]
    if problems:
        raise ServiceError("; ".join(problems))
    mark_told(object_store(settings), notice)


def save_url(name: str, url: str) -> None:
    """Send a first message to an Apprise URL, and keep it in Prefect as the block ``apprise-url/NAME``.

    Raises:
        TaskFileError: If it is no such URL.
        ServiceError: If that message cannot be delivered.
    """
    with _silent_apprise():
        is_known = Apprise().add(url)
    if not is_known:
        raise TaskFileError("this is no Apprise URL, such as mailto://... or slack://...; nothing was saved")
    block = AppriseUrl(url=SecretStr(url))
    subject = "hydraopt can tell you things here"
    if problem := _send_through(block, f"apprise-url/{name}", subject, "This is a test message."):
        raise ServiceError(
            f"{problem}; nothing was saved: is the service reached from here, and are the words in the URL right?"
        )
    block.save(name, overwrite=True)


@contextmanager
def _silent_apprise() -> Iterator[None]:
    """It logs the whole address of what it cannot read, secrets and all."""
    logger = logging.getLogger("apprise")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _send(name: str, subject: str, body: str) -> str | None:
    """Send through one block of Prefect's; what went wrong."""
    problem = _send_through(_load(name), name, subject, body)
    return problem and f"{problem}: check it in Prefect's pages"


def _send_through(block: NotificationBlock, name: str, subject: str, body: str) -> str | None:
    """Send; what went wrong, without the address, which may hold a secret."""
    try:
        with _silent_apprise(), block.raise_on_failure():
            block.notify(body, subject)
    except Exception as error:  # noqa: BLE001 - every service fails in its own way
        return f"the notification block {name!r} failed ({type(error).__name__})"
    return None


def _load(name: str) -> NotificationBlock:
    try:
        block = Block.load(name)
    except ValueError:
        raise TaskFileError(
            f"Prefect has no block {name!r}: make it in its pages, or with `hydraopt notify NAME --url-file FILE`"
        ) from None
    if not isinstance(block, NotificationBlock):
        raise TaskFileError(f"the block {name!r} is a {type(block).__name__}, which sends no notifications")
    return block


def _news(candidates: list[CandidateStatus], start: datetime) -> list[CandidateStatus]:
    return [one for one in candidates if moment(one.decided_at or one.merged_at) >= start or _waits(one)]


def _waits(one: CandidateStatus) -> bool:
    """What waits is news, however old it is."""
    return one.state == "awaiting-approval"


def _moves(store: ObjectStore, names: set[str], start: datetime) -> dict[tuple[str, str], Move]:
    newest = {
        (name, channel): move
        for name in sorted(names)
        for channel in channels_of(store, name)
        if (move := settle(store, name, channel))
    }
    return {which: move for which, move in newest.items() if moment(move.time) >= start}


def _drifts(settings: Settings, rules: NoticeRules, store: ObjectStore, now: datetime) -> list[Notice]:
    found = []
    for name, stand in standing(settings).items():
        what = (
            None
            if stand["up_to_date"]
            else {"desired": stand["fingerprint"], "live": stand["live_bundle_id"]}
        )
        since = drifting_since(store, name, what)
        notice = drift_notice(rules, name, stand, since, now) if what is not None else None
        found += [notice] if notice is not None else []
    return found
