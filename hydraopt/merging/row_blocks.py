"""Matrices too large to be whole: read again and again in blocks of rows, and brought to low rank that way.

Element-wise methods (TIES, DARE) leave no low-rank structure in ``dW``. Their result is a function of the tasks'
entries, so any block of its rows can be recomputed from the factors whenever it is needed. Memory stays at a few
blocks and a few thin factors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hydraopt.errors import BudgetError
from hydraopt.merging.low_rank import LowRank, check_space, checked, compressed, padded, target_rank

Space = Literal["factors", "dw"]
"""Where an element-wise method works: on A and B apart, or on the entries of dW."""

BLOCK_NUMBERS = 1 << 18
"""Numbers in one block of rows: a megabyte in float32, so that a block stays in the processor's cache."""

_OVERSAMPLING = 16
_MAX_SWEEPS = 8
_SETTLED = 1e-4  # share of the captured energy a sweep must still add


@dataclass(frozen=True)
class RowBlocks:
    """A matrix as a sequence of blocks of rows that can be made any number of times, the same every time.

    Matrices of one shape are cut at the same rows.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[], Iterator[Tensor]]  # from the first row to the last

    def whole(self) -> Tensor:
        """All rows at once; for matrices as thin as a factor."""
        return torch.cat(list(self.read()))

    def map(self, function: Callable[[Tensor], Tensor]) -> RowBlocks:
        """The matrix whose blocks are ``function`` of these."""
        return RowBlocks(self.shape, self.dtype, lambda: map(function, self.read()))


def row_ranges(shape: tuple[int, int]) -> list[slice]:
    """Where a matrix of that shape is cut."""
    rows = max(1, BLOCK_NUMBERS // shape[1])
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def product(update: LowRank) -> RowBlocks:
    """The entries of ``up @ down``."""
    return RowBlocks(
        update.shape,
        update.up.dtype,
        lambda: (update.up[rows] @ update.down for rows in row_ranges(update.shape)),
    )


def factor(matrix: Tensor) -> RowBlocks:
    """The entries of a matrix at hand."""
    shape = (matrix.shape[0], matrix.shape[1])
    return RowBlocks(shape, matrix.dtype, lambda: (matrix[rows] for rows in row_ranges(shape)))


def combined(matrices: Sequence[RowBlocks], rule: Callable[[Iterator[Tensor]], Tensor]) -> RowBlocks:
    """The matrix whose every block is ``rule`` of the blocks of all ``matrices``, made one at a time as it asks."""
    shape = matrices[0].shape

    def read() -> Iterator[Tensor]:
        streams = [matrix.read() for matrix in matrices]
        for _ in row_ranges(shape):
            yield rule(next(stream) for stream in streams)

    return RowBlocks(shape, matrices[0].dtype, read)


def weighted_sum(matrices: Sequence[RowBlocks], weights: Sequence[float]) -> RowBlocks:
    """``sum_k w_k M_k``."""

    def rule(blocks: Iterator[Tensor]) -> Tensor:
        total = next(blocks) * weights[0]
        for block, weight in zip(blocks, weights[1:], strict=True):
            total.add_(block, alpha=weight)
        return total

    return combined(matrices, rule)


Rule = Callable[[Sequence[RowBlocks], Sequence[float], int], RowBlocks]
"""Merges the tasks' matrices under one coefficient each. The last argument numbers the call, so that a random rule
draws differently for A and for B."""


def merge_entries(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None,
    *,
    on: Space,
    rule: Rule,
    seed: int,
) -> LowRank:
    """Merge updates entry by entry and bring the result to low rank.

    On ``factors`` as PEFT's ``add_weighted_adapter`` does: all ``up`` by themselves and all ``down`` by themselves,
    each under ``sqrt(|w_k|)``, the sign of ``w_k`` on ``down``; smaller ranks are padded with zeros to the largest.
    On ``dw`` over the entries of ``up @ down``, streamed.

    Args:
        updates: n >= 1 updates of one module.
        weights: n coefficients.
        rank: Of the result; None is the largest rank among the updates.
        on: See above.
        rule: How matrices of one shape are merged.
        seed: Of the range finder's start.

    Raises:
        AdapterMismatchError: If the updates do not fit together.
        BudgetError: If a weight, the rank, the seed or the space is out of range.
    """
    check_space(on)
    if seed < 0:
        raise BudgetError(f"seed={seed}: a seed is a whole number from 0 on")
    updates = checked(updates, weights)
    rank = target_rank(updates, rank)
    if on == "dw":
        return leading_part(rule([product(update) for update in updates], weights, 0), rank, seed)
    updates = padded(updates)
    roots = [abs(weight) ** 0.5 for weight in weights]
    signed = [-root if weight < 0 else root for root, weight in zip(roots, weights, strict=True)]
    merged = LowRank(
        rule([factor(update.up) for update in updates], roots, 0).whole(),
        rule([factor(update.down) for update in updates], signed, 1).whole(),
    )
    return merged if merged.rank <= rank else compressed(merged, rank)


def leading_part(matrix: RowBlocks, rank: int, seed: int) -> LowRank:
    """A nearly best approximation of rank at most ``rank``, from a few readings of the matrix.

    Randomised subspace iteration on ``M^T M`` with 16 directions to spare (Halko, Martinsson & Tropp, SIAM Review
    2011, section 4.5), then the best approximation within the subspace. One reading per sweep: with a block ``M_b``
    of rows at hand, ``M_b^T (M_b Z)`` needs no other. It ends when a sweep adds less than 1e-4 to the energy of the
    leading ``rank`` directions, after 8 sweeps at the latest. The spectra that element-wise methods leave behind fall
    slowly, and there the last digits of a subspace change the error least.

    Args:
        matrix: Any matrix of rows.
        rank: At least 1; the result has fewer directions where the matrix is smaller.
        seed: Of the Gaussian start, drawn on the CPU whatever the device.
    """
    d_out, d_in = matrix.shape
    width = min(rank + _OVERSAMPLING, d_out, d_in)
    start = torch.randn(d_in, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    right = torch.linalg.qr(start).Q
    captured = 0.0
    for _ in range(_MAX_SWEEPS):
        image, gram = _normal_product(matrix, right)
        right = torch.linalg.qr(image).Q
        energy = float(torch.linalg.eigvalsh(gram)[-rank:].sum())
        if energy - captured <= _SETTLED * energy:
            break
        captured = energy
    up = torch.cat([block @ right for block in matrix.read()])
    return compressed(LowRank(up, right.mT), rank)


def _normal_product(matrix: RowBlocks, right: Tensor) -> tuple[Tensor, Tensor]:
    """``M^T M right``, and the Gram matrix of ``M right`` in float64, in one reading."""
    image = gram = torch.zeros(())
    for block in matrix.read():
        right = right.to(block.device, block.dtype)
        part = block @ right
        image = image.to(part) + block.mT @ part
        gram = gram.to(part.device, torch.float64) + (part.mT @ part).double()
    return image, gram
