"""Adapter versions: files as blobs, one record per version in ``adapters/<base>/<task>/<digest>.json``."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE, read_adapter
from hydraopt.atomic_files import sync
from hydraopt.errors import HydraoptError, RecordError
from hydraopt.json_text import parse_object
from hydraopt.names import check_name, check_task_name, slug
from infra.blobs import BlobRef, Digest, measure
from infra.object_store import ObjectStore
from infra.records import canonical, check_digest, create_json, read_json

FILES = (CONFIG_FILE, TENSOR_FILE)
"""All an adapter folder may hold that means anything."""

_READS = 8  # records read at the same time
_UPDATES = 20  # how often to try again when others change the same version's record


class AdapterVersion(BaseModel):
    """One state of a task's adapter, known by its digest; and how its task is measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str = Field(description="Task name.")
    base_model: str = Field(min_length=1, description="Name of the frozen base model.")
    revision: str | None = Field(None, description="Its revision, if the adapter names one.")
    digest: Digest = Field(description="Of what the adapter computes; see hydraopt.Adapter.digest.")
    files: dict[str, BlobRef] = Field(description="The PEFT files.")
    reference_bytes: int = Field(ge=0, description="Bytes at two bytes a number, plus the configuration.")
    task_definition: dict[str, Any] | None = Field(None, description="The task file, without local paths.")
    evaluation_rows: BlobRef | None = Field(None, description="Test rows, one JSON object a line.")
    own_evaluation: dict[str, Any] | None = Field(None, description="The adapter measured on those rows.")
    source: str = Field(description="Where the adapter came from, for people.")
    training_key: Digest | None = Field(None, description="Of the training that made it, if we did.")
    made_by: tuple[str, ...] = Field((), description="Who trained it or brought it in.")

    @property
    def key(self) -> str:
        """Where the record lies."""
        return version_key(self.base_model, self.task, self.digest)


def version_key(base_model: str, task: str, digest: str) -> str:
    """Where the record of an adapter version lies."""
    return (
        f"adapters/{slug(base_model)}/{check_task_name(task)}/{check_digest(digest, 'adapter digest')}.json"
    )


def store_adapter(
    store: ObjectStore,
    folder: Path,
    *,
    task: str,
    source: str,
    task_definition: Mapping[str, Any] | None = None,
    evaluation_rows: Sequence[Mapping[str, Any]] | None = None,
    own_evaluation: Mapping[str, Any] | None = None,
    training_key: str | None = None,
    made_by: str | None = None,
) -> AdapterVersion:
    """Store an adapter folder as a version of ``task``; safe to repeat.

    Storing the same adapter again may bring another task definition, test set or measurement: what is given
    replaces what was recorded, what is None leaves it. The adapter's own files never change.

    Args:
        store: Where.
        folder: A PEFT folder; only its configuration and its safetensors file are kept.
        task: Task name.
        source: Where the adapter came from, for people.
        task_definition: ``TaskFile.definition()``.
        evaluation_rows: Test rows, so that anybody can measure again without the original data.
        own_evaluation: ``Evaluation`` of this adapter on those rows, as JSON values.
        training_key: Key of the training that made the adapter.
        made_by: Who trained it or brought it in; added to those recorded before.

    Raises:
        AdapterFormatError: If the folder is no adapter that can be read.
        RecordError: If another base model's name is spelt too much like this one's.
    """
    adapter = read_adapter(folder)
    version = AdapterVersion(
        task=check_task_name(task),
        base_model=adapter.base_model,
        revision=adapter.revision,
        digest=adapter.digest,
        files={name: store.put_blob(folder / name) for name in FILES},
        reference_bytes=adapter.reference_bytes,
        task_definition=None if task_definition is None else dict(task_definition),
        evaluation_rows=None if evaluation_rows is None else store.put_blob(_json_lines(evaluation_rows)),
        own_evaluation=None if own_evaluation is None else dict(own_evaluation),
        source=source,
        training_key=training_key,
        made_by=() if made_by is None else (check_name(made_by, "name"),),
    )
    return _record(store, version)


