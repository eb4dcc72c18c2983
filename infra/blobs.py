"""A blob is named by its content: ``blobs/sha256/<hex>``. What is stored under a name never changes."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

MULTIPART_FROM = 64 * 2**20
"""Files of this many bytes or more are uploaded in parts."""

_PART_BYTES = 32 * 2**20
_MOST_PARTS = 9000  # S3 allows 10 000
_CHUNK = 2**20

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hex."""


class BlobRef(BaseModel):
    """What a blob must be: its SHA-256 and its size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Digest
    bytes: int = Field(ge=0)

    @property
    def key(self) -> str:
        """Where the blob lies in the bucket."""
        return f"blobs/sha256/{self.sha256}"


class Part(NamedTuple):
    """One piece of a big file."""

    start: int
    length: int
    sha256: bytes


class Measured(NamedTuple):
    """A file read once: what it is, and its parts if it is big (else none)."""

    ref: BlobRef
    parts: tuple[Part, ...]


def measure(source: Path | bytes) -> Measured:
    """Hash a file or bytes in one pass, in constant memory."""
    if isinstance(source, bytes):
        return Measured(BlobRef(sha256=hashlib.sha256(source).hexdigest(), bytes=len(source)), ())
    size = source.stat().st_size
    part_bytes = _part_bytes(size)
    whole, done, parts = hashlib.sha256(), 0, []
    with source.open("rb") as handle:
        while True:
            piece, start = hashlib.sha256(), done
            while done - start < part_bytes:
                chunk = handle.read(min(_CHUNK, part_bytes - (done - start)))
                if not chunk:
                    break
                whole.update(chunk)
                piece.update(chunk)
                done += len(chunk)
            if done == start:
                break
            parts.append(Part(start, done - start, piece.digest()))
    ref = BlobRef(sha256=whole.hexdigest(), bytes=done)
    return Measured(ref, tuple(parts) if done >= MULTIPART_FROM else ())


def _part_bytes(size: int) -> int:
    """Part size of a file of ``size`` bytes: a function of the size alone, so that checksums compare."""
    megabytes = -(-size // (_MOST_PARTS * 2**20))
    return max(_PART_BYTES, megabytes * 2**20)


def composite_checksum(parts: tuple[Part, ...]) -> str:
    """The checksum S3 gives an object uploaded in these parts: base64(SHA-256 of SHA-256s)-count."""
    digest = hashlib.sha256(b"".join(part.sha256 for part in parts)).digest()
    return f"{base64.b64encode(digest).decode()}-{len(parts)}"
