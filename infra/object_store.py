"""The object store: blobs named by their content, and small records that are created once.

Any S3 server will do that honours ``If-None-Match``, ``If-Match`` and SHA-256 checksums; :meth:`ObjectStore.self_test`
refuses one that does not, because then two publishers could both win.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import secrets
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from hydraopt.errors import RecordError, ServiceError
from infra.atomic_files import atomic_file
from infra.blobs import BlobRef, Measured, composite_checksum, measure
from infra.settings import Settings
from infra.store_faults import INTERRUPTED, code_of, status_of, told_plainly

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef

LARGEST_RECORD = 32 * 2**20
"""Records are small JSON; a bigger one is damage or an attack. Bytes."""

_CHUNK = 2**20
_ATTEMPTS = 3
_CONFLICTS = 6  # how often to try again when the store says that somebody else is writing right now


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
            self._client = _client(settings, self.address)

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
                self._conditionally(lambda: self._upload(source, content))
            self._check_stored(content)
        return content.ref

    def exists_blob(self, ref: BlobRef) -> bool:
        """Whether the blob is stored with the right size and, where the store tells it, the right checksum."""
        with self._doing(f"looking for {ref.key}"):
            head = self._head(ref.key)
        return head is not None and _agrees(head, Measured(ref, ())) is not False

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
        """Replace ``key`` if it is still the one with ``etag``; else False, also as told in :meth:`create`."""
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
        for attempt in range(_ATTEMPTS):
            with self._doing(f"reading {key}"):
                try:
                    return self._read_once(key)
                except INTERRUPTED:
                    if attempt == _ATTEMPTS - 1:
                        raise
        return None

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key that starts with ``prefix``, in order, page by page."""
        with self._doing(f"listing {prefix}"):
            for page in self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix
            ):
                for entry in page.get("Contents", []):
                    yield entry["Key"]

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
        for key in keys:
            with self._doing(f"removing {key}"):
                self._client.delete_object(Bucket=self.bucket, Key=key)

    def _breaks(self, promise: str) -> ServiceError:
        return ServiceError(
            f"the object store at {self.address} {promise}. Use a server that keeps this promise, such as "
            "SeaweedFS 4.48 or Amazon S3"
        )

    # Requests

    def _doing(self, what: str) -> Any:
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
        with answer["Body"] as body:
            data = body.read(LARGEST_RECORD + 1)
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

    def _upload(self, source: Path | bytes, content: Measured) -> None:
        if content.parts and isinstance(source, Path):
            self._upload_parts(source, content)
        elif isinstance(source, Path):
            with source.open("rb") as handle:
                self._upload_whole(handle, content.ref)
        else:
            self._upload_whole(source, content.ref)

    def _upload_whole(self, body: BinaryIO | bytes, ref: BlobRef) -> None:
        checksum = base64.b64encode(bytes.fromhex(ref.sha256)).decode()
        self._client.put_object(
            Bucket=self.bucket, Key=ref.key, Body=body, IfNoneMatch="*", ChecksumSHA256=checksum
        )

    def _upload_parts(self, source: Path, content: Measured) -> None:
        """Upload in parts; the object appears when the last request completes, if nobody was faster.

        boto3's own ``upload_file`` cannot send ``If-None-Match``, hence by hand.
        """
        target: Any = {"Bucket": self.bucket, "Key": content.ref.key}
        target["UploadId"] = self._client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256")[
            "UploadId"
        ]
        try:
            parts: list[CompletedPartTypeDef] = []
            with source.open("rb") as handle:
                for number, part in enumerate(content.parts, start=1):
                    checksum = base64.b64encode(part.sha256).decode()
                    handle.seek(part.start)
                    done = self._client.upload_part(
                        **target, PartNumber=number, Body=handle.read(part.length), ChecksumSHA256=checksum
                    )
                    parts.append({"PartNumber": number, "ETag": done["ETag"], "ChecksumSHA256": checksum})
            self._client.complete_multipart_upload(
                **target, MultipartUpload={"Parts": parts}, IfNoneMatch="*"
            )
        except BaseException:
            self._client.abort_multipart_upload(**target)
            raise

    def _check_stored(self, content: Measured) -> None:
        """Refuse to go on if the store does not hold exactly this content."""
        ref, head = content.ref, self._head(content.ref.key)
        agrees = None if head is None else _agrees(head, content)
        if agrees is None and head is not None:
            # A store that keeps no checksum we can compare: read everything back.
            for _ in self._verified(ref):
                pass
        elif not agrees:
            raise RecordError(
                f"{ref.key} in bucket {self.bucket!r} does not hold the bytes its name promises: it was "
                "damaged or tampered with. Find out why, delete that object, then run this again"
            )

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
                    if attempts >= _ATTEMPTS:
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
        with answer["Body"] as body:
            yield from body.iter_chunks(_CHUNK)


def _client(settings: Settings, address: str) -> S3Client:
    """A client whose requests fail within ``settings.service_timeout_s`` plus about three seconds of pauses."""
    timeout_s = settings.service_timeout_s / _ATTEMPTS
    key = settings.s3_secret_key
    config = Config(
        signature_version="s3v4",  # presigned addresses default to the older, weaker one
        connect_timeout=min(5.0, timeout_s),
        read_timeout=timeout_s,
        retries={"total_max_attempts": _ATTEMPTS, "mode": "standard"},
        request_checksum_calculation=settings.s3_checksums,
        response_checksum_validation=settings.s3_checksums,
        max_pool_connections=32,
        proxies={} if _is_loopback(address) else None,  # a proxy cannot reach our own machine
        s3={"addressing_style": "path"},  # "bucket.127.0.0.1" is no host name
    )
    session = boto3.session.Session(
        aws_access_key_id=settings.s3_access_key,
        aws_secret_access_key=key.get_secret_value() if key else None,
        region_name=settings.s3_region,
    )
    return session.client("s3", endpoint_url=address, config=config)


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _checksum(data: bytes) -> str:
    return base64.b64encode(hashlib.sha256(data).digest()).decode()


def _agrees(head: HeadObjectOutputTypeDef, content: Measured) -> bool | None:
    """Whether a stored object is this content; None if the store keeps nothing that tells."""
    if head["ContentLength"] != content.ref.bytes:
        return False
    stored = head.get("ChecksumSHA256")
    if stored and "-" not in stored:
        return base64.b64decode(stored).hex() == content.ref.sha256
    if stored and content.parts and stored.endswith(f"-{len(content.parts)}"):
        return stored == composite_checksum(content.parts)
    return None


__all__ = ["LARGEST_RECORD", "BlobRef", "ObjectStore"]