def add_maker(store: ObjectStore, version: AdapterVersion, made_by: str) -> AdapterVersion:
    """Note that ``made_by``, too, asked for this version; returns it as recorded."""
    return _record(store, version.model_copy(update={"made_by": (check_name(made_by, "name"),)}))


def load_adapter_version(store: ObjectStore, base_model: str, task: str, digest: str) -> AdapterVersion:
    """The recorded version.

    Raises:
        RecordError: If there is none, or the record is damaged or about something else.
    """
    version = find_adapter_version(store, base_model, task, digest)
    if version is None:
        raise RecordError(
            f"the store has no adapter {digest} of task {task!r} for {base_model!r}: ingest it again"
        )
    return version


def find_adapter_version(
    store: ObjectStore, base_model: str, task: str, digest: str
) -> AdapterVersion | None:
    """The recorded version, or None.

    Raises:
        RecordError: If the record is damaged or about something else.
    """
    stored = _read(store, version_key(base_model, task, digest))
    if stored is None:
        return None
    version = stored[0]
    if (version.base_model, version.task, version.digest) != (base_model, task, digest):
        raise RecordError(
            f"{version.key} is about task {version.task!r} of {version.base_model!r}, expected {task!r} of "
            f"{base_model!r}"
        )
    return version


def load_adapter_versions(
    store: ObjectStore, base_model: str, digests: Mapping[str, str]
) -> dict[str, AdapterVersion]:
    """The recorded versions of a set, many read at a time, by task.

    Args:
        store: Where.
        base_model: Base model of them all.
        digests: Digest by task.

    Raises:
        RecordError: If one has no record, or it is damaged or about something else.
    """
    with ThreadPoolExecutor(_READS) as pool:
        found = pool.map(lambda one: load_adapter_version(store, base_model, *one), digests.items())
        return dict(zip(digests, found, strict=True))


def find_adapter_versions(
    store: ObjectStore, base_model: str, digests: Mapping[str, str]
) -> dict[str, AdapterVersion]:
    """The same, without those that have no record.

    Raises:
        RecordError: If a record is damaged or about something else.
    """
    with ThreadPoolExecutor(_READS) as pool:
        found = pool.map(lambda one: find_adapter_version(store, base_model, *one), digests.items())
        return {task: one for task, one in zip(digests, found, strict=True) if one is not None}


def read_version_record(store: ObjectStore, key: str) -> AdapterVersion:
    """The version recorded under ``key``, for those who go through all of them.

    Raises:
        RecordError: If there is none, or it is damaged or about something else than its key says.
    """
    stored = _read(store, key)
    if stored is None or stored[0].key != key:
        raise RecordError(f"{key} is not the record of an adapter version that its name promises")
    return stored[0]


def fetch_adapter(store: ObjectStore, version: AdapterVersion, cache_dir: Path) -> Path:
    """A local folder with exactly this version, in ``cache_dir`` by digest; safe to repeat and to race.

    A damaged copy is fetched again. The folder appears whole or not at all.

    Raises:
        RecordError: If the stored files are missing, damaged, or not the adapter they are recorded as.
        HydraoptError: If the disk is full or read-only.
    """
    target = cache_dir / version.digest
    if _is_whole(target, version):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{version.digest[:12]}.", dir=cache_dir))
        try:
            _fetch_files(store, version, staging)
            _put_in_place(staging, target, version)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise HydraoptError(f"{cache_dir} cannot be written: {error.strerror or error}") from error
    return target


def read_evaluation_rows(store: ObjectStore, version: AdapterVersion) -> list[dict[str, Any]] | None:
    """The test rows stored with the version; None if it came without a task file.

    Raises:
        RecordError: If they are missing or damaged.
    """
    if version.evaluation_rows is None:
        return None
    ref = version.evaluation_rows
    lines = store.read_blob(ref).splitlines()
    return [parse_object(line, f"a row of {ref.key}", RecordError) for line in lines]


def note_training(store: ObjectStore, training_key: str, version: AdapterVersion) -> None:
    """Remember which version a training gave, so that the same one need not run again. The first one wins."""
    names = {"base_model": version.base_model, "task": version.task, "digest": version.digest}
    create_json(store, _training(training_key), names)


