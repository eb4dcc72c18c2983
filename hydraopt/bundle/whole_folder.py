"""Folders that appear whole or not at all, and files that are on the disk when a write returns."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path


def write_file(file: Path, *parts: bytes | memoryview) -> None:
    """Write a file's bytes, one part after the other, and wait for the disk."""
    with file.open("wb") as handle:
        for part in parts:
            handle.write(part)
        handle.flush()
        os.fsync(handle.fileno())


def is_vacant(folder: Path) -> bool:
    """Whether nothing would be lost by writing a folder there."""
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a folder of small files whole or not at all, in place of what was there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        for name, data in files.items():
            write_file(fresh / name, data)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        fresh.rename(folder)
    return folder
