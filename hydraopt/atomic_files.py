"""Files that are either whole or not there, whatever kills the process that writes them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(target: Path, mode: int = 0o644, *, on_disk: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``target``; on success it is on disk and becomes ``target``.

    On an exception ``target`` is as it was. The folder is made if it is missing.

    Args:
        target: The file.
        mode: Its permissions.
        on_disk: Whether to wait for the disk. False is for what may be lost, and is checked when it is read: a
            machine that loses power may leave an empty file.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            yield handle
            if on_disk:
                handle.flush()
                os.fsync(handle.fileno())
        temporary.chmod(mode)
        temporary.replace(target)
        if on_disk:
            sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(target: Path, content: bytes, mode: int = 0o644, *, on_disk: bool = True) -> Path:
    """Make ``content`` the content of ``target`` in one step, as :func:`atomic_file` does; return ``target``."""
    with atomic_file(target, mode, on_disk=on_disk) as handle:
        handle.write(content)
    return target


def sync(path: Path) -> None:
    """Ask the disk to keep a file's content, or what was created, renamed or removed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
