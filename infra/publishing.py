"""Publish an approved bundle under one number, exactly once; move a channel to it, or back.

Every step is either done or not, and says so in the store: a publisher that is killed anywhere leaves a valid
store, and any later one finishes the work. Two at once do no harm.
"""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.bundle.layout import Manifest
from hydraopt.errors import RecordError
from hydraopt.names import check_name
from infra.approvals import conclude, verify_sign_off
from infra.approvers import Approvers
from infra.blobs import Digest
from infra.bundle_store import missing_files, read_manifest
from infra.channels import Move, move, pointer, settle
from infra.object_store import ObjectStore
from infra.records import about, check_bundle, create_json, create_record, now, read_json, record_key

_VERSION_FILE = re.compile(r"/versions/([0-9]{6,12})\.json$")


class Published(BaseModel):
    """What a channel shows after a publish or a rollback."""

    model_config = ConfigDict(frozen=True)

    name: str
    channel: str
    version: int = Field(description="The version that was asked for.")
    bundle_id: str = Field(description="Its bundle.")
    moved: bool = Field(description="Whether this call moved the channel.")
    live_version: int = Field(description="What the channel shows now.")
    live_bundle_id: str
    sequence: int = Field(description="Number of the channel's newest move.")


class VersionClaim(BaseModel):
    """``bundles/<name>/versions/000012.json``: which bundle has this number, for ever."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: int = Field(ge=1)
    bundle_id: Digest


def publish(
    store: ObjectStore,
    name: str,
    bundle_id: str,
    channel: str,
    approvers: Approvers,
    *,
    by: str | None = None,
) -> Published:
    """Give an approved bundle its version number and make it live on a channel; safe to repeat and to race.

    The channel moves once per bundle, and only forward: a bundle that was published there before, or that is
    older than one published there, leaves it as it is. So a repeated publish never undoes a rollback.

    Raises:
        RefusedError: If the bundle is not approved, or failed its gates.
        RecordError: If anything was changed since the approval, or a file is missing or damaged.
    """
    check_bundle(name, bundle_id)
    check_name(channel, "channel")
    sign_off = verify_sign_off(store, name, bundle_id, approvers)
    conclude(store, name, bundle_id, sign_off)
    _check_files(store, bundle_id, read_manifest(store, name, bundle_id))
    version = _claim_version(store, name, bundle_id)
    before = settle(store, name, channel)

    def next_move(newest: Move | None) -> Move | None:
        if newest is not None and version <= max(newest.published):
            return None
        return _following(newest, "publish", version, bundle_id, by=by or ", ".join(sign_off.by), reason=None)

    newest = move(store, name, channel, next_move)
    if newest is None:
        raise RecordError(f"channel {channel!r} of {name!r} vanished: its log must never be removed")
    create_record(store, name, bundle_id, "published", {"version": version, "channel": channel})
    return _result(name, channel, version, bundle_id, before=before, newest=newest)


def promote(
    store: ObjectStore, name: str, approvers: Approvers, *, source: str, target: str, by: str | None = None
) -> Published:
    """Publish what one channel shows to another as well, by the same rules; safe to repeat.

    Raises:
        RecordError: If nothing is live on ``source``, or ``target`` got a newer version already.
        RefusedError: If the approvals do not count (any more).
    """
    if check_name(source, "channel") == check_name(target, "channel"):
        raise RecordError(f"channel {source!r} cannot be promoted to itself: name another one")
    newest = settle(store, name, source)
    if newest is None:
        raise RecordError(f"nothing is published on channel {source!r} of {name!r}: check both names")
    if read_version(store, name, newest.version).bundle_id != newest.bundle_id:
        raise RecordError(f"channel {source!r} of {name!r} shows another bundle than its version's: changed?")
    done = publish(store, name, newest.bundle_id, target, approvers, by=by)
    if done.live_version != done.version:
        there = settle(store, name, target)
        way = (
            f"; `hydraopt rollback {name} --to {done.version} --channel {target}` brings it back"
            if there is not None and done.version in there.published
            else " and was never live there, so it cannot come back: approve a bundle merged afresh"
        )
        raise RecordError(
            f"channel {target!r} of {name!r} stays at version {done.live_version}: version {done.version} is "
            f"older than what was published there, or was taken back{way}"
        )
    return done


def rollback(
    store: ObjectStore,
    name: str,
    channel: str,
    approvers: Approvers,
    *,
    to: int | None = None,
    by: str | None = None,
    reason: str | None = None,
) -> Published:
    """Make a version live again that was live on this channel before.

    Repeating it with the same ``to`` changes nothing. Without ``to`` each call goes one version further back:
    a caller that may be repeated asks :func:`rollback_target` first and passes the answer.

    Raises:
        RecordError: If there was no such version on this channel, or its records or files were changed.
        RefusedError: If its approval does not count any more.
    """
    version = rollback_target(store, name, channel) if to is None else to
    newest = settle(store, name, channel)
    if newest is None or version not in newest.published:
        raise RecordError(
            f"version {version} was never live on channel {channel!r} of {name!r} "
            f"(there were {_numbers(newest)}): only a published version can come back"
        )
    bundle_id = read_version(store, name, version).bundle_id
    verify_sign_off(store, name, bundle_id, approvers, released=True)
    _check_files(store, bundle_id, read_manifest(store, name, bundle_id))

    def next_move(current: Move | None) -> Move | None:
        if current is not None and current.version == version:
            return None
        return _following(current, "rollback", version, bundle_id, by=by, reason=reason)

    after = move(store, name, channel, next_move) or newest
    _record_rollback(store, name, channel, after)
    return _result(name, channel, version, bundle_id, before=newest, newest=after)


def rollback_target(store: ObjectStore, name: str, channel: str) -> int:
    """The newest version published to the channel before the one that is live.

    A rollback that was cut short before the pointer moved is finished first, and is the one that was asked for.

    Raises:
        RecordError: If there is none, or another move was cut short, so that the caller saw what is live no more.
    """
    shown, newest = pointer(store, name, channel), settle(store, name, channel)
    if newest is not None and newest != shown:
        if newest.action == "rollback":
            return newest.version
        raise RecordError(
            f"channel {channel!r} of {name!r} moved to version {newest.version} just now, as another call had begun: "
            "look at `hydraopt status`, and say which version should come back with `--to`"
        )
    former = [version for version in newest.published if version < newest.version] if newest else []
    if not former:
        raise RecordError(f"channel {channel!r} of {name!r} has no former version to go back to")
    return max(former)


def read_version(store: ObjectStore, name: str, version: int) -> VersionClaim:
    """Which bundle has a version number.

    Raises:
        RecordError: If the number was never given, or its record is damaged.
    """
    claim = _version(store, name, version)
    if claim is None:
        raise RecordError(f"{name!r} has no version {version}")
    return claim


def _version_key(name: str, version: int) -> str:
    return f"bundles/{check_name(name, 'bundle name')}/versions/{version:06d}.json"


def _version(store: ObjectStore, name: str, version: int) -> VersionClaim | None:
    key = _version_key(name, version)
    stored = read_json(store, key)
    if stored is None:
        return None
    try:
        claim = VersionClaim.model_validate(stored[0].content)
    except ValidationError:
        raise RecordError(f"{key} is damaged: it names no version and bundle") from None
    if claim.version != version:
        raise RecordError(f"{key} is about version {claim.version}: it was moved or changed")
    return claim


def _claim_version(store: ObjectStore, name: str, bundle_id: str) -> int:
    """The bundle's number: the one it has, else the next free one.

    Every number is read on the way up, so that a bundle never gets a second one: whoever claims a number
    for this bundle does so on a number we read afterwards, or lose the race for and read then.
    """
    published = read_json(store, record_key(name, bundle_id, "published"))
    if published is not None:
        number = int(published[0].content["version"])
        if read_version(store, name, number).bundle_id == bundle_id:
            return number
    keys = store.keys(f"bundles/{name}/versions/")
    last = max((int(found[1]) for key in keys if (found := _VERSION_FILE.search(key))), default=0)
    number = 1
    while True:
        claim = _version(store, name, number)
        if claim is None and number > last:
            content = about(name, bundle_id, "version", {"version": number})
            create_json(store, _version_key(name, number), content)
            claim = read_version(store, name, number)
        if claim is not None and claim.bundle_id == bundle_id:
            return number
        number += 1


def _check_files(store: ObjectStore, bundle_id: str, manifest: Manifest) -> None:
    """Refuse a bundle of which a device could not fetch every file."""
    missing = missing_files(store, manifest)
    if missing:
        raise RecordError(
            f"bundle {bundle_id} lacks files in the store, or they are damaged ({', '.join(missing[:5])}): "
            "upload it again with `hydraopt reconcile`"
        )


def _following(
    newest: Move | None, action: str, version: int, bundle_id: str, *, by: str | None, reason: str | None
) -> Move:
    """The move after ``newest``."""
    published = newest.published if newest else ()
    return Move.model_validate(
        {
            "sequence": newest.sequence + 1 if newest else 1,
            "action": action,
            "version": version,
            "bundle_id": bundle_id,
            "previous": newest.version if newest else None,
            "published": (*published, version) if action == "publish" else published,
            "time": now(),
            "by": by,
            "reason": reason,
        }
    )


def _record_rollback(store: ObjectStore, name: str, channel: str, newest: Move) -> None:
    """Note with the bundle that was taken back that this happened; the channel's log is what counts."""
    if newest.action != "rollback" or newest.previous is None:
        return
    left = read_version(store, name, newest.previous).bundle_id
    key = f"records/{name}/{left}/rolled-back-{channel}-{newest.sequence:06d}.json"
    content = {"channel": channel, "from_version": newest.previous, "to_version": newest.version}
    content |= {"by": newest.by, "reason": newest.reason}
    create_json(store, key, about(name, left, "rolled-back", content))


def _result(
    name: str, channel: str, version: int, bundle_id: str, *, before: Move | None, newest: Move
) -> Published:
    return Published(
        name=name,
        channel=channel,
        version=version,
        bundle_id=bundle_id,
        moved=newest.version == version and (before is None or before.sequence < newest.sequence),
        live_version=newest.version,
        live_bundle_id=newest.bundle_id,
        sequence=newest.sequence,
    )


def _numbers(newest: Move | None) -> str:
    return ", ".join(str(version) for version in newest.published) if newest else "none"
