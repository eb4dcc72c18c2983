"""All that vouches for a bundle, in one file beside it: checked by ``pull`` and, without any server, by ``verify``.

The file of ``bundle/`` is ``bundle.release.json``; inside the folder it would be a file too many.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hydraopt.bundle.layout import Manifest
from hydraopt.errors import RecordError
from hydraopt.json_text import parse_object
from infra.approvers import Approvers
from infra.blobs import BlobRef, Digest
from infra.object_store import ObjectStore
from infra.records import Record, canonical, read_record, read_records
from infra.sign_off import SignOff, check_description_signed, count_approvals, moment, require
from infra.supply_chain.bom import check_bill
from infra.supply_chain.provenance import makers, open_provenance

_LARGEST = 64 * 2**20


class Description(BaseModel):
    """What the record ``described`` names: the documents of a bundle."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    provenance: BlobRef
    bom: BlobRef


class ReleaseFile(BaseModel):
    """The documents and the records, byte for byte as they lie in the store."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Bundle name.")
    bundle_id: Digest
    described: dict[str, Any] = Field(description="The record that names the two documents.")
    provenance: str = Field(description="The signed statement (DSSE, JSON).")
    bom: str = Field(description="The bill of materials (CycloneDX, JSON).")
    approved: tuple[dict[str, Any], ...] = Field(description="Every approval's record.")
    published: dict[str, Any] | None = Field(description="The record of the release; None: not released yet.")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file.

        Raises:
            RecordError: If it cannot be read or is none.
        """
        try:
            if path.stat().st_size > _LARGEST:
                raise RecordError(f"{path} is too large to be what vouches for a bundle")
            data = path.read_bytes()
        except OSError as error:
            raise RecordError(f"{path} cannot be read: {error.strerror}") from error
        try:
            return cls.model_validate(parse_object(data, str(path), RecordError))
        except (RecordError, ValidationError) as error:
            raise RecordError(f"{path} is damaged: pull the bundle again") from error

    def verify(self, manifest: Manifest, approvers: Approvers) -> SignOff:
        """Check the documents against the bundle and the signatures over them; needs no server.

        Args:
            manifest: The bundle's manifest, already checked against its id.
            approvers: Whose word counts.

        Raises:
            RefusedError: If too few approved.
            RecordError: If a document is about something else, was changed, or is not signed by anybody trusted.
        """
        if self.bundle_id != manifest.id:
            raise RecordError(f"these documents are about bundle {self.bundle_id}, not {manifest.id}")
        described = _record(self.described)
        statement = check_documents(
            described, self.name, manifest, self.provenance.encode(), self.bom.encode(), approvers
        )
        released = moment(self.published.get("time")) if self.published else datetime.now(UTC)
        approvals = [_record(one) for one in self.approved]
        counted = count_approvals(
            approvals, self.name, self.bundle_id, approvers, makers(statement), released=released
        )
        sign_off = require(counted, self.bundle_id, self.name)
        check_description_signed(sign_off, described.sha256, self.bundle_id)
        return sign_off


def beside(bundle: Path) -> Path:
    """Where the file of a bundle's folder lies; a link's lies beside what it leads to."""
    folder = bundle.resolve()
    return folder.with_name(f"{folder.name}.release.json")


def read_release(store: ObjectStore, name: str, bundle_id: str) -> ReleaseFile:
    """Fetch everything that vouches for a bundle. Needs no more than reading rights.

    Raises:
        RecordError: If the bundle has no documents, or they are damaged.
    """
    described = read_description(store, name, bundle_id)
    refs = parse_description(described)
    published = read_record(store, name, bundle_id, "published")
    try:
        return ReleaseFile(
            name=name,
            bundle_id=bundle_id,
            described=described.content,
            provenance=store.read_blob(refs.provenance).decode(),
            bom=store.read_blob(refs.bom).decode(),
            approved=tuple(one.content for one in read_records(store, name, bundle_id, "approved")),
            published=published.content if published else None,
        )
    except UnicodeDecodeError:
        raise RecordError(f"the documents of bundle {bundle_id} are damaged: they are no text") from None


def read_description(store: ObjectStore, name: str, bundle_id: str) -> Record:
    """The record that names a bundle's documents.

    Raises:
        RecordError: If there is none.
    """
    record = read_record(store, name, bundle_id, "described")
    if record is None:
        raise RecordError(
            f"bundle {bundle_id} of {name!r} has no provenance and no bill of materials yet: "
            "run `hydraopt reconcile`"
        )
    return record


def parse_description(record: Record) -> Description:
    """The record's content.

    Raises:
        RecordError: If it is damaged.
    """
    try:
        return Description.model_validate(record.content)
    except ValidationError:
        raise RecordError("the record that names a bundle's provenance is damaged") from None


def check_documents(  # noqa: PLR0917 - private but for its two callers; what is checked against what
    described: Record, name: str, manifest: Manifest, provenance: bytes, bom: bytes, approvers: Approvers
) -> dict[str, Any]:
    """Check a bundle's two documents; return the provenance's statement.

    Raises:
        RecordError: If one was changed, or is about something else.
    """
    refs = parse_description(described)
    for what, ref, data in (
        ("provenance", refs.provenance, provenance),
        ("bill of materials", refs.bom, bom),
    ):
        if hashlib.sha256(data).hexdigest() != ref.sha256:
            raise RecordError(f"the {what} of bundle {manifest.id} was changed after it was recorded")
    check_bill(bom, name, manifest.id, manifest)
    return open_provenance(provenance, name, manifest.id, manifest, approvers.services)


def _record(content: dict[str, Any]) -> Record:
    return Record(content, hashlib.sha256(canonical(content)).hexdigest())
