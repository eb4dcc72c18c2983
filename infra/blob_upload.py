"""Uploading a blob so that it appears whole, with the right bytes, and only if it is not there yet."""

from __future__ import annotations

import base64
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from botocore.exceptions import BotoCoreError, ClientError

from infra.blobs import BlobRef, Measured, composite_checksum
from infra.store_faults import INTERRUPTED

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef, HeadObjectOutputTypeDef


def upload(client: S3Client, bucket: str, source: Path | bytes, content: Measured) -> None:
    """Store ``source`` under its digest if nothing is there; the server checks every byte.

    Raises:
        ClientError: With HTTP status 412 if something is there.
    """
    if content.parts and isinstance(source, Path):
        _upload_parts(client, bucket, source, content)
    elif isinstance(source, Path):
        with source.open("rb") as handle:
            _upload_whole(client, bucket, handle, content.ref)
    else:
        _upload_whole(client, bucket, source, content.ref)


def _upload_whole(client: S3Client, bucket: str, body: BinaryIO | bytes, ref: BlobRef) -> None:
    checksum = base64.b64encode(bytes.fromhex(ref.sha256)).decode()
    client.put_object(Bucket=bucket, Key=ref.key, Body=body, IfNoneMatch="*", ChecksumSHA256=checksum)


def _upload_parts(client: S3Client, bucket: str, source: Path, content: Measured) -> None:
    """Upload in parts; the object appears when the last request completes, if nobody was faster.

    boto3's own ``upload_file`` cannot send ``If-None-Match``, hence by hand.
    """
    target: Any = {"Bucket": bucket, "Key": content.ref.key}
    target["UploadId"] = client.create_multipart_upload(**target, ChecksumAlgorithm="SHA256")["UploadId"]
    try:
        parts: list[CompletedPartTypeDef] = []
        with source.open("rb") as handle:
            for number, part in enumerate(content.parts, start=1):
                checksum = base64.b64encode(part.sha256).decode()
                handle.seek(part.start)
                done = client.upload_part(
                    **target, PartNumber=number, Body=handle.read(part.length), ChecksumSHA256=checksum
                )
                parts.append({"PartNumber": number, "ETag": done["ETag"], "ChecksumSHA256": checksum})
        client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
    except BaseException as error:
        # The store bills parts of an upload nobody finished; but one that does not answer is not asked again.
        if not isinstance(error, INTERRUPTED):
            with contextlib.suppress(ClientError, BotoCoreError):
                client.abort_multipart_upload(**target)
        raise


def agrees(head: HeadObjectOutputTypeDef, content: Measured) -> bool | None:
    """Whether a stored object is this content; None if the store keeps nothing that tells."""
    if head["ContentLength"] != content.ref.bytes:
        return False
    stored = head.get("ChecksumSHA256")
    if stored and "-" not in stored:
        return base64.b64decode(stored).hex() == content.ref.sha256
    if stored and content.parts and stored.endswith(f"-{len(content.parts)}"):
        return stored == composite_checksum(content.parts)
    return None
