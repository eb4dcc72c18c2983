"""Vectors as a bundle stores them: bytes, read back into numbers when they are wanted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraopt.bundle.layout import Block
from hydraopt.precision import decode, reads_finite, vector_bytes


@dataclass(frozen=True)
class StoredRows:
    """A stack of stored vectors."""

    data: Tensor  # uint8, as many as block.bytes
    block: Block
    dtype: torch.dtype  # of what is kept in 16 or 32 bits

    def read(self) -> Tensor:
        """The vectors (count, length), in float32 if any of them is kept in fewer than 16 bits."""
        parts = [decode(data, self.block.length, bits, self.dtype) for data, bits in self._runs()]
        if not parts:
            return torch.empty(0, self.block.length, dtype=self.dtype, device=self.data.device)
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        return torch.cat(parts)

    def is_finite(self) -> bool:
        """Whether :meth:`read` would give finite numbers only."""
        return all(reads_finite(data, self.block.length, bits, self.dtype) for data, bits in self._runs())

    def _runs(self) -> Iterator[tuple[Tensor, int]]:
        """Neighbours of one precision: their bytes (count, bytes per vector), and bits."""
        start = 0
        for count, bits in self.block.counts:
            width = vector_bytes(self.block.length, bits)
            yield self.data[start : start + count * width].view(count, width), bits
            start += count * width


def read_once() -> Callable[[StoredRows], Tensor]:
    """A function that reads like :meth:`StoredRows.read`, and gives the same tensor for the same object again.

    It keeps all it has read: drop it when the last task is read. Nobody may write into the tensors.
    """
    known: dict[int, tuple[StoredRows, Tensor]] = {}

    def read(rows: StoredRows) -> Tensor:
        if id(rows) not in known:
            known[id(rows)] = rows, rows.read()
        return known[id(rows)][1]

    return read


@dataclass(frozen=True)
class Link:
    """One factor of an update, as the input meets it: ``x -> x rows^T``, or ``x -> x rows`` where ``up``."""

    rows: StoredRows
    up: bool


class Reader:
    """Takes one block of vectors after the other from a flat tensor of bytes."""

    def __init__(self, flat: Tensor, dtype: torch.dtype) -> None:
        self._flat = flat
        self._dtype = dtype
        self._start = 0

    def take(self, blocks: Sequence[Block]) -> list[StoredRows]:
        """The next blocks, not read yet."""
        taken = []
        for block in blocks:
            end = self._start + block.bytes
            taken.append(StoredRows(self._flat[self._start : end], block, self._dtype))
            self._start = end
        return taken
