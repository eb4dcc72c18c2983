"""The object store: blobs named by their content, and small records that are created once.

Any S3 server will do that honours ``If-None-Match``, ``If-Match`` and SHA-256 checksums;
:meth:`ObjectStore.self_test` refuses one that does not, because then two publishers could both win.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, suppress
from datetime import datetime
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from botocore.exceptions import ClientError, IncompleteReadError

from hydraopt.atomic_files import atomic_file
from hydraopt.errors import RecordError, ServiceError
from infra.blob_upload import agrees, upload
from infra.blobs import BlobRef, Measured, measure
from infra.settings import Settings
from infra.store_client import ATTEMPTS, make_client
from infra.store_faults import INTERRUPTED, code_of, status_of, told_plainly

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

LARGEST_RECORD = 32 * 2**20
"""Records are small JSON; a bigger one is damage or an attack. Bytes."""

_CHUNK = 2**20
_CONFLICTS = 6  # how often to try again when the store says that somebody else is writing right now


class StoredObject(NamedTuple):
    """What a listing tells of an object."""

    key: str
    bytes: int
    modified: datetime


class ObjectStore:
    """One bucket of one S3 server. Safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        """Make a client; nothing is sent yet.

        Raises:
            ServiceError: If no address is configured.
        """
        if settings.s3_endpoint is None:
            raise ServiceError(
                "the object store has no address: start the local services with `hydraopt up`, "
                "or set HYDRAOPT_S3_ENDPOINT"
            )
        self.address = settings.s3_endpoint
        self.bucket = settings.s3_bucket
        with told_plainly(self.address, self.bucket, "connecting"):
            self._client = make_client(settings, self.address)

    # Blobs

    def put_blob(self, source: Path | bytes) -> BlobRef:
        """Store a file or bytes under its SHA-256, unless it is there already, and check what is stored.

        Safe to repeat and to race: the same content always ends as one whole object.

        Returns:
            The blob's digest and size.

        Raises:
            RecordError: If the store holds other bytes under this digest.
            ServiceError: If the store fails, or the file changed while it was read.
        """
        content = measure(source)
        with self._doing(f"storing {content.ref.key}"):
            if self._head(content.ref.key) is None:
                self._conditionally(lambda: upload(self._client, self.bucket, source, content))
            self._check_stored(content)
        return content.ref

    def exists_blob(self, ref: BlobRef) -> bool:
        """Whether the blob is stored whole: the right size and checksum; read back where the store keeps none.

        Of a blob uploaded in parts the store keeps a checksum of checksums: there the size decides.
        """
        with self._doing(f"looking for {ref.key}"):
            head = self._head(ref.key)
        if head is None:
            return False
        same = agrees(head, Measured(ref, ()))
        if same is None:
            return "-" in head.get("ChecksumSHA256", "") or self._reads_back(ref)
        return same

    def fetch_blob(self, ref: BlobRef, target: Path) -> None:
        """Write the blob to ``target``, which appears whole and with the right SHA-256, or not at all.

        Raises:
            RecordError: If the blob is missing or is not what its digest says.
        """
        with atomic_file(target) as handle:
            for chunk in self._verified(ref):
                handle.write(chunk)

    def read_blob(self, ref: BlobRef) -> bytes:
        """The blob's content, checked; for small ones.

        Raises:
            RecordError: If the blob is missing or is not what its digest says.
        """
        return b"".join(self._verified(ref))

    # Records

    def create(self, key: str, data: bytes) -> bool:
        """Create ``key``; False if it exists.

        False does not always mean that somebody else was first: when the answer to our own request gets
        lost, the repeated request finds our object. Read it back where that matters.
        """
        with self._doing(f"creating {key}"):
            return self._conditionally(
                lambda: self._client.put_object(
                    Bucket=self.bucket, Key=key, Body=data, IfNoneMatch="*", ChecksumSHA256=_checksum(data)
                )
            )

    def replace(self, key: str, data: bytes, etag: str) -> bool:
        """Replace ``key`` if it still has ``etag``; else False, with the caveat of :meth:`create`."""
        with self._doing(f"replacing {key}"):
            return self._conditionally(
                lambda: self._client.put_object(
                    Bucket=self.bucket, Key=key, Body=data, IfMatch=etag, ChecksumSHA256=_checksum(data)
                )
            )

    def read(self, key: str) -> tuple[bytes, str] | None:
        """Content and etag of ``key``; None if there is no such key.

        Raises:
            RecordError: If it is larger than a record may be.
        """
        for attempt in range(ATTEMPTS):
            with self._doing(f"reading {key}"):
                try:
                    return self._read_once(key)
                except INTERRUPTED:
                    if attempt == ATTEMPTS - 1:
                        raise
        return None

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key that starts with ``prefix``, in order, page by page."""
        return (entry.key for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[StoredObject]:
        """Every object whose key starts with ``prefix``, in order, page by page."""
        with self._doing(f"listing {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix
            ):
                for entry in page.get("Contents", []):
                    yield StoredObject(entry["Key"], entry["Size"], entry["LastModified"])

    def remove(self, key: str) -> None:
        """Delete an object for good; only a collection of garbage does that. Absent already: nothing happens."""
        with self._doing(f"removing {key}"):
            self._client.delete_object(Bucket=self.bucket, Key=key)

    # The server

    def self_test(self) -> None:
        """Check with real requests that this server keeps the promises we build on.

        Writes a few objects below ``self-test/`` and removes them.

        Raises:
            ServiceError: Saying which promise is broken.
        """
        key = f"self-test/{secrets.token_hex(8)}"
        try:
            self._test_conditions(key)
            self._test_checksum(key + "-checksum")
        finally:
            self._forget(key, key + "-checksum")

    def _test_conditions(self, key: str) -> None:
        if not self.create(key, b"first"):
            raise self._breaks("creates no new object when asked with If-None-Match")
        if self.create(key, b"second"):
            raise self._breaks("ignores If-None-Match: two publishers could both win")
        stored = self.read(key)
        if stored is None or stored[0] != b"first":
            raise self._breaks("does not return what was written")
        if self.replace(key, b"second", '"00000000000000000000000000000000"'):
            raise self._breaks("ignores If-Match: one pointer move could undo another")
        if not self.replace(key, b"third", stored[1]):
            raise self._breaks("refuses If-Match with the right etag")
        if key not in set(self.keys(key)):
            raise self._breaks("does not list what was written")

    def _test_checksum(self, key: str) -> None:
        with self._doing("checking that a wrong checksum is refused"):
            try:
                self._client.put_object(
                    Bucket=self.bucket, Key=key, Body=b"sent", ChecksumSHA256=_checksum(b"meant")
                )
            except ClientError as error:
                if status_of(error) == HTTPStatus.BAD_REQUEST:
                    return
                raise
        raise self._breaks("accepts bytes that do not match their SHA-256")

    def _forget(self, *keys: str) -> None:
        """Remove what the self-test wrote; a store of releases may well forbid removing anything."""
        for key in keys:
            with suppress(ServiceError), self._doing(f"removing {key}"):
                self._client.delete_object(Bucket=self.bucket, Key=key)

    def _breaks(self, promise: str) -> ServiceError:
        return ServiceError(
            f"the object store at {self.address} {promise}. Use a server that keeps this promise, such as "
            "SeaweedFS 4.48 or Amazon S3"
        )

    # Requests

    def _doing(self, what: str) -> AbstractContextManager[None]:
        return told_plainly(self.address, self.bucket, what)

    def _conditionally(self, request: Callable[[], object]) -> bool:
        """Send a request with a precondition; whether the precondition held."""
        for attempt in range(_CONFLICTS):
            try:
                request()
            except ClientError as error:
                if status_of(error) == HTTPStatus.PRECONDITION_FAILED or code_of(error) == "NoSuchKey":
                    return False
                if status_of(error) != HTTPStatus.CONFLICT or attempt == _CONFLICTS - 1:
                    raise
                time.sleep(0.05 * 2**attempt)  # the store tells us to try again, see S3's documentation
            else:
                return True
        return False

    def _read_once(self, key: str) -> tuple[bytes, str] | None:
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=key)
        except ClientError as error:
            if code_of(error) == "NoSuchKey":
                return None
            raise
        with closing(answer["Body"]) as body:  # as a context manager it gives its raw inside
            data = body.read(LARGEST_RECORD + 1)
        if len(data) < answer["ContentLength"] <= LARGEST_RECORD:
            # boto3 tells only whoever reads on past the end; what came would look damaged.
            raise IncompleteReadError(actual_bytes=len(data), expected_bytes=answer["ContentLength"])
        if len(data) > LARGEST_RECORD:
            raise RecordError(f"{key} is larger than {LARGEST_RECORD} bytes: that is no record of ours")
        return data, answer["ETag"]

    def _head(self, key: str) -> HeadObjectOutputTypeDef | None:
        try:
            return self._client.head_object(Bucket=self.bucket, Key=key, ChecksumMode="ENABLED")
        except ClientError as error:
            if status_of(error) == HTTPStatus.NOT_FOUND:
                return None
            raise

    def _check_stored(self, content: Measured) -> None:
        """Refuse to go on if the store does not hold exactly this content."""
        ref, head = content.ref, self._head(content.ref.key)
        same = False if head is None else agrees(head, content)
        if same or (same is None and self._reads_back(ref)):
            return
        raise RecordError(
            f"{ref.key} in bucket {self.bucket!r} does not hold the bytes its name promises: it was "
            "damaged or tampered with. Find out why, delete that object, then run this again"
        )

    def _reads_back(self, ref: BlobRef) -> bool:
        """Whether what is stored is right, by reading all of it."""
        try:
            for _ in self._verified(ref):
                pass
        except RecordError:
            return False
        return True

    def _verified(self, ref: BlobRef) -> Iterator[bytes]:
        """The blob's bytes; raises before the end if they are not the right ones.

        An interrupted transfer goes on where it stopped.
        """
        digest, done, attempts = hashlib.sha256(), 0, 0
        while done < ref.bytes or (ref.bytes == 0 and attempts == 0):
            before = done
            with self._doing(f"fetching {ref.key}"):
                try:
                    for chunk in self._body(ref, done):
                        done += len(chunk)
                        digest.update(chunk)
                        if done > ref.bytes:
                            break
                        yield chunk
                except INTERRUPTED:
                    attempts = attempts + 1 if done == before else 1
                    if attempts >= ATTEMPTS:
                        raise
                    continue
            break
        if done != ref.bytes or digest.hexdigest() != ref.sha256:
            raise RecordError(
                f"{ref.key} in bucket {self.bucket!r} is not what its name promises ({done} bytes read, "
                f"{ref.bytes} expected): it was damaged or tampered with. Nothing was kept of it"
            )

    def _body(self, ref: BlobRef, start: int) -> Iterator[bytes]:
        ranged: Any = {"Range": f"bytes={start}-"} if start else {}
        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=ref.key, **ranged)
        except ClientError as error:
            if code_of(error) == "NoSuchKey":
                raise RecordError(f"{ref.key} is missing from bucket {self.bucket!r}") from error
            raise
        with closing(answer["Body"]) as body:  # as a context manager it gives its raw inside
            yield from body.iter_chunks(_CHUNK)


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


__all__ = ["LARGEST_RECORD", "BlobRef", "ObjectStore", "StoredObject"]
