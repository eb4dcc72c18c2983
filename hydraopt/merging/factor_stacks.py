"""The factors of one module of several tasks, read from their files into one stack for each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.adapters.module import AdapterModule


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


def tasks_with(name: str, adapters: Mapping[str, Adapter]) -> tuple[str, ...]:
    """The tasks that update a module, sorted."""
    return tuple(sorted(task for task, adapter in adapters.items() if name in adapter.modules))


def read_raw(name: str, adapters: Sequence[Adapter], device: torch.device) -> RawFactors:
    """The factors of a module on a device, in the dtype of the files, or one that holds all of theirs."""
    parts = [adapter.parts(name) for adapter in adapters]
    found = {part.dtype for up, down, _ in parts for part in (up, down)}
    wide = torch.float64 if torch.float64 in found else torch.float32
    dtype = found.pop() if len(found) == 1 else wide
    # A GPU fetches from pinned pages by itself.
    pinned = device.type == "cuda"
    ups, downs = _stacks([adapter.modules[name] for adapter in adapters], dtype, pin_memory=pinned)
    for k, (up, down, _) in enumerate(parts):
        ups[k, :, : up.shape[1]].copy_(up)
        downs[k, : down.shape[0]].copy_(down)
    scalings = torch.tensor([scaling for _, _, scaling in parts], dtype=torch.float64)
    return RawFactors(
        ups.to(device, non_blocking=True), downs.to(device, non_blocking=True), scalings.to(device)
    )


def read_scaled(
    name: str, adapters: Sequence[Adapter], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, bool]:
    """``B_k`` with the scaling, ``A_k``, and whether all ``A_k`` are stored in bfloat16.

    Converted task by task as the files are read, while a processor's cache holds them.
    """
    specs = [adapter.modules[name] for adapter in adapters]
    ups, downs = _stacks(specs, dtype, device=device)
    stored = set()
    for k, (adapter, spec) in enumerate(zip(adapters, specs, strict=True)):
        up, down, scaling = adapter.parts(name)
        ups[k, :, : spec.rank].copy_(up).mul_(scaling)
        downs[k, : spec.rank].copy_(down)
        stored.add(down.dtype)
    return ups, downs, stored == {torch.bfloat16}


def _stacks(
    specs: Sequence[AdapterModule],
    dtype: torch.dtype,
    *,
    device: torch.device | None = None,
    pin_memory: bool = False,
) -> tuple[Tensor, Tensor]:
    """Room for all ``B_k`` and all ``A_k``: zeros where some rank is smaller than the largest."""
    rank = max(spec.rank for spec in specs)
    make = torch.empty if all(spec.rank == rank for spec in specs) else torch.zeros
    shapes = (len(specs), specs[0].d_out, rank), (len(specs), rank, specs[0].d_in)
    ups, downs = (make(shape, dtype=dtype, device=device, pin_memory=pin_memory) for shape in shapes)
    return ups, downs
