"""Remove blobs that nothing needs any more; records, manifests, documents and adapters stay for ever.

A bundle's files are kept while a channel shows it or showed it just before, while it is among the newest published
versions, while it is a candidate nobody decided on, and while it is what the adapters that serve now were merged to.
What else lies in ``blobs/`` may go once it is old enough:
whoever is storing something right now stores its blobs first and names them later.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from pydantic import BaseModel, ConfigDict, Field

from hydraopt.errors import RecordError
from hydraopt.progress import Progress
from infra.adapter_store import read_version_record
from infra.bundle_store import read_manifest
from infra.candidates import CandidateStatus, list_candidates
from infra.channels import channels_of, settle
from infra.object_store import ObjectStore, StoredObject
from infra.records import read_record
from infra.serving_record import serving_records
from infra.supply_chain.release_file import parse_description

_MANIFEST = re.compile(r"bundles/([^/]+)/([0-9a-f]{64})/manifest\.json")


class Collected(BaseModel):
    """What a collection found, and whether it removed it."""

    model_config = ConfigDict(frozen=True)

    removed: bool = Field(description="False: this was a dry run.")
    blobs: int = Field(description="Blobs that nothing needs and that are old enough.")
    bytes: int = Field(description="Their size.")
    too_young: int = Field(description="Blobs that nothing names yet, or not any more, but that are young.")
    kept_blobs: int = Field(description="Blobs that something needs.")
    kept_bundles: int
    dropped_bundles: tuple[str, ...] = Field(description="NAME/ID of bundles whose files are not needed.")


def collect_garbage(
    store: ObjectStore,
    *,
    older_than: timedelta,
    keep_versions: int,
    remove: bool = False,
    progress: Progress | None = None,
) -> Collected:
    """Find, and with ``remove`` delete, what nothing needs. Safe to repeat and to kill.

    Args:
        store: Where.
        older_than: Least age of what may go.
        keep_versions: So many of the newest published versions of every bundle stay whole.
        remove: Whether to delete.
        progress: Told after every removed blob.

    Raises:
        RecordError: If a record cannot be read: what it names is not known then, so nothing is removed.
    """
    if keep_versions < 1 or older_than < timedelta(0):
        raise RecordError(
            f"keep at least one version and no negative age, got {keep_versions} versions and {older_than}"
        )
    kept, dropped = _sort_bundles(store, keep_versions)
    needed, limit = _needed(store, kept, dropped), datetime.now(UTC) - older_than
    unneeded: list[StoredObject] = []
    young = seen = 0
    for entry in store.entries("blobs/sha256/"):
        seen += 1
        if _digest(entry) not in needed:
            young += entry.modified > limit
            unneeded += [entry] if entry.modified <= limit else []
    if remove and unneeded:
        # Again, right before: a long listing may have seen the blobs of a bundle that was named meanwhile.
        needed = _needed(store, *_sort_bundles(store, keep_versions))
        unneeded = [entry for entry in unneeded if _digest(entry) not in needed]
        for done, entry in enumerate(unneeded, start=1):
            store.remove(entry.key)
            if progress is not None:
                progress(done, len(unneeded), "remove blobs")
    return Collected(
        removed=remove,
        blobs=len(unneeded),
        bytes=sum(entry.bytes for entry in unneeded),
        too_young=young,
        kept_blobs=seen - young - len(unneeded),
        kept_bundles=len(kept),
        dropped_bundles=tuple(sorted("/".join(one) for one in dropped)),
    )


def _sort_bundles(
    store: ObjectStore, keep_versions: int
) -> tuple[set[tuple[str, str]], set[tuple[str, str]]]:
    """Bundles whose files are needed, and the others, as (name, id)."""
    stored = {(found[1], found[2]) for key in store.keys("bundles/") if (found := _MANIFEST.fullmatch(key))}
    dropped: set[tuple[str, str]] = set()
    serving = {record.base_model: record.adapters for record in serving_records(store)}
    for name in sorted({name for name, _ in stored}):
        states = list_candidates(store, name)
        published = sorted((one.version for one in states if one.version is not None), reverse=True)
        newest = set(published[:keep_versions])
        shown = _shown(store, name)
        for one in states:
            over = one.state == "rejected" or (one.state == "published" and one.version not in newest)
            if over and one.version not in shown and not _serves(store, one, states[0].tasks, serving):
                dropped.add((name, one.bundle_id))
    return stored - dropped, dropped & stored


def _serves(
    store: ObjectStore,
    one: CandidateStatus,
    newest: tuple[str, ...],
    serving: Mapping[str, Mapping[str, str]],
) -> bool:
    """Whether a published bundle holds what serves now: adapters may come back, and then it is wanted again.

    Args:
        store: Where.
        one: The bundle.
        newest: The tasks of the newest bundle of its name; another bundle of these or of all tasks may be wanted.
        serving: Digest by task by base model.
    """
    if one.state != "published":
        return False
    manifest = read_manifest(store, one.name, one.bundle_id)
    now = serving.get(manifest.base_model.name, {})
    whole = set(one.tasks) in ({*newest}, {*now})
    return whole and all(now.get(task) == digest for task, digest in manifest.adapters.items())


def _shown(store: ObjectStore, name: str) -> set[int]:
    """Versions that a channel shows, and those it would go back to."""
    versions: set[int] = set()
    for channel in channels_of(store, name):
        newest = settle(store, name, channel)
        if newest is not None:
            former = [version for version in newest.published if version < newest.version]
            versions |= {newest.version, *([newest.previous] if newest.previous else []), *former[-1:]}
    return versions


def _needed(store: ObjectStore, kept: set[tuple[str, str]], dropped: set[tuple[str, str]]) -> set[str]:
    """SHA-256 of every blob that a kept bundle or an adapter is made of, and of every bundle's documents."""
    digests = {
        entry.sha256
        for name, bundle_id in kept
        for entry in read_manifest(store, name, bundle_id).files().values()
    }
    for key in store.keys("adapters/"):
        version = read_version_record(store, key)
        rows = [version.evaluation_rows] if version.evaluation_rows else []
        digests |= {ref.sha256 for ref in [*version.files.values(), *rows]}
    for name, bundle_id in kept | dropped:
        record = read_record(store, name, bundle_id, "described")
        if record is not None:
            documents = parse_description(record)
            digests |= {documents.provenance.sha256, documents.bom.sha256}
    return digests


def _digest(entry: StoredObject) -> str:
    return entry.key.rpartition("/")[2]
