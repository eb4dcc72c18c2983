"""TIES: trim every task to its largest entries, elect a sign per entry, average those who agree.

Yadav et al., TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv 2306.01708. "TIES" is not
one algorithm among its implementations; the variant here is told in :func:`ties`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hydraopt.errors import BudgetError
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.row_blocks import RowBlocks, Space, combined, merge_entries

_DIGIT_BITS = 16


def ties(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None = None,
    *,
    density: float,
    on: Space = "dw",
    scale: float = 1.0,
    seed: int = 0,
) -> LowRank:
    """One update for all tasks by TIES.

    - Trim: per task and matrix, the ``density`` share of entries of largest magnitude stays, the rest becomes 0. (The
      paper trims a task's whole vector of parameters; PEFT trims per matrix, as here.) Entries equal to the smallest
      that stays all stay.
    - Elect: an entry's sign is that of ``sum_k w_k x_k`` over the trimmed values, plus where it is 0.
    - Merge: ``scale * sum w_k x_k / sum |w_k|`` over the tasks whose ``w_k x_k`` has the elected sign (a disjoint
      weighted mean); 0 where none has. ``scale`` is the paper's lambda.

    With equal weights this is the paper's rule, whatever the weights' size. PEFT elects without the weights and
    divides by the number of those who agree: for equal weights w its result is ours with ``scale=w``. mergekit's
    ``ties`` with ``normalize`` votes and averages as here.

    On ``dw`` the entries are those of ``up @ down``, computed block by block; the thresholds are exact, and the
    result is the leading part of the merged matrix (see ``row_blocks.leading_part``). On ``factors`` A and B are merged
    apart under ``sqrt(|w_k|)``, as PEFT does: it depends on how each update happens to be factorised.

    Args:
        updates: n >= 1 updates of one module, ``up`` (d_out, r_k), ``down`` (r_k, d_in).
        weights: n coefficients.
        rank: Of the result, None for the largest r_k; it is lower where the module is smaller.
        density: Share of entries that stay, in (0, 1]; at least one stays.
        on: ``dw`` or ``factors``.
        scale: Multiplies the merged update; finite.
        seed: Of the range finder's start; TIES itself draws nothing.

    Returns:
        Factors in float32, or float64 if an input is.

    Raises:
        AdapterMismatchError: If the updates do not fit together or hold NaN.
        BudgetError: If a weight, ``rank``, ``density``, ``scale`` or ``on`` is out of range.
    """
    check_density(density)
    check_scale(scale)

    def rule(matrices: Sequence[RowBlocks], roots: Sequence[float], _: int) -> RowBlocks:
        return elected([trimmed(matrix, density) for matrix in matrices], roots)

    merged = merge_entries(updates, weights, rank, on=on, rule=rule, seed=seed)
    return LowRank(scale * merged.up, merged.down)


def check_density(density: float) -> None:
    """Refuse a share of entries that would keep none, or more than there are.

    Raises:
        BudgetError: If it is not in (0, 1].
    """
    if not 0 < density <= 1:
        raise BudgetError(f"density={density}: the share of entries that stay must be in (0, 1]")


def check_scale(scale: float) -> None:
    """Refuse a factor that is no number.

    Raises:
        BudgetError: If it is not finite.
    """
    if not math.isfinite(scale):
        raise BudgetError(f"scale={scale}: the factor of the merged update must be finite")


def trimmed(matrix: RowBlocks, density: float) -> RowBlocks:
    """The ``density`` share of entries of largest magnitude, zeros elsewhere."""
    if density == 1:
        return matrix
    threshold = kth_largest(matrix, max(1, int(density * matrix.shape[0] * matrix.shape[1])))
    return matrix.map(lambda block: torch.where(block.abs() >= threshold, block, 0))


def kth_largest(matrix: RowBlocks, count: int) -> float:
    """The ``count``-th largest magnitude, exactly, without ever sorting the matrix.

    The bits of a non-negative float order as the number does, so a radix selection finds it digit by digit: a
    histogram of the leading 16 bits tells in which of 65536 bins it lies, one of the next 16 bits within that bin
    the rest. Two readings for float32, four for float64.

    Args:
        matrix: Of float32 or float64 entries, none NaN.
        count: From 1 to the number of entries.
    """
    bits = torch.int32 if matrix.dtype == torch.float32 else torch.int64
    first = 8 * matrix.dtype.itemsize - _DIGIT_BITS
    prefix = 0
    for shift in range(first, -1, -_DIGIT_BITS):
        counts = torch.zeros(1 << _DIGIT_BITS, dtype=torch.int64)
        for block in matrix.read():
            keys = block.abs().view(bits).flatten()
            if shift < first:
                keys = keys[keys >> (shift + _DIGIT_BITS) == prefix]
            digits = (keys >> shift) & ((1 << _DIGIT_BITS) - 1)
            counts += torch.bincount(digits, minlength=1 << _DIGIT_BITS).cpu()
        at_least = counts.flip(0).cumsum(0).flip(0)  # how many have this digit or a larger one
        digit = int((at_least >= count).nonzero()[-1])
        count -= int(at_least[digit] - counts[digit])
        prefix = (prefix << _DIGIT_BITS) | digit
    return float(torch.tensor(prefix, dtype=bits).view(matrix.dtype))


def elected(matrices: Sequence[RowBlocks], weights: Sequence[float]) -> RowBlocks:
    """Per entry the weighted mean of the ``w_k x_k`` that have the sign of their sum: see :func:`ties`."""

    def rule(blocks: Iterator[Tensor]) -> Tensor:
        return _average_of_the_elected(blocks, weights)

    return combined(matrices, rule)


def _average_of_the_elected(blocks: Iterator[Tensor], weights: Sequence[float]) -> Tensor:
    sums: list[Tensor] = []  # of the positive and of the negative w_k x_k
    shares: list[Tensor] = []  # of |w_k| behind them
    for block, weight in zip(blocks, weights, strict=True):
        votes = block * weight
        if not sums:
            sums = [torch.zeros_like(votes) for _ in range(2)]
            shares = [torch.zeros_like(votes) for _ in range(2)]
        sums[0].add_(votes.clamp_min(0))
        sums[1].add_(votes.clamp_max(0))
        shares[0].add_(votes > 0, alpha=abs(weight))
        shares[1].add_(votes < 0, alpha=abs(weight))
    is_plus = sums[0] + sums[1] >= 0
    total = torch.where(is_plus, sums[0], sums[1])
    share = torch.where(is_plus, shares[0], shares[1])
    return torch.where(share > 0, total / share.clamp_min(torch.finfo(share.dtype).tiny), 0)
