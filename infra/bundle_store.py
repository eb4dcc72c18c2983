"""Bundles in the object store: their files as blobs, their manifest, and which adapter set they came from."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydraopt
from hydraopt.bundle.layout import MANIFEST_FILE, Manifest
from hydraopt.bundle.manifest_file import parse_manifest
from hydraopt.errors import BundleError, RecordError
from hydraopt.names import check_name
from infra.blobs import BlobRef
from infra.object_store import ObjectStore
from infra.records import check_digest, create_json, create_record, manifest_key, read_json, read_record

_UPLOADS = 4  # files sent at the same time
_HEADS = 8  # files looked at at the same time


def upload_bundle(store: ObjectStore, name: str, bundle_dir: Path) -> str:
    """Store a bundle directory under ``name`` and record that it was merged; safe to repeat.

    Returns:
        The bundle's id.

    Raises:
        BundleError: If the directory is damaged, or changes while it is read.
        RecordError: If the store holds something else where this bundle belongs.
    """
    check_name(name, "bundle name")
    manifest = hydraopt.verify(bundle_dir)
    data = (bundle_dir / MANIFEST_FILE).read_bytes()
    bundle_id = hashlib.sha256(data).hexdigest()
    with ThreadPoolExecutor(_UPLOADS) as pool:
        paths = [bundle_dir / path for path in manifest.files()]
        for path, stored, entry in zip(
            paths, pool.map(store.put_blob, paths), manifest.files().values(), strict=True
        ):
            if stored != BlobRef(sha256=entry.sha256, bytes=entry.bytes):
                raise BundleError(f"{path} changed while it was uploaded")
    # After its files: where there is a manifest, there is a whole bundle.
    key = manifest_key(name, bundle_id)
    if not store.create(key, data):
        read_manifest(store, name, bundle_id)
    create_record(
        store,
        name,
        bundle_id,
        "merged",
        {
            "base_model": manifest.base_model.name,
            "adapters": manifest.adapters,
            "storage_ratio": manifest.storage_ratio,
            "relative_error": manifest.relative_error,
        },
    )
    return bundle_id


def read_manifest(store: ObjectStore, name: str, bundle_id: str) -> Manifest:
    """The manifest of a stored bundle, checked against its id; see :func:`read_manifest_bytes`."""
    return parse_manifest(read_manifest_bytes(store, name, bundle_id), manifest_key(name, bundle_id))


def read_manifest_bytes(store: ObjectStore, name: str, bundle_id: str) -> bytes:
    """The very bytes whose SHA-256 is ``bundle_id``.

    Raises:
        RecordError: If the manifest is missing, or was changed.
    """
    key = manifest_key(name, bundle_id)
    stored = store.read(key)
    if stored is None:
        raise RecordError(f"there is no bundle {bundle_id} named {name!r} in the store ({key} is missing)")
    if hashlib.sha256(stored[0]).hexdigest() != bundle_id:
        raise RecordError(f"{key} is not the manifest its name promises: it was damaged or tampered with")
    return stored[0]


def missing_files(store: ObjectStore, manifest: Manifest) -> list[str]:
    """Paths of a bundle's files that the store lacks or holds damaged, many looked at at a time."""
    files = manifest.files()
    refs = [BlobRef(sha256=entry.sha256, bytes=entry.bytes) for entry in files.values()]
    with ThreadPoolExecutor(_HEADS) as pool:
        there = list(pool.map(store.exists_blob, refs))
    return [path for path, found in zip(files, there, strict=True) if not found]


def claim_fingerprint(store: ObjectStore, name: str, fingerprint: str, bundle_id: str) -> str:
    """Make ``bundle_id`` the bundle of an adapter set, unless the set has one; return the one it has.

    Two merges of the same set may differ by rounding; the first one recorded is the one. Where its files were
    collected as garbage and a later merge of the set gave another bundle, that one takes its place.
    """
    check_digest(bundle_id, "bundle id")
    while True:
        claims = _claims(store, name, fingerprint)
        if claims and (claims[-1] == bundle_id or _is_kept(store, name, claims[-1])):
            return claims[-1]
        create_json(store, _fingerprint_key(name, fingerprint, len(claims) + 1), {"bundle_id": bundle_id})


def find_by_fingerprint(store: ObjectStore, name: str, fingerprint: str) -> str | None:
    """Id of the bundle recorded for an adapter set; None if there is none, or its files are not all there.

    One that was rejected is the set's bundle without them as well: it is not merged again.
    """
    claims = _claims(store, name, fingerprint)
    return claims[-1] if claims and _is_kept(store, name, claims[-1]) else None


def _claims(store: ObjectStore, name: str, fingerprint: str) -> list[str]:
    """The bundles that a set had and has, the newest last."""
    found: list[str] = []
    while stored := read_json(store, key := _fingerprint_key(name, fingerprint, len(found) + 1)):
        found.append(check_digest(str(stored[0].content.get("bundle_id")), f"bundle id in {key}"))
    return found


def _is_kept(store: ObjectStore, name: str, bundle_id: str) -> bool:
    """Whether a set's bundle can be released, or was refused for good."""
    decided = read_record(store, name, bundle_id, "decided")
    if decided is not None and decided.content.get("decision") == "rejected":
        return True
    return not missing_files(store, read_manifest(store, name, bundle_id))


def _fingerprint_key(name: str, fingerprint: str, number: int) -> str:
    """Where the ``number``-th bundle (from 1) of an adapter set is named."""
    check_name(name, "bundle name")
    suffix = "" if number == 1 else f"-{number:06d}"
    return f"fingerprints/{name}/{check_digest(fingerprint, 'fingerprint')}{suffix}.json"
