"""What was told already, and since when things are as they are: small objects below ``notices/`` in the store."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from hydraopt.names import check_name
from infra.notices import Notice
from infra.object_store import ObjectStore
from infra.records import canonical, create_json, now, read_json
from infra.sign_off import moment

_HEARTBEAT = "notices/reconcile.json"


def was_told(store: ObjectStore, notice: Notice) -> bool:
    """Whether a notice went out before."""
    return store.read(_key(notice)) is not None


def mark_told(store: ObjectStore, notice: Notice) -> None:
    """Remember that a notice went out. After it was sent: killed in between, it is sent once more, never lost."""
    create_json(store, _key(notice), {"time": now(), "subject": notice.subject})


def started(store: ObjectStore) -> datetime:
    """Since when anybody is told anything: what lies before is not news."""
    return moment(create_json(store, "notices/started.json", {"time": now()}).content.get("time"))


def beat(store: ObjectStore) -> None:
    """Remember that a reconcile succeeded now."""
    _put(store, _HEARTBEAT, {"time": now()})


def last_beat(store: ObjectStore) -> datetime | None:
    """When a reconcile last succeeded; None if none ever did."""
    stored = read_json(store, _HEARTBEAT)
    return moment(stored[0].content.get("time")) if stored else None


def drifting_since(store: ObjectStore, name: str, what: dict[str, Any] | None) -> datetime:
    """Since when a bundle's desired state differs from what is live; now, if that is new.

    Args:
        store: Where.
        name: Bundle name.
        what: What differs; None: nothing does, and the next difference is a new one.
    """
    key = f"notices/drift/{check_name(name, 'bundle name')}.json"
    stored = read_json(store, key)
    if stored is not None and stored[0].content.get("what") == what:
        return moment(stored[0].content.get("time"))
    same_drift = what is not None and stored is not None and stored[0].content.get("what") is not None
    time = str(stored[0].content.get("time")) if stored and same_drift else now()
    _put(store, key, {"time": time, "what": what})
    return moment(time)


def utc_now() -> datetime:
    """The present moment."""
    return datetime.now(UTC)


def _key(notice: Notice) -> str:
    return f"notices/told/{notice.event}/{notice.about}.json"


def _put(store: ObjectStore, key: str, content: dict[str, Any]) -> None:
    """Have ``content`` under ``key``; of two that write at once, either will do."""
    stored = store.read(key)
    data = canonical(content)
    if stored is None:
        store.create(key, data)
    elif stored[0] != data:
        store.replace(key, data, stored[1])
