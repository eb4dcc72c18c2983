"""Channels: the pointer that devices follow, and the log of its moves.

A move is the creation of ``channels/<name>/<channel>/log/<sequence>.json``: whoever creates number n made the
n-th move, and nobody else did. ``channels/<name>/<channel>.json`` is a copy of the newest entry, from which readers go
on to entries that are newer: whatever stops a move half-way, or brings an old copy back, it counts. The next caller
with writing rights brings the copy up to date.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.errors import RecordError
from hydraopt.names import check_name
from infra.blobs import Digest
from infra.object_store import ObjectStore
from infra.records import canonical, create_json, read_json

_RACES = 100  # how often to try again when others move the same channel


class Move(BaseModel):
    """One entry of a channel's log: what is live from then on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sequence: int = Field(ge=1, description="Number of the move; the first is 1.")
    action: Literal["publish", "rollback"]
    version: int = Field(ge=1, description="The version that is live after the move.")
    bundle_id: Digest
    previous: int | None = Field(description="The version that was live before it.")
    published: tuple[int, ...] = Field(description="Every version ever published to this channel, in order.")
    time: str = Field(description="UTC time.")
    by: str | None = Field(None, description="Who asked for it, for people.")
    reason: str | None = Field(None, description="Why, for people.")


def pointer_key(name: str, channel: str) -> str:
    """Where the pointer lies that devices read."""
    return f"channels/{check_name(name, 'bundle name')}/{check_name(channel, 'channel')}.json"


def log_key(name: str, channel: str, sequence: int) -> str:
    """Where the ``sequence``-th move is recorded."""
    check_name(name, "bundle name")
    return f"channels/{name}/{check_name(channel, 'channel')}/log/{sequence:06d}.json"


def channels_of(store: ObjectStore, name: str) -> list[str]:
    """The channels that a bundle was ever published to, sorted."""
    prefix = f"channels/{check_name(name, 'bundle name')}/"
    return sorted(
        {key.removeprefix(prefix).split("/")[0].removesuffix(".json") for key in store.keys(prefix)}
    )


def live(store: ObjectStore, name: str, channel: str) -> Move | None:
    """The newest move, which is what devices see now; None if nothing was ever published there.

    Raises:
        RecordError: As for :func:`pointer`, or if the log is damaged.
    """
    newest = pointer(store, name, channel)
    while True:
        number = newest.sequence + 1 if newest else 1
        key = log_key(name, channel, number)
        entry = _read(store, key)
        if entry is None:
            return newest
        newest = entry[0]
        if newest.sequence != number:
            raise RecordError(f"{key} is about move {newest.sequence}: it was copied or changed")


def pointer(store: ObjectStore, name: str, channel: str) -> Move | None:
    """The move that the pointer shows, which may not be the newest one; None if there is no pointer.

    Raises:
        RecordError: If the pointer is damaged, or is not the copy of a move that the log holds.
    """
    key = pointer_key(name, channel)
    stored = _read(store, key)
    if stored is None:
        return None
    entry = _read(store, log_key(name, channel, stored[0].sequence))
    if entry is None or entry[0] != stored[0]:
        raise RecordError(
            f"{key} does not show move {stored[0].sequence} as the channel's log holds it: it was changed. Find out "
            "why, remove it, and have `hydraopt repair` write it again"
        )
    return stored[0]


def settle(store: ObjectStore, name: str, channel: str) -> Move | None:
    """Bring the pointer up to the newest move and return that; safe at any time, needed after a kill."""
    newest = live(store, name, channel)
    if newest is not None:
        _point(store, name, channel, newest)
    return newest


def move(
    store: ObjectStore, name: str, channel: str, decide: Callable[[Move | None], Move | None]
) -> Move | None:
    """Make one move, or none.

    Args:
        store: Where.
        name: Bundle name.
        channel: Channel name.
        decide: Gets the newest move and returns the next one, or None to leave the channel as it is. Called
            again when somebody else moved in between.

    Returns:
        The newest move; None if there never was one.
    """
    for _ in range(_RACES):
        newest = settle(store, name, channel)
        wanted = decide(newest)
        if wanted is None:
            return newest
        entry = create_json(store, log_key(name, channel, wanted.sequence), wanted.model_dump(mode="json"))
        settled = settle(store, name, channel)
        if entry.content == wanted.model_dump(mode="json"):
            return settled
    raise RecordError(f"channel {channel!r} of {name!r} keeps moving: is something publishing in a loop?")


def _point(store: ObjectStore, name: str, channel: str, newest: Move) -> None:
    """Make the pointer a copy of ``newest``, unless it shows that move or a later one."""
    key, data = pointer_key(name, channel), canonical(newest.model_dump(mode="json"))
    for _ in range(_RACES):
        stored = _read(store, key)
        if stored is None:
            store.create(key, data)
        elif stored[0].sequence < newest.sequence:
            store.replace(key, data, stored[1])
        else:
            return
    raise RecordError(f"{key} keeps changing: is something publishing in a loop?")


def _read(store: ObjectStore, key: str) -> tuple[Move, str] | None:
    stored = read_json(store, key)
    if stored is None:
        return None
    try:
        return Move.model_validate(stored[0].content), stored[1]
    except ValidationError as error:
        raise RecordError(f"{key} is damaged: {error.error_count()} fields cannot be read") from None
