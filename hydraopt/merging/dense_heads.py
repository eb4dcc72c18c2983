"""Family "dense-heads": the paper's form, one ``A'`` (q, d_in) and M <= K dense heads (d_out, q).

For M = K the best heads on given rows are ``B'_k = dW_k A'^T``. With fewer heads than tasks a group of tasks shares the
weighted mean of theirs, with weight ``sum w_k``: the error is the scatter within groups plus the energy outside ``A'``
(HydraOpt, arXiv 2507.17706; the closed form is our own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.basis import Basis
from hydraopt.merging.grouping import Grouped
from hydraopt.merging.option import (
    LEFT_OUT,
    Family,
    Floats,
    Ints,
    Levels,
    Option,
    Part,
    Rates,
    StoredModule,
)
from hydraopt.merging.problem import ModuleProblem, StoredSide
from hydraopt.merging.refit import stored_module
from hydraopt.merging.shared_a import SharedRows, store_rows
from hydraopt.precision import Block, encode

NAME = "dense-heads"


@dataclass(frozen=True)
class DenseHeads:
    """``A'`` and the heads of one module."""

    rows: Tensor  # (n, d_in), n >= rank
    rank: int
    groups: tuple[int, ...] | None  # head of each task, -1 where it changes nothing; None is one each

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Round ``A'``, then fit the heads to the rounded one."""
        shared = store_rows(problem, self.rows[: self.rank], levels.shared[0], bits, dtype)
        return self.fit_heads(problem, shared, levels.heads, bits, dtype)

    def fit_heads(
        self,
        problem: ModuleProblem,
        shared: SharedRows,
        levels: Ints,
        bits: Sequence[int],
        dtype: torch.dtype,
    ) -> StoredModule:
        """Fit the heads to the rows as stored, average them over groups, round them."""
        heads = self._fitted(problem, shared)
        return stored_heads(problem, shared, heads, groups=self.groups, levels=levels, bits=bits, dtype=dtype)

    def _fitted(self, problem: ModuleProblem, shared: SharedRows) -> Tensor:
        fitted = shared.fit(shared.measured_cross)  # (K, r, q)
        heads = fitted.mT.to(problem.ups.dtype) @ problem.ups.mT
        if self.groups is None:
            return heads
        means = []
        for group in range(max(self.groups) + 1):
            members = [k for k, of in enumerate(self.groups) if of == group]
            weights = problem.weights[members].to(heads.device)
            total = weights.sum()
            share = weights / total if float(total) > 0 else torch.full_like(weights, 1 / len(members))
            means.append((share.to(heads.dtype)[:, None, None] * heads[members]).sum(dim=0))
        return torch.stack(means)


class StoredRows(Protocol):
    """``A'`` as it is stored."""

    @property
    def blocks(self) -> list[Block]:
        """Its bytes."""

    @property
    def rows(self) -> Tensor:
        """(q, d_in): what they decode to."""

    @property
    def gram(self) -> Tensor:
        """``A' A'^T`` (q, q), float64."""

    @property
    def cross(self) -> Tensor:
        """``A_k A'^T`` (K, r, q), float64."""


def stored_heads(
    problem: ModuleProblem,
    rows: StoredRows,
    heads: Tensor,
    *,
    groups: tuple[int, ...] | None,
    levels: Ints,
    bits: Sequence[int],
    dtype: torch.dtype,
) -> StoredModule:
    """Round given heads and measure what is stored.

    Args:
        problem: The module.
        rows: ``A'``, rounded.
        heads: (H, q, d_out); overwritten by what is stored of them.
        groups: Head of each task, -1 for one that gets none and is zero; None is one each.
        levels: (H, 1): precision of every head.
        bits: Precisions, finest first.
        dtype: Float dtype of what is stored in 16 or 32 bits.
    """
    stored: list[list[Block]] = [[] for _ in range(len(heads))]
    for head, level in enumerate(levels[:, 0].tolist()):
        if level == LEFT_OUT:
            heads[head] = 0
            continue
        data, heads[head] = encode(heads[head], bits[level], dtype)
        stored[head] = [data.numpy()]
    ups = heads if groups is None else torch.cat([heads, torch.zeros_like(heads[:1])])[list(groups)]
    up_cross, up_gram = (ups @ problem.ups).mT.double(), (ups @ ups.mT).double()
    tasks = len(problem.tasks)
    up = StoredSide(ups, None, up_cross, up_gram)
    down = StoredSide(rows.rows, None, rows.cross, rows.gram.expand(tasks, -1, -1))
    if groups is None:
        return stored_module(problem, rows.blocks, [stored], up, down)
    blocks = rows.blocks + [block for head in stored for block in head]
    return stored_module(problem, blocks, [[[] for _ in problem.tasks]], up, down)


