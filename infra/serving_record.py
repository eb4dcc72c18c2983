"""Which adapters serve, as last seen, in the object store: MLflow may be lost, and this brings its choice back.

``serving/<base>.json`` holds digest by task. It is a copy: what decides is the alias in MLflow, until that is gone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.errors import RecordError
from hydraopt.names import slug
from infra.blobs import Digest
from infra.object_store import ObjectStore
from infra.records import canonical, read_json

_PREFIX = "serving/"
_Change = Callable[[dict[str, str]], dict[str, str]]
_UPDATES = 100  # how often to try again when others change the same record


class ServingRecord(BaseModel):
    """The serving adapters of one base model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = Field(min_length=1)
    adapters: dict[str, Digest] = Field(description="Digest of the serving adapter by task.")


def note_serving(store: ObjectStore, base_model: str, task: str, digest: str) -> None:
    """Remember that an adapter version serves its task from now on."""
    _update(store, base_model, lambda known: {**known, task: digest})


def copy_serving(store: ObjectStore, serving: Mapping[tuple[str, str], str]) -> None:
    """Make the copy what MLflow shows: aliases may have been moved by hand.

    Args:
        store: Where.
        serving: Digest by base model and task.

    Raises:
        RecordError: If MLflow shows nothing at all and the copy does not agree: the database was lost, and copying
            would lose the choice as well.
    """
    known = {one.base_model: one.adapters for one in serving_records(store)}
    if not serving and any(known.values()):
        raise RecordError(
            "MLflow shows no serving adapter, and the store remembers some: if its database was lost, run "
            "`hydraopt repair`; if you took every adapter out of the set, ingest one"
        )
    for base_model in {base for base, _ in serving} | known.keys():
        now = {task: digest for (base, task), digest in serving.items() if base == base_model}
        if known.get(base_model, {}) != now:
            _replace(store, base_model, now)


def serving_records(store: ObjectStore) -> list[ServingRecord]:
    """What serves of every base model, as last seen.

    Raises:
        RecordError: If a record is damaged.
    """
    return [record for key in store.keys(_PREFIX) if (record := _read(store, key)[0])]


def _replace(store: ObjectStore, base_model: str, adapters: dict[str, str]) -> None:
    _update(store, base_model, lambda _: adapters)


def _update(store: ObjectStore, base_model: str, change: _Change) -> None:
    key = f"{_PREFIX}{slug(base_model)}.json"
    for _ in range(_UPDATES):
        known, etag = _read(store, key)
        if known is not None and known.base_model != base_model:
            raise RecordError(
                f"{key} belongs to base model {known.base_model!r}, and {base_model!r} is spelt too much like it"
            )
        adapters = change(dict(known.adapters) if known else {})
        data = canonical({"base_model": base_model, "adapters": adapters})
        if known is not None and adapters == known.adapters:
            return
        if store.create(key, data) if etag is None else store.replace(key, data, etag):
            return
    raise RecordError(f"{key} keeps changing: is something registering adapters in a loop?")


def _read(store: ObjectStore, key: str) -> tuple[ServingRecord | None, str | None]:
    stored = read_json(store, key)
    if stored is None:
        return None, None
    try:
        return ServingRecord.model_validate(stored[0].content), stored[1]
    except ValidationError:
        raise RecordError(f"{key} is damaged: it names no base model and adapters") from None
