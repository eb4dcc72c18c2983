"""Measuring files, and files that are whole or not there."""

from __future__ import annotations

import base64
import hashlib
import os

import pytest
from pydantic import ValidationError

from infra import blobs
from infra.blobs import BlobRef, composite_checksum, measure

MEGABYTE = 2**20


def test_file_and_bytes_measure_alike(tmp_path):
    content = os.urandom(3_000_001)
    (tmp_path / "file").write_bytes(content)
    expected = BlobRef(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
    assert measure(tmp_path / "file").ref == measure(content).ref == expected
    assert measure(tmp_path / "file").parts == ()


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_parts_cover_a_big_file_once_and_in_order(tmp_path, monkeypatch, extra):
    monkeypatch.setattr(blobs, "MULTIPART_FROM", 2 * MEGABYTE)
    monkeypatch.setattr(blobs, "_PART_BYTES", MEGABYTE)
    content = os.urandom(4 * MEGABYTE + extra)
    (tmp_path / "file").write_bytes(content)
    parts = measure(tmp_path / "file").parts
    assert b"".join(content[part.start : part.start + part.length] for part in parts) == content
    pieces = [content[start : start + MEGABYTE] for start in range(0, len(content), MEGABYTE)]
    digests = [hashlib.sha256(piece).digest() for piece in pieces]
    assert [part.sha256 for part in parts] == digests
    whole = base64.b64encode(hashlib.sha256(b"".join(digests)).digest()).decode()
    assert composite_checksum(parts) == f"{whole}-{len(digests)}"


def test_no_file_needs_more_parts_than_s3_allows():
    largest = 5 * 2**40
    assert -(-largest // blobs._part_bytes(largest)) <= 10_000


@pytest.mark.parametrize("digest", ["", "ab", "A" * 64, "../" + "a" * 61, "a" * 64 + "\n"])
def test_digest_that_could_leave_its_folder_is_refused(digest):
    with pytest.raises(ValidationError):
        BlobRef(sha256=digest, bytes=1)
