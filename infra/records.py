"""Records: small JSON objects in the store that are created once and never changed.

``records/<name>/<id>/<state>.json`` tells that a bundle reached a state. Where something may be said again for
another reason (a new measurement, other gates, a second signature), the next is ``<state>-000002.json``.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

from hydraopt.errors import RecordError
from hydraopt.json_text import parse_object
from hydraopt.names import check_name
from infra.object_store import ObjectStore

State = Literal["merged", "described", "evaluated", "gated", "decided", "approved", "rejected", "published"]

_DIGEST = re.compile(r"[0-9a-f]{64}")


class Record(NamedTuple):
    """A record and the SHA-256 (hex) of its bytes, by which others refer to it."""

    content: dict[str, Any]
    sha256: str


def check_digest(value: str, what: str) -> str:
    """Return ``value`` if it is a whole SHA-256 in lower-case hex.

    Raises:
        RecordError: If it is not.
    """
    if not _DIGEST.fullmatch(value):
        raise RecordError(f"{what} {value!r} is no SHA-256: expected 64 of 0-9 and a-f")
    return value


def check_bundle(name: str, bundle_id: str) -> None:
    """Refuse a bundle name or id that could not be part of a key."""
    check_name(name, "bundle name")
    check_digest(bundle_id, "bundle id")


def manifest_key(name: str, bundle_id: str) -> str:
    """Where a bundle's manifest lies."""
    check_bundle(name, bundle_id)
    return f"bundles/{name}/{bundle_id}/manifest.json"


def record_key(name: str, bundle_id: str, state: str, number: int = 1) -> str:
    """Where the ``number``-th record (from 1) of a bundle's state lies."""
    check_bundle(name, bundle_id)
    suffix = "" if number == 1 else f"-{number:06d}"
    return f"records/{name}/{bundle_id}/{state}{suffix}.json"


def now() -> str:
    """The present moment in UTC, as records state it: to the millisecond, so that what came first sorts first."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def canonical(content: dict[str, Any]) -> bytes:
    """The one way we write a JSON object; a number that is not finite becomes a string such as ``"NaN"``."""
    return json.dumps(
        _finite(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def read_json(store: ObjectStore, key: str) -> tuple[Record, str] | None:
    """The JSON object under ``key`` and its etag; None if there is none.

    Raises:
        RecordError: If it is no JSON object.
    """
    stored = store.read(key)
    if stored is None:
        return None
    data, etag = stored
    content = parse_object(data, f"the record {key} is damaged", RecordError)
    return Record(content, hashlib.sha256(data).hexdigest()), etag


def create_json(store: ObjectStore, key: str, content: dict[str, Any]) -> Record:
    """Create ``key`` unless it exists; return what is there now. The first one wins."""
    data = canonical(content)
    if store.create(key, data):
        return Record(json.loads(data), hashlib.sha256(data).hexdigest())
    stored = read_json(store, key)
    if stored is None:
        raise RecordError(f"{key} was removed while it was read: records must never be removed")
    return stored[0]


def read_record(store: ObjectStore, name: str, bundle_id: str, state: State) -> Record | None:
    """A bundle's first record of a state, or None."""
    stored = read_json(store, record_key(name, bundle_id, state))
    return stored[0] if stored else None


def read_records(store: ObjectStore, name: str, bundle_id: str, state: State) -> Iterator[Record]:
    """All of a bundle's records of a state, oldest first."""
    number = 1
    while stored := read_json(store, record_key(name, bundle_id, state, number)):
        yield stored[0]
        number += 1


def latest_record(store: ObjectStore, name: str, bundle_id: str, state: State) -> Record | None:
    """A bundle's newest record of a state, or None."""
    known = list(read_records(store, name, bundle_id, state))
    return known[-1] if known else None


def append_record(
    store: ObjectStore,
    name: str,
    bundle_id: str,
    state: State,
    content: dict[str, Any],
    *,
    unless_same: tuple[str, ...],
) -> Record:
    """Add a record of a state, unless the newest one says the same already; return the one that counts.

    Args:
        store: Where.
        name: Bundle name.
        bundle_id: Bundle id.
        state: Kind of record.
        content: What to say; ``schema``, ``name``, ``bundle_id`` and ``time`` are added.
        unless_same: Fields of ``content`` by which two records say the same.
    """
    full = about(name, bundle_id, state, content)
    said = json.loads(canonical(full))
    known = list(read_records(store, name, bundle_id, state))
    number, newest = len(known), known[-1] if known else None
    while newest is None or any(newest.content.get(field) != said[field] for field in unless_same):
        number += 1
        newest = create_json(store, record_key(name, bundle_id, state, number), full)
    return newest


def create_record(
    store: ObjectStore, name: str, bundle_id: str, state: State, content: dict[str, Any]
) -> Record:
    """Say once that a bundle reached a state; return the record, which may be an earlier one."""
    return create_json(store, record_key(name, bundle_id, state), about(name, bundle_id, state, content))


def about(name: str, bundle_id: str, state: str, content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with what every record says: of what kind it is, about which bundle, and when."""
    return {
        "schema": f"hydraopt.{state}/1",
        "name": name,
        "bundle_id": bundle_id,
        "time": now(),
        **content,
    }
