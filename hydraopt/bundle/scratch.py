"""Memory for the bytes of a bundle: many of them lie in an unnamed file, from where the system fetches what is used.

A merge of hundreds of adapters makes a bundle of gigabytes, but looks at one module or one file of it at a time. The
file is in the system's temporary folder (``TMPDIR``), has its whole size before the first byte is written, so that a
full disk is seen then and not later, and goes with the process, however that ends.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

SPILL_BYTES = 1 << 28
"""From how many on bytes lie in a file. Fewer are cheaper in memory."""

_ROOM = 2  # times as much must be free: others need the disk, too


class Scratch:
    """Room for some tensors.

    Args:
        sizes: Their bytes.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        size = sum(map(_aligned, sizes))
        self._pages = _unnamed_file(size) if size >= SPILL_BYTES else None
        self._begin = 0 if self._pages is None else np.frombuffer(self._pages, np.uint8).ctypes.data
        self._taken = 0

    def take(self, size: int) -> Tensor:
        """Bytes to be written, one of the sizes."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if self._pages is None:
            # NumPy asks for large pages: small ones are mapped at a gigabyte a second.
            return torch.from_numpy(np.empty(size, dtype=np.uint8))
        start = self._taken
        self._taken += _aligned(size)
        return torch.from_numpy(np.frombuffer(self._pages, np.uint8, size, start))

    def keep(self, tensor: Tensor) -> Tensor:
        """The tensor, in this memory; its bytes are one of the sizes."""
        if self._pages is None or not tensor.nbytes:
            return tensor
        place = self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        place.copy_(tensor)
        self.let_go(place)
        return place

    def let_go(self, part: Tensor | None = None) -> None:
        """Leave bytes that were written or read to the system: they are fetched again when they are looked at.

        Args:
            part: Some of what lies here, or None for all of it. A tensor that lies elsewhere is left alone.
        """
        if self._pages is None:
            return
        if part is None:
            self._pages.madvise(mmap.MADV_DONTNEED)
            return
        start = part.data_ptr() - self._begin
        if 0 <= start < len(self._pages):
            before = start % mmap.PAGESIZE
            self._pages.madvise(mmap.MADV_DONTNEED, start - before, before + part.nbytes)


def _aligned(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE  # only whole pages can be let go


def _unnamed_file(size: int) -> mmap.mmap | None:
    """A file's bytes as memory; None where there is no room for it, or no such thing."""
    if not hasattr(os, "posix_fallocate"):
        return None
    try:
        folder = tempfile.gettempdir()
        if shutil.disk_usage(folder).free < _ROOM * size:
            return None
        with tempfile.TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)
    except OSError:
        return None