def options(problem: ModuleProblem, basis: Basis, ranks: Sequence[int], bits: Sequence[int]) -> list[Option]:
    """One option per rank of ``A'``, with a dense head for every task.

    Args:
        problem: The module.
        basis: From :func:`hydraopt.merging.basis.find_basis`.
        ranks: Candidates for q, ascending.
        bits: Precisions, finest first.
    """
    weights = problem.weights.to(basis.cross.device)
    along = (problem.cores @ basis.cross).square().sum(dim=1) * weights[:, None]
    held = along.cumsum(dim=1).cpu().numpy()  # (K, n): weighted energy on the first rows
    wanted = _wanted(problem)
    found = []
    for rank in ranks:
        if rank <= basis.count:
            own = held[:, rank - 1 : rank]
            left = np.maximum(wanted - own[:, 0], 0).sum()
            solution = DenseHeads(basis.rows, rank, None)
            option = option_of_size((problem.d_out, problem.d_in), solution, bits, len(held))
            found.append(_with_energies(option, basis.energies.cpu().numpy(), own, left))
    return found


def curve_options(problem: ModuleProblem, basis: Basis, bits: Sequence[int]) -> list[Option]:
    """The sizes and errors of :func:`options` at every rank of a basis: for a curve, not to be built.

    Every head is kept whole, so only sums over the tasks count: here each task has the same share of the energy.

    Args:
        problem: The module.
        basis: From :func:`hydraopt.merging.basis.find_basis`.
        bits: Precisions, finest first.
    """
    energies = basis.energies.cpu().numpy()
    held, wanted, tasks = energies.cumsum(), _wanted(problem).sum(), len(problem.tasks)
    nowhere = torch.empty(0, problem.d_in)
    found = []
    for rank in range(1, basis.count + 1):
        option = option_of_size((problem.d_out, problem.d_in), DenseHeads(nowhere, rank, None), bits, tasks)
        own = np.full((tasks, 1), held[rank - 1] / tasks)
        found.append(_with_energies(option, energies, own, wanted - held[rank - 1]))
    return found


def grouped_options(
    problem: ModuleProblem, grouped: Grouped, ranks: Sequence[int], bits: Sequence[int]
) -> list[Option]:
    """One option per rank of ``A'``, with a dense head for every group of tasks.

    Args:
        problem: The module.
        grouped: Its groups and the best rows for them.
        ranks: Candidates for q, ascending.
        bits: Precisions, finest first.
    """
    held, wanted = grouped.along.cumsum(axis=1), _wanted(problem).sum()
    found = []
    for rank in ranks:
        if rank <= len(grouped.rows):
            own = held[:, rank - 1 : rank]
            solution = DenseHeads(grouped.rows, rank, grouped.groups)
            option = option_of_size((problem.d_out, problem.d_in), solution, bits, len(held))
            found.append(_with_energies(option, grouped.along.sum(axis=0), own, wanted - own.sum()))
    return found


def _wanted(problem: ModuleProblem) -> Floats:
    """``w_k |dW_k|^2`` per task."""
    wanted: Floats = (problem.norms * problem.weights.to(problem.norms.device)).cpu().numpy()
    return wanted


def _with_energies(option: Option, energies: Floats, held: Floats, base_error: float) -> Option:
    (rows,) = option.shared
    return replace(
        option,
        shared=(replace(rows, energies=energies[: option.rank]),),
        heads=replace(option.heads, energies=held),
        base_error=max(float(base_error), 0.0),
    )


class Sized(Family, Protocol):
    """A family of dense heads whose size is known."""

    @property
    def rank(self) -> int:
        """Rows of ``A'``."""

    @property
    def groups(self) -> tuple[int, ...] | None:
        """Head of each task, -1 for none; None is one each."""


def option_of_size(shape: tuple[int, int], solution: Sized, bits: Sequence[int], heads: int) -> Option:
    """An option that tells its bytes alone: its error is not known before it is built.

    Args:
        shape: (d_out, d_in).
        solution: Builds it.
        bits: Precisions, finest first.
        heads: How many.
    """
    d_out, d_in = shape
    return Option(
        family=NAME,
        solution=solution,
        shared=(Part(np.zeros(solution.rank), Rates.of(bits, (d_in,)), may_leave_out=False),),
        heads=Part(np.zeros((heads, 1)), Rates.of(bits, (d_out,), (), solution.rank), may_leave_out=True),
        base_error=0.0,
        groups=solution.groups,
        rank=solution.rank,
    )
