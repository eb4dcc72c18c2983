"""Folders that appear whole or not at all, and files that are on the disk when a write returns."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from hydraopt.atomic_files import sync

_ENDING = ".partial"
_LOCK, _NEW, _OLD = "lock", "new", "old"


def write_file(file: Path, *parts: bytes | memoryview) -> None:
    """Write a file's bytes, one part after the other, and wait for the disk."""
    try:
        with file.open("wb") as handle:
            for part in parts:
                handle.write(part)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as reason:
        reason.filename = reason.filename or str(file)  # a full disk does not say what it is too full for
        raise


def is_vacant(folder: Path) -> bool:
    """Whether nothing would be lost by writing a folder there."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a folder of small files whole or not at all, in place of what was there."""
    with in_place_of(folder) as fresh:
        for name, data in files.items():
            write_file(fresh / name, data)
    return folder


@contextmanager
def in_place_of(folder: Path) -> Iterator[Path]:
    """A new folder to fill; when that has gone well, it takes the place of what was there.

    It lies in a hidden one beside it, and what an earlier one left there whose process was killed goes first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    recover(folder)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    with FileLock(made / _LOCK):
        own = made.rename(made.with_name(made.name + _ENDING))  # locked before others look at it
        try:
            fresh = own / _NEW
            fresh.mkdir()
            yield fresh
            sync(fresh)
            if folder.exists():  # a folder cannot replace a non-empty one: move the old one aside first
                folder.rename(own / _OLD)
            fresh.rename(folder)
            sync(folder.parent)
        finally:
            _restore(folder, own)
            shutil.rmtree(own, ignore_errors=True)


def recover(folder: Path) -> None:
    """Clear up behind processes that were killed while they wrote this folder with :func:`in_place_of`.

    If one was in the instant in which the old folder had gone and the new one had not come, the old one comes back.
    """
    for left in folder.parent.iterdir():
        # Between the two lie random letters; a folder whose name is longer by an ending has left its own.
        if left.suffix != _ENDING or Path(left.stem).stem != f".{folder.name}":
            continue
        with suppress(OSError):  # in use (a Timeout), gone meanwhile, or another user's
            if (left / _LOCK).is_file():
                with FileLock(left / _LOCK, timeout=0):  # the lock goes with its process
                    _restore(folder, left)
                    shutil.rmtree(left, ignore_errors=True)


def _restore(folder: Path, left: Path) -> None:
    """Put back an old folder whose successor had not come. If it had, and is not there, somebody has removed it."""
    if (left / _OLD).is_dir() and (left / _NEW).is_dir() and not folder.exists():
        (left / _OLD).rename(folder)
