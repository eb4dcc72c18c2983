"""Digests of adapters whose file has not changed since it was hashed, by what the file system says of it.

To hash every byte is most of what a merge onto a kept shared part does for adapters that did not change. As in git's
index, a file is taken for the one that was hashed if its device, inode, size, time of modification and time of the
last change of its status are the same. The last is set by the kernel at every write, and no program can set it back.
A file that was touched less than two seconds before it was hashed is not remembered: another write in the same tick
of the clock would not show. Configuration and header are read in every run and count, too.

What a wrong answer could do is small: digests are looked up only to tell that a former bundle's file of a task may
be kept. A change would go unnoticed until the next merge of everything, which hashes every byte; what a bundle says of
itself, that the file was made from the adapter of this digest, stays true. An adapter that looks changed is hashed.

They lie in ``hydraopt/digests`` below ``$XDG_CACHE_HOME``, by default ``~/.cache``, and may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from hydraopt.adapters.peft_folder import Adapter
from hydraopt.atomic_files import write_atomically

_SETTLED_NS = 2_000_000_000


def known_digest(adapter: Adapter) -> str:
    """The adapter's digest: looked up if its file is the one it was found for, else of every byte, and remembered."""
    try:
        entry = json.loads(_place(adapter).read_bytes())
        found = entry["digest"] if entry["of"] == _identity(adapter) else None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError):
        found = None
    return found if isinstance(found, str) else hashed(adapter)


def hashed(adapter: Adapter) -> str:
    """The adapter's digest, of every byte; remembered where the file system can tell later changes."""
    with suppress(
        OSError, RuntimeError
    ):  # no home, a full disk or one that may not be written: nothing is remembered
        now, status, before = time.time_ns(), adapter.file.path.stat(), _identity(adapter)
        is_fresh = "digest" not in vars(adapter)  # else it may be of what the file held earlier
        digest = adapter.digest
        if is_fresh and now - max(status.st_ctime_ns, status.st_mtime_ns) > _SETTLED_NS:
            place, entry = _place(adapter), {"of": before, "digest": digest}
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(place, json.dumps(entry).encode(), mode=0o600, on_disk=False)
    return adapter.digest


def _identity(adapter: Adapter) -> list[int | str]:
    status = adapter.file.path.stat()
    times = [status.st_mtime_ns, status.st_ctime_ns]
    return [
        status.st_dev,
        status.st_ino,
        status.st_size,
        *times,
        hashlib.sha256(adapter.meaning).hexdigest(),
    ]


def _place(adapter: Adapter) -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = Path(base) if base else Path.home() / ".cache"
    name = hashlib.sha256(str(adapter.file.path.resolve()).encode(errors="surrogateescape")).hexdigest()
    return folder / "hydraopt" / "digests" / name
