"""Publish what was signed off, take it back, and show either in MLflow."""

from __future__ import annotations

import contextlib

from hydraopt.errors import RecordError
from infra.approvals import verify_sign_off
from infra.approvers import approvers_of
from infra.bundle_registry import BundleRegistry
from infra.channels import channels_of, live, settle
from infra.publishing import Published, promote, publish, read_version, rollback, rollback_target
from infra.settings import Settings
from infra.sign_off import SignOff
from infra.supply_chain.describe import fingerprint_of
from tasks.store import object_store
from tasks.verb import verb


def names_of(settings: Settings, name: str, bundle_id: str | None) -> dict[str, str | None]:
    """What every log line about a bundle should name. No task: its own lines would have no names yet."""
    fingerprint = fingerprint_of(object_store(settings), name, bundle_id) if bundle_id else None
    return {"bundle": name, "bundle_id": bundle_id, "fingerprint": fingerprint}


def names_of_live(settings: Settings, name: str, channel: str) -> dict[str, str | None]:
    """The names of what a channel shows."""
    shown = live(object_store(settings), name, channel)
    return names_of(settings, name, shown.bundle_id if shown else None)


def names_of_version(settings: Settings, name: str, version: int) -> dict[str, str | None]:
    """The names of a version; of one that never was, whoever is asked to bring it back says so."""
    bundle_id = None
    with contextlib.suppress(RecordError):
        bundle_id = read_version(object_store(settings), name, version).bundle_id
    return names_of(settings, name, bundle_id)


@verb(task_run_name="verify the approvals of {name} {bundle_id}")
def check_sign_off(settings: Settings, name: str, bundle_id: str) -> SignOff:
    """Who signed; refuses if anything the approvals rest on changed, or too few of them count."""
    return verify_sign_off(object_store(settings), name, bundle_id, approvers_of(settings.home, name))


@verb(task_run_name="publish {name} {bundle_id}")
def publish_bundle(settings: Settings, name: str, bundle_id: str, channel: str) -> Published:
    """Give the bundle its version and make it live; a second call changes nothing."""
    return publish(object_store(settings), name, bundle_id, channel, approvers_of(settings.home, name))


@verb(task_run_name="promote {name} from {source} to {target}")
def promote_live(settings: Settings, name: str, source: str, target: str, by: str | None) -> Published:
    """Publish what one channel shows to another one, by the same rules as any release."""
    approvers = approvers_of(settings.home, name)
    return promote(object_store(settings), name, approvers, source=source, target=target, by=by)


@verb(task_run_name="find the version to go back to")
def choose_former_version(settings: Settings, name: str, channel: str) -> int:
    """The version before the live one. Asked once, so that a retry goes back one version and not two."""
    return rollback_target(object_store(settings), name, channel)


@verb(task_run_name="roll {name} back to version {to}")
def move_back(settings: Settings, name: str, channel: str, to: int) -> Published:
    """Point the channel at a version that was live before."""
    return rollback(object_store(settings), name, channel, approvers_of(settings.home, name), to=to)


@verb(task_run_name="finish interrupted moves of {name}")
def finish_moves(settings: Settings, name: str) -> None:
    """Bring the pointer of every channel up to the move that somebody was killed in."""
    store = object_store(settings)
    for channel in channels_of(store, name):
        settle(store, name, channel)


@verb(task_run_name="show what is live of {name} in MLflow")
def show_live(settings: Settings, name: str, channel: str) -> str | None:
    """Bring MLflow's aliases up to date with the channel; they may have been lost or moved by hand.

    Returns:
        The bundle that MLflow showed as live until now, if it showed another one.
    """
    store = object_store(settings)
    newest = live(store, name, channel)
    if newest is None:
        return None
    registry = BundleRegistry(settings)
    showed = registry.shown(name, channel)
    before = None if newest.previous is None else read_version(store, name, newest.previous).bundle_id
    registry.record_release(name, newest.bundle_id, newest.version, channel, before=before)
    return showed if showed != newest.bundle_id else None
