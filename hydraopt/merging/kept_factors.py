"""Factors of modules on a GPU, kept there from one reading of a merge to the next.

A merge looks at every module up to three times. On the CPU the files are read anew each time, so that memory stays at
one module; a card reads its own memory a hundred times faster than files come to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch

from hydraopt.adapters import Adapter
from hydraopt.merging.factor_stacks import RawFactors, read_raw, tasks_with

_SHARE = 0.5
"""Of the card's memory that is free when a merge begins: the rest is for the modules being worked on, and others."""

_AHEAD = 8
"""Modules that are read while the card computes."""


class KeptFactors:
    """Brings modules of some adapters to a device, and keeps what fits.

    Args:
        adapters: By task name.
        device: Where to.
        most: Bytes to keep there at most; what does not fit is read again.
    """

    def __init__(self, adapters: Mapping[str, Adapter], device: torch.device, most: int) -> None:
        self._adapters = adapters
        self._device = device
        self._left = most
        self._lock = Lock()
        self._kept: dict[str, RawFactors] = {}
        self._coming: dict[str, Future[RawFactors]] = {}
        self._asked: Iterator[tuple[str, Future[RawFactors]]] = iter(())

    @classmethod
    def on(cls, device: torch.device, adapters: Mapping[str, Adapter]) -> KeptFactors | None:
        """For a merge on that device; None on the CPU, whose memory is not for whole sets of adapters."""
        if device.type != "cuda":
            return None
        free, _ = torch.cuda.mem_get_info(device)
        return cls(adapters, device, int(_SHARE * free))

    def factors(self, name: str) -> RawFactors:
        """One module of all tasks that have it, sorted."""
        with self._lock:
            if name in self._kept:
                return self._kept[name]
            while len(self._coming) < _AHEAD and (asked := next(self._asked, None)):
                self._coming[asked[0]] = asked[1]
            coming = self._coming.pop(name, None)
        found = self._read(name) if coming is None else coming.result()
        with self._lock:
            if found.bytes <= self._left:
                self._left -= found.bytes
                self._kept[name] = found
        return found

    @contextmanager
    def reading_ahead(self, names: Iterable[str]) -> Iterator[None]:
        """Read what is missing of some modules, which will be asked for in this order, while others are worked on."""
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            missing = [name for name in names if name not in self._kept]
            self._asked = ((name, pool.submit(self._read, name)) for name in missing)
            try:
                yield
            finally:
                self._asked = iter(())
                self._coming.clear()

    def _read(self, name: str) -> RawFactors:
        having = [self._adapters[task] for task in tasks_with(name, self._adapters)]
        return read_raw(name, having, self._device)
