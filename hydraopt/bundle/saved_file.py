"""A bundle's file on the disk: read and checked in one pass, and linked into another bundle that keeps it.

A merge that keeps tasks of a former bundle writes nothing of their files: the new folder gets another name for the
same bytes (a hard link). That is safe for two reasons. The link is made only to the file whose digest was checked when
the former bundle was loaded, in the same process: another inode, size or time of change means that the bytes in
memory are written instead, as on file systems that cannot link. And no bundle is trusted for its path: every load
compares every file with the manifest's digest, so bytes that somebody changes in place, in either folder, are refused
in both.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hydraopt.adapters.tensor_file import TensorFile
from hydraopt.bundle.layout import FileEntry
from hydraopt.errors import BundleError
from hydraopt.own_files import own_file


@dataclass(frozen=True)
class SavedFile:
    """A file whose digest was right when it was read, and how to tell that it is still that one."""

    path: Path
    state: tuple[int, int, int, int]  # device, inode, bytes, time of the last change in ns

    def link(self, target: Path) -> bool:
        """Give the file another name; False, and nothing done, where it is another one by now or cannot be linked."""
        try:
            os.link(self.path, target, follow_symlinks=False)
        except OSError:
            return False
        if _state(target.lstat()) == self.state:
            return True
        target.unlink()
        return False


def find_saved(folder: Path, name: str, entry: FileEntry) -> Path:
    """A bundle's file, which is as long as the manifest says.

    Raises:
        BundleError: If it is missing, a link that leads out of the folder, or of another length.
    """
    file = own_file(folder, name, BundleError)
    if not file.is_file():
        raise BundleError(f"{folder}: {name} is missing")
    _check_length(file, file.stat().st_size, entry)
    return file


def read_saved(file: Path, entry: FileEntry, room: Tensor) -> tuple[dict[str, Tensor], SavedFile]:
    """The tensors of a bundle's file: views of one buffer, whose digest was compared with the manifest's.

    Args:
        file: What :func:`find_saved` found.
        entry: What the manifest says of it.
        room: As many bytes, to be read into.

    Raises:
        BundleError: If it is damaged, changes meanwhile, or is no safetensors file.
    """
    with file.open("rb", buffering=0) as handle:
        view, got = room.numpy().data, 0
        while got < room.nbytes and (count := handle.readinto(view[got:])):
            got += count
        state = _state(os.fstat(handle.fileno()))
    _check_length(file, state[2], entry)
    digest = hashlib.sha256(view[:got]).hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{file}: SHA-256 is {digest}, but the manifest says {entry.sha256}; fetch the bundle again"
        )
    tensors = TensorFile(file, BundleError)
    if bytes(view[: len(tensors.head)]) != tensors.head:
        raise BundleError(f"{file}: the file was changed while it was read; load the bundle again")
    found = {}
    for key, one in tensors.entries.items():
        part = room[one.begin : one.begin + one.size]
        if one.begin % one.dtype.itemsize:  # no writer of today does that
            part = part.clone()
        found[key] = part.view(one.dtype).view(one.shape)
    return found, SavedFile(file, state)


def _check_length(file: Path, found: int, entry: FileEntry) -> None:
    if found != entry.bytes:
        raise BundleError(
            f"{file}: has {found} bytes, but the manifest says {entry.bytes}; fetch the bundle again"
        )


def _state(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
