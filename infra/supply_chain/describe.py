"""Give a stored bundle its documents: signed provenance and a bill of materials."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from hydraopt.bundle.layout import Manifest
from hydraopt.errors import RecordError
from infra.adapter_store import AdapterVersion, find_adapter_versions
from infra.approvers import Approvers
from infra.bundle_store import read_manifest
from infra.object_store import ObjectStore
from infra.records import Record, create_record, read_record
from infra.supply_chain.bom import bill_of_materials
from infra.supply_chain.provenance import makers, signed_provenance
from infra.supply_chain.release_file import check_documents, parse_description, read_description


def describe_bundle(
    store: ObjectStore, name: str, bundle_id: str, *, fingerprint: str, key: Ed25519PrivateKey
) -> Record:
    """Write a bundle's documents and the record that names them; safe to repeat, the first ones stay.

    Args:
        store: Where.
        name: Bundle name.
        bundle_id: Bundle id.
        fingerprint: Of the adapter set under its recipe.
        key: The service's own.

    Raises:
        RecordError: If the bundle is not stored whole.
    """
    known = read_record(store, name, bundle_id, "described")
    if known is not None:
        return known
    manifest = read_manifest(store, name, bundle_id)
    merged = read_record(store, name, bundle_id, "merged")
    if merged is None:
        raise RecordError(
            f"bundle {bundle_id} of {name!r} was not uploaded to its end: run `hydraopt reconcile`"
        )
    adapters = stored_adapters(store, manifest)
    provenance = signed_provenance(name, bundle_id, manifest, adapters, fingerprint=fingerprint, key=key)
    bom = bill_of_materials(name, bundle_id, manifest, adapters, merged_at=str(merged.content["time"]))
    content = {
        "provenance": store.put_blob(provenance).model_dump(),
        "bom": store.put_blob(bom).model_dump(),
        "fingerprint": fingerprint,
    }
    return create_record(store, name, bundle_id, "described", content)


def check_description(
    store: ObjectStore, name: str, bundle_id: str, manifest: Manifest, approvers: Approvers
) -> tuple[Record, set[str]]:
    """The record of a bundle's documents, these checked, and who made its adapters as they and the store say.

    Raises:
        RecordError: If a document is missing, was changed, or is about something else.
    """
    record = read_description(store, name, bundle_id)
    refs = parse_description(record)
    statement = check_documents(
        record, name, manifest, store.read_blob(refs.provenance), store.read_blob(refs.bom), approvers
    )
    recorded = stored_adapters(store, manifest).values()
    return record, makers(statement) | {who for version in recorded for who in version.made_by}


def fingerprint_of(store: ObjectStore, name: str, bundle_id: str) -> str | None:
    """The fingerprint of the adapter set that a bundle was merged from; None if it was not described yet.

    Raises:
        RecordError: If the record that says so is damaged.
    """
    record = read_record(store, name, bundle_id, "described")
    return str(record.content["fingerprint"]) if record and "fingerprint" in record.content else None


def stored_adapters(store: ObjectStore, manifest: Manifest) -> dict[str, AdapterVersion]:
    """The recorded version of each adapter of a bundle; one that has no record is left out."""
    return find_adapter_versions(store, manifest.base_model.name, manifest.adapters)
