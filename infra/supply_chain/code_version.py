"""Which code made something: the package's version, and the digest of the library's source as it is installed."""

from __future__ import annotations

import functools
import hashlib
from importlib import metadata
from pathlib import Path

import hydraopt


def version() -> str:
    """The version of the installed package."""
    return metadata.version("hydraopt")


@functools.cache
def source_sha256() -> str:
    """SHA-256 (hex) over the path and content of every module of the library, in order of their paths."""
    root = Path(hydraopt.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()