def find_training(store: ObjectStore, training_key: str) -> AdapterVersion | None:
    """The version that a training gave, or None if it has not finished anywhere yet.

    Raises:
        RecordError: If the note is damaged, or points to a version that is not there.
    """
    key = _training(training_key)
    stored = read_json(store, key)
    if stored is None:
        return None
    note = stored[0].content
    try:
        names = [str(note[field]) for field in ("base_model", "task", "digest")]
    except KeyError:
        raise RecordError(f"{key} is damaged: it does not name an adapter version") from None
    return load_adapter_version(store, *names)


def _training(training_key: str) -> str:
    return f"trainings/{check_digest(training_key, 'training key')}.json"


def _json_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return b"".join(canonical(dict(row)) + b"\n" for row in rows)


def _record(store: ObjectStore, version: AdapterVersion) -> AdapterVersion:
    """Create the version's record, or bring what is new into the one that is there."""
    for _ in range(_UPDATES):
        if store.create(version.key, _bytes(version)):
            return version
        stored = _read(store, version.key)
        if stored is None:
            continue
        known, etag = stored
        if known.base_model != version.base_model:
            raise RecordError(
                f"{version.key} belongs to base model {known.base_model!r}, and {version.base_model!r} is "
                "spelt too much like it: name one of them differently in the adapter's configuration"
            )
        merged = _updated(known, version)
        if merged == known or store.replace(version.key, _bytes(merged), etag):
            return merged
    raise RecordError(f"{version.key} keeps changing: is something storing this adapter in a loop?")


def _updated(known: AdapterVersion, new: AdapterVersion) -> AdapterVersion:
    """``known`` with what ``new`` says about the task, its measurement and its training."""
    fields = ("task_definition", "evaluation_rows", "own_evaluation", "training_key")
    given = {field: value for field in fields if (value := getattr(new, field)) is not None}
    made_by = tuple(sorted({*known.made_by, *new.made_by}))
    return known.model_copy(update=given | {"made_by": made_by})


def _bytes(version: AdapterVersion) -> bytes:
    return canonical(version.model_dump(mode="json"))


def _read(store: ObjectStore, key: str) -> tuple[AdapterVersion, str] | None:
    stored = read_json(store, key)
    if stored is None:
        return None
    try:
        return AdapterVersion.model_validate(stored[0].content), stored[1]
    except ValidationError as error:
        fields = sorted({str(problem["loc"][0]) for problem in error.errors() if problem["loc"]})
        raise RecordError(f"{key} is damaged: {', '.join(fields)} cannot be read") from None


def _is_whole(folder: Path, version: AdapterVersion) -> bool:
    try:
        return {path.name for path in folder.iterdir()} == set(version.files) and all(
            measure(folder / name).ref == ref for name, ref in version.files.items()
        )
    except OSError:
        return False


def _fetch_files(store: ObjectStore, version: AdapterVersion, folder: Path) -> None:
    """Fetch the version's files into ``folder`` and check that they are that adapter."""
    for name, ref in version.files.items():
        if name not in FILES:
            raise RecordError(f"{version.key} names a file {name!r} that is no part of an adapter")
        store.fetch_blob(ref, folder / name)
    _check_is(folder, version)


def _check_is(folder: Path, version: AdapterVersion) -> None:
    """Refuse files that are whole but another adapter than the record says."""
    try:
        found = read_adapter(folder).digest
    except HydraoptError as error:
        raise RecordError(f"{version.key} names files that are no adapter: {error}") from error
    if found != version.digest:
        raise RecordError(f"{version.key} names files of another adapter ({found})")


def _put_in_place(staging: Path, target: Path, version: AdapterVersion) -> None:
    """Rename the finished folder; when somebody else was faster, theirs is as good."""
    sync(staging)
    for _ in range(_UPDATES):
        try:
            staging.rename(target)
        except OSError:
            if _is_whole(target, version):
                return
            # Damaged: out of the way first, in one step, so that no reader sees half a removal.
            aside = Path(tempfile.mkdtemp(prefix=".damaged.", dir=target.parent))
            target.rename(aside / "folder")
            shutil.rmtree(aside, ignore_errors=True)
        else:
            sync(target.parent)
            return
    raise RecordError(f"{target} cannot be replaced: remove it and run this again")
