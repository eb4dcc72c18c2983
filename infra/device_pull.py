"""What a device does: fetch what changed of the bundle a channel shows, verify it, switch to it in one step.

``out`` is a symbolic link into ``.<out>.bundles/``, where each bundle is a folder named by its id. Whatever kills
a pull, ``out`` leads to a whole bundle, and the next pull goes on with the files that had arrived.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field

import hydraopt
from hydraopt.atomic_files import sync, write_atomically
from hydraopt.bundle.layout import MANIFEST_FILE, FileEntry
from hydraopt.bundle.manifest_file import parse_manifest
from hydraopt.errors import HydraoptError, RecordError, ServiceError
from hydraopt.progress import Progress
from infra.approvals import check_not_rejected
from infra.approvers import Approvers
from infra.blobs import BlobRef, measure
from infra.bundle_store import read_manifest_bytes
from infra.channels import live
from infra.object_store import ObjectStore
from infra.publishing import read_version
from infra.records import canonical
from infra.supply_chain.release_file import beside, read_release

_FETCHES = 4  # files fetched at the same time
_LOCK_WAIT_S = 120.0
_INCOMING = ".incoming-"


class Pulled(BaseModel):
    """What a pull did."""

    model_config = ConfigDict(frozen=True)

    name: str
    channel: str
    version: int = Field(description="The version that ``out`` holds now.")
    bundle_id: str
    changed: bool = Field(description="Whether ``out`` held another bundle, or none, before.")
    fetched_files: int
    fetched_bytes: int = Field(description="Bytes of the fetched files; the small records are not counted.")
    reused_files: int = Field(description="Files that were here already and are right.")
    approved_by: tuple[str, ...] = Field(description="Whose approvals count on this device.")


def pull(  # noqa: PLR0917 - progress comes last in every verb
    store: ObjectStore,
    name: str,
    channel: str,
    out: Path,
    approvers: Approvers,
    progress: Progress | None = None,
) -> Pulled:
    """Make ``out`` the bundle that ``channel`` shows. Needs no more than reading rights on the store.

    Args:
        store: Where bundles are published.
        name: Bundle name.
        channel: Channel to follow.
        out: Where the bundle should be; must not exist yet, be empty, or come from an earlier pull.
        approvers: Whose approval counts on this device.
        progress: Told after every file.

    Raises:
        RecordError: If nothing is published there, no trusted approver signed it, or anything in the store is
            not what it should be. ``out`` is then as it was.
        RefusedError: If the bundle was rejected, or not approved.
        HydraoptError: If ``out`` is something else, or the disk is full or read-only.
    """
    out = out.absolute()
    pointer = live(store, name, channel)
    if pointer is None:
        raise RecordError(f"nothing is published on channel {channel!r} of {name!r}: check both names")
    if read_version(store, name, pointer.version).bundle_id != pointer.bundle_id:
        raise RecordError(
            f"channel {channel!r} of {name!r} shows another bundle than its version's: changed?"
        )
    check_not_rejected(store, name, pointer.bundle_id)
    data = read_manifest_bytes(store, name, pointer.bundle_id)
    release = read_release(store, name, pointer.bundle_id)
    sign_off = release.verify(parse_manifest(data, f"the manifest of bundle {pointer.bundle_id}"), approvers)
    try:
        with _home_of(out) as home:
            before = _current(out, home)
            fetched, reused = _complete(store, home, pointer.bundle_id, data, progress or _silent)
            write_atomically(beside(home / pointer.bundle_id), canonical(release.model_dump(mode="json")))
            changed = before != pointer.bundle_id
            if changed:
                _switch(out, home, pointer.bundle_id)
            _tidy(home, keep={pointer.bundle_id, before or pointer.bundle_id}, also_newest=not changed)
    except OSError as error:
        raise HydraoptError(
            f"{out} cannot be written ({error.strerror or error}): the bundle it holds stays as it was; make room or "
            "correct the rights, then run this again"
        ) from error
    return Pulled(
        name=name,
        channel=channel,
        version=pointer.version,
        bundle_id=pointer.bundle_id,
        changed=changed,
        fetched_files=len(fetched),
        fetched_bytes=sum(entry.bytes for entry in fetched.values()),
        reused_files=reused,
        approved_by=sign_off.by,
    )


@contextmanager
def _home_of(out: Path) -> Iterator[Path]:
    """The folder that holds the bundles of ``out``, locked against another pull."""
    if not out.is_symlink() and out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise HydraoptError(
            f"{out} exists and did not come from a pull: choose another place, or move it away"
        )
    if not out.is_symlink() and out.resolve() == Path.cwd():
        raise HydraoptError(f"{out} is the folder you are in, and would be replaced: name one inside it")
    home = out.parent / f".{out.name}.bundles"
    if out.is_symlink() and out.readlink().parent != Path(home.name):
        raise HydraoptError(f"{out} is a link that no pull made: choose another place, or remove it")
    home.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(home / ".lock", timeout=_LOCK_WAIT_S):
            yield home
    except Timeout:
        raise ServiceError(
            f"another pull has been working on {out} for {_LOCK_WAIT_S:.0f} s: wait for it, or end it"
        ) from None


def _current(out: Path, home: Path) -> str | None:
    """Id of the bundle that ``out`` leads to, if there is one."""
    if not out.is_symlink():
        return None
    bundle_id = out.readlink().name
    return bundle_id if (home / bundle_id).is_dir() else None


def _complete(
    store: ObjectStore, home: Path, bundle_id: str, data: bytes, progress: Progress
) -> tuple[dict[str, FileEntry], int]:
    """Make ``home/<id>`` a whole, verified bundle; return the fetched files and the number of reused ones."""
    files = parse_manifest(data, f"the manifest of bundle {bundle_id}").files()
    for path in files:
        _check_path(path)
    target, staging = home / bundle_id, home / f"{_INCOMING}{bundle_id}"
    if target.is_dir():
        _remove_links(target)
        wrong = {path: entry for path, entry in files.items() if not _is(target / path, entry)}
        if not wrong and _holds(target / MANIFEST_FILE, bundle_id):
            return {}, len(files)
    fetched = _gather(store, home, staging, files, progress)
    write_atomically(staging / MANIFEST_FILE, data)
    hydraopt.verify(staging)
    sync(staging)
    if target.is_dir():
        _repair(staging, target, [*fetched, MANIFEST_FILE])
    else:
        staging.rename(target)
    sync(home)
    return fetched, len(files) - len(fetched)


def _gather(
    store: ObjectStore, home: Path, staging: Path, files: dict[str, FileEntry], progress: Progress
) -> dict[str, FileEntry]:
    """Put every file into ``staging``, from a bundle that is here if one has it; return those fetched."""
    _remove_links(staging)
    _remove_strays(staging, files)
    here = _files_here(home)
    missing = {path: entry for path, entry in files.items() if not _take(here, staging / path, entry)}
    done = len(files) - len(missing)
    progress(done, len(files), "fetch bundle")

    def fetch(item: tuple[str, FileEntry]) -> None:
        path, entry = item
        store.fetch_blob(BlobRef(sha256=entry.sha256, bytes=entry.bytes), staging / path)

    with ThreadPoolExecutor(_FETCHES) as pool:
        for _ in pool.map(fetch, missing.items()):
            done += 1
            progress(done, len(files), "fetch bundle")
    return missing


def _remove_links(folder: Path) -> None:
    """Remove links, through which we would write elsewhere: a pull makes none inside a bundle."""
    for path in list(folder.rglob("*")):
        if path.is_symlink():
            path.unlink()


def _remove_strays(staging: Path, files: dict[str, FileEntry]) -> None:
    """Remove what a killed pull left half-written."""
    for path in list(staging.rglob("*")):
        if path.is_file() and str(path.relative_to(staging)) not in files:
            path.unlink()


def _files_here(home: Path) -> dict[int, list[Path]]:
    """Every file of every bundle in ``home``, whole or still incoming, by size."""
    found: dict[int, list[Path]] = {}
    for path in home.rglob("*.safetensors"):
        if path.is_file() and not path.is_symlink():
            found.setdefault(path.stat().st_size, []).append(path)
    return found


def _take(here: dict[int, list[Path]], target: Path, entry: FileEntry) -> bool:
    """Whether ``target`` is the right file now, taken from this device if it was not."""
    if _is(target, entry):
        return True
    for candidate in here.get(entry.bytes, []):
        if _is(candidate, entry):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            try:
                os.link(candidate, target)  # costs no space
            except OSError:
                shutil.copyfile(candidate, target)  # a file system without hard links
            return True
    return False


def _repair(staging: Path, target: Path, paths: list[str]) -> None:
    """Replace the damaged files of a bundle that is in use, each in one step."""
    for path in paths:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (staging / path).replace(target / path)
        sync((target / path).parent)
    shutil.rmtree(staging)


def _switch(out: Path, home: Path, bundle_id: str) -> None:
    """Make ``out`` lead to the bundle, in one step: a reader sees the old one or the new one."""
    link = home / ".link"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(home.name) / bundle_id)
    if not out.is_symlink() and out.is_dir():
        out.rmdir()  # empty: checked before
    link.replace(out)
    sync(out.parent)


def _tidy(home: Path, keep: set[str], *, also_newest: bool) -> None:
    """Remove bundles that are neither live nor the one before; a reader may still have that one open."""
    others = [path for path in home.iterdir() if path.is_dir() and path.name not in keep]
    whole = [path for path in others if not path.name.startswith(_INCOMING)]
    if also_newest and whole:
        others.remove(max(whole, key=lambda path: path.stat().st_mtime))
    for path in others:
        shutil.rmtree(path, ignore_errors=True)
        beside(path).unlink(missing_ok=True)


def _check_path(path: str) -> None:
    """Refuse a file name that would be written outside the bundle's folder."""
    parts = PurePosixPath(path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in path or not parts.parts:
        raise RecordError(f"a manifest names a file {path!r} outside its bundle: refused")


def _is(path: Path, entry: FileEntry) -> bool:
    """Whether a local file is exactly this one."""
    try:
        return path.stat().st_size == entry.bytes and measure(path).ref.sha256 == entry.sha256
    except OSError:
        return False


def _holds(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _silent(done: int, total: int, what: str) -> None:
    del done, total, what
