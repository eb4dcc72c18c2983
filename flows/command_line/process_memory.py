"""How a command that works on thousands of tensors gets its memory: settings of the process, no library's to change."""

from __future__ import annotations

import ctypes
import gc

# Of glibc's malloc.h, for mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT_BYTES = 1 << 30
_KEPT_BLOCK = 1 << 25  # larger ones come too seldom: they would leave holes


def keep_memory() -> None:
    """Use freed memory again instead of giving it back: to be called before anything starts a thread.

    A merge frees and needs again tens of megabytes at every module. glibc gives them back to the system each time,
    and every page that comes again is cleared and mapped: a tenth of a merge.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have none
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK)


def collect_seldom() -> None:
    """Look for garbage once in many small objects, such as tensors' headers, and never in what was imported.

    A tenth of a merge onto a kept part, where it would come 700 times.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
