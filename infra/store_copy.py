"""Copy a whole store into a folder, and back: every object under its key, checked, and an index with every digest.

Dependents are read before what they refer to, and written after it: a copy that is made while others publish is one
that a publisher killed at some moment could have left.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.atomic_files import write_atomically
from hydraopt.errors import HydraoptError, RecordError
from hydraopt.json_text import parse_object
from hydraopt.own_files import own_file
from hydraopt.progress import Progress
from infra.blobs import BlobRef, Digest, measure
from infra.object_store import ObjectStore
from infra.records import canonical

INDEX = "index.json"
_OBJECTS = "objects"
_ORDER = (
    "channels/",
    "serving/",
    "trainings/",
    "fingerprints/",
    "records/",
    "bundles/",
    "adapters/",
    "blobs/",
)
_WAY_OUT = "restore into an empty bucket, or one that holds a part of this copy and was not used since"
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


class Index(BaseModel):
    """``index.json``: what a copy holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    objects: dict[str, tuple[Digest, int]] = Field(description="SHA-256 and size by key.")


class Copied(BaseModel):
    """What an export or a restore did."""

    model_config = ConfigDict(frozen=True)

    objects: int
    bytes: int
    copied: int = Field(description="Objects that were not there yet.")


def export_store(store: ObjectStore, folder: Path, progress: Progress) -> Copied:
    """Copy every object of the store below ``folder``; safe to repeat: what is there and right is kept.

    Raises:
        RecordError: If a blob is damaged, or a key is none of ours and would leave the folder.
        HydraoptError: If the disk is full or read-only.
    """
    entries: dict[str, tuple[str, int]] = {}
    copied = 0
    try:
        # Channels twice: a pointer that moved after the first listing needs the newest move of its log, too.
        for prefix in (_ORDER[0], *_ORDER):
            for entry in [one for one in store.entries(prefix) if one.key not in entries]:
                ref, new = _export_one(store, entry.key, _path(folder, entry.key), entry.bytes)
                entries[entry.key] = (ref.sha256, ref.bytes)
                copied += new
                progress(len(entries), len(entries) + 1, "export")
        write_atomically(folder / INDEX, canonical(Index(objects=entries).model_dump(mode="json")))
    except OSError as error:
        raise HydraoptError(f"{folder} cannot be written: {error.strerror or error}") from error
    progress(len(entries), len(entries), "export")
    return Copied(objects=len(entries), bytes=sum(size for _, size in entries.values()), copied=copied)


def restore_store(store: ObjectStore, folder: Path, progress: Progress) -> Copied:
    """Put a copy back into a store that is empty, or holds a part of the same copy; safe to repeat.

    Everything is checked before anything is written, and nothing that is there is replaced.

    Raises:
        RecordError: If a file is missing or is not what the index says, or the store holds something else under
            one of the keys.
    """
    objects = _checked(folder, progress)
    _refuse_others(store, folder, objects)
    copied = 0
    ordered = sorted(objects, key=lambda key: (-_rank(key), "/log/" not in key, key))
    for done, key in enumerate(ordered, start=1):
        copied += _restore_one(store, key, _path(folder, key))
        progress(done, len(ordered), "restore")
    return Copied(objects=len(objects), bytes=sum(size for _, size in objects.values()), copied=copied)


def _export_one(store: ObjectStore, key: str, path: Path, size: int) -> tuple[BlobRef, bool]:
    """Have one object in its file; what it is, and whether it was not there."""
    if found := _BLOB.fullmatch(key):
        ref = BlobRef(sha256=found[1], bytes=size)
        if path.is_file() and measure(path).ref == ref:
            return ref, False
        store.fetch_blob(ref, path)
        return ref, True
    stored = store.read(key)
    if stored is None:
        raise RecordError(f"{key} was removed while it was copied: records must never be removed")
    ref = measure(stored[0]).ref
    if path.is_file() and measure(path).ref == ref:
        return ref, False
    write_atomically(path, stored[0])
    return ref, True


def _restore_one(store: ObjectStore, key: str, path: Path) -> bool:
    """Create one object; whether it was not there."""
    if _BLOB.fullmatch(key):
        ref = measure(path).ref
        known = store.exists_blob(ref)
        if not known:
            store.put_blob(path)
        return not known
    data = path.read_bytes()
    if store.create(key, data):
        return True
    _refuse_another(store, key, data)
    return False


def _refuse_others(store: ObjectStore, folder: Path, objects: Mapping[str, object]) -> None:
    """Refuse a store that holds anything but a part of the copy, before anything is written."""
    for key in store.keys(""):
        if not key.startswith(_ORDER):
            continue
        if key not in objects:
            raise RecordError(f"the store holds {key}, which is not in this copy: {_WAY_OUT}")
        if not _BLOB.fullmatch(key):
            _refuse_another(store, key, _path(folder, key).read_bytes())


def _refuse_another(store: ObjectStore, key: str, data: bytes) -> None:
    stored = store.read(key)
    if stored is None or stored[0] != data:
        raise RecordError(f"the store holds something else under {key}: {_WAY_OUT}")


def _checked(folder: Path, progress: Progress) -> dict[str, tuple[str, int]]:
    """The index, after every file was compared with it."""
    try:
        data = own_file(folder, INDEX, RecordError).read_bytes()
    except OSError as error:
        raise RecordError(
            f"{folder / INDEX} cannot be read ({error.strerror}): an export writes it last, finish that one first"
        ) from error
    try:
        index = Index.model_validate(parse_object(data, str(folder / INDEX), RecordError))
    except (RecordError, ValidationError) as error:
        raise RecordError(f"{folder / INDEX} is damaged: export again") from error
    for done, (key, (sha256, size)) in enumerate(index.objects.items(), start=1):
        path = _path(folder, key)
        found = _BLOB.fullmatch(key)
        ref = BlobRef(sha256=sha256, bytes=size)
        if not path.is_file() or measure(path).ref != ref or (found and found[1] != sha256):
            raise RecordError(f"{path} is missing or not what the index says: export again")
        progress(done, len(index.objects), "check")
    return dict(index.objects)


def _rank(key: str) -> int:
    return next(rank for rank, prefix in enumerate(_ORDER) if key.startswith(prefix))


def _path(folder: Path, key: str) -> Path:
    """The file of a key; a key or a link that would leave the folder, or a key that is none of ours, is refused."""
    parts = PurePosixPath(key).parts
    clean = "/".join(parts) == key and ".." not in parts and "\\" not in key and "\0" not in key
    if not clean or not key.startswith(_ORDER):
        raise RecordError(f"{key!r} is no key of ours: it is not copied")
    return own_file(folder, f"{_OBJECTS}/{key}", RecordError)
