"""Factors of modules on a GPU, kept there from one reading of a merge to the next.

A merge looks at every module up to three times. On the CPU the files are read anew each time, so that memory stays at
one module; a card reads its own memory a hundred times faster than files come to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch
from torch import Tensor

from hydraopt.adapters import Adapter

_SHARE = 0.5
"""Of the card's memory that is free when a merge begins: the rest is for the modules being worked on, and others."""

_AHEAD = 8
"""Modules that are read while the card computes."""


@dataclass(frozen=True)
class RawFactors:
    """The factors of one module of K tasks as their files have them, ranks padded with zeros to the largest r."""

    ups: Tensor  # (K, d_out, r), without the scaling
    downs: Tensor  # (K, r, d_in)
    scalings: Tensor  # (K,), float64

    @property
    def bytes(self) -> int:
        """Of the factors."""
        return self.ups.nbytes + self.downs.nbytes

    @property
    def is_bfloat16(self) -> bool:
        """Whether every number is stored as a bfloat16."""
        return self.ups.dtype == torch.bfloat16

    def scaled(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``B_k`` with the scaling and ``A_k``, in memory of their own."""
        ups = self.ups.to(dtype, copy=True)
        return ups.mul_(self.scalings.to(dtype)[:, None, None]), self.downs.to(dtype, copy=True)


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
        adapters = [adapter for _, adapter in sorted(self._adapters.items()) if name in adapter.modules]
        specs = [adapter.modules[name] for adapter in adapters]
        parts = [adapter.parts(name) for adapter in adapters]
        found = {part.dtype for up, down, _ in parts for part in (up, down)}
        wide = torch.float64 if torch.float64 in found else torch.float32
        dtype = found.pop() if len(found) == 1 else wide
        rank = max(spec.rank for spec in specs)
        make = torch.empty if all(spec.rank == rank for spec in specs) else torch.zeros
        pinned = self._device.type == "cuda"  # the card fetches from such pages by itself
        ups = make(len(specs), specs[0].d_out, rank, dtype=dtype, pin_memory=pinned)
        downs = make(len(specs), rank, specs[0].d_in, dtype=dtype, pin_memory=pinned)
        for k, (up, down, _) in enumerate(parts):
            ups[k, :, : up.shape[1]].copy_(up)
            downs[k, : down.shape[0]].copy_(down)
        scalings = torch.tensor([scaling for _, _, scaling in parts], dtype=torch.float64)
        return RawFactors(
            ups.to(self._device, non_blocking=True),
            downs.to(self._device, non_blocking=True),
            scalings.to(self._device),
        )
