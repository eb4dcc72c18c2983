"""DARE: drop entries at random and rescale the rest, then sum or elect.

Yu et al., Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch, ICML 2024,
arXiv 2311.03099.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.row_blocks import RowBlocks, Space, merge_entries, weighted_sum
from hydraopt.merging.ties import check_density, check_scale, elected


def dare(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None = None,
    *,
    density: float,
    seed: int,
    on: Space = "dw",
) -> LowRank:
    r"""One update near :math:`\sum_k w_k \mathrm{DARE}(dW_k)`.

    Every entry of every task stays with probability ``density`` and is then divided by it, else it becomes 0: its
    expected value is the entry. On ``dw`` the result is the leading part of the sum (see
    ``row_blocks.leading_part``). On ``factors``, as PEFT's ``dare_linear``, A and B are dropped and summed apart
    under ``sqrt(|w_k|)``: it depends on how each update happens to be factorised, and holds the cross terms of
    :func:`~hydraopt.merging.task_arithmetic.task_arithmetic`.

    Reproducible: each task and factor has a generator of its own, started from ``seed`` and the task's place in
    ``updates``. What is dropped depends on nothing else, not on blocks, threads or device. Modules merged with one
    seed share their pattern; give each module a seed of its own.

    Args:
        updates: n >= 1 updates of one module, ``up`` (d_out, r_k), ``down`` (r_k, d_in).
        weights: n coefficients, used as given; ``1 / n`` each for the mean.
        rank: Of the result, None for the largest r_k; it is lower where the module is smaller.
        density: Probability that an entry stays, in (0, 1]; the paper's drop rate is ``1 - density``.
        seed: From 0 on.
        on: ``dw`` or ``factors``.

    Returns:
        Factors in float32, or float64 if an input is.

    Raises:
        AdapterMismatchError: If the updates do not fit together or hold NaN.
        BudgetError: If a weight, ``rank``, ``density`` or ``on`` is out of range.
    """
    check_density(density)

    def rule(matrices: Sequence[RowBlocks], roots: Sequence[float], call: int) -> RowBlocks:
        return weighted_sum(_all_dropped(matrices, density, seed, call), roots)

    return merge_entries(updates, weights, rank, on=on, rule=rule, seed=seed)


def dare_ties(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rank: int | None = None,
    *,
    density: float,
    seed: int,
    on: Space = "dw",
    scale: float = 1.0,
) -> LowRank:
    """One update for all tasks: DARE in the place of TIES's trimming, then TIES's election and disjoint mean.

    The pattern is that of :func:`dare`; the election, the mean and ``scale`` are those of
    :func:`~hydraopt.merging.ties.ties`, as are the relation to PEFT's ``dare_ties`` and the remark on ``factors``.

    Args:
        updates: n >= 1 updates of one module, ``up`` (d_out, r_k), ``down`` (r_k, d_in).
        weights: n coefficients; their common size is irrelevant.
        rank: Of the result, None for the largest r_k; it is lower where the module is smaller.
        density: Probability that an entry stays, in (0, 1].
        seed: From 0 on.
        on: ``dw`` or ``factors``.
        scale: Multiplies the merged update; finite.

    Returns:
        Factors in float32, or float64 if an input is.

    Raises:
        AdapterMismatchError: If the updates do not fit together or hold NaN.
        BudgetError: If a weight, ``rank``, ``density``, ``scale`` or ``on`` is out of range.
    """
    check_density(density)
    check_scale(scale)

    def rule(matrices: Sequence[RowBlocks], roots: Sequence[float], call: int) -> RowBlocks:
        return elected(_all_dropped(matrices, density, seed, call), roots)

    merged = merge_entries(updates, weights, rank, on=on, rule=rule, seed=seed)
    return LowRank(scale * merged.up, merged.down)


def _all_dropped(matrices: Sequence[RowBlocks], density: float, seed: int, call: int) -> list[RowBlocks]:
    return [dropped(matrix, density, (seed, task, call)) for task, matrix in enumerate(matrices)]


def dropped(matrix: RowBlocks, density: float, key: tuple[int, ...]) -> RowBlocks:
    """Entries that stay with probability ``density``, divided by it; the same ones at every reading."""
    start = int(np.random.SeedSequence(key).generate_state(1)[0])

    def read() -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(start)
        for block in matrix.read():
            # One draw per entry, in order: cutting the rows elsewhere would not change the pattern.
            stays = torch.rand(block.shape, generator=generator, dtype=torch.float32) < density
            yield block * stays.to(block.device) / density

    return RowBlocks(matrix.shape, matrix.dtype, read)
