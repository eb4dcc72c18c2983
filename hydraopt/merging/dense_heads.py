"""Family "dense-heads": the paper's form, one ``A'`` (q, d_in) and M <= K dense heads (d_out, q).

For M = K the best heads on given rows are ``B'_k = dW_k A'^T``. With fewer heads than tasks a group of tasks shares the
weighted mean of theirs, with weight ``sum w_k``: the error is the scatter within groups plus the energy outside ``A'``
(HydraOpt, arXiv 2507.17706; the closed form is our own).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.basis import Basis
from hydraopt.merging.option import LEFT_OUT, Floats, Ints, Levels, Option, Part, Rates, StoredModule
from hydraopt.merging.problem import ModuleProblem, Projected
from hydraopt.merging.refit import stored_module
from hydraopt.merging.shared_a import SharedRows, store_rows
from hydraopt.precision import encode

NAME = "dense-heads"


@dataclass(frozen=True)
class DenseHeads:
    """``A'`` and the heads of one module."""

    rows: Tensor  # (n, d_in), n >= rank
    rank: int
    groups: tuple[int, ...] | None  # head of each task; None is one each

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
        heads = self._fitted(problem, shared)  # (H, q, d_out)
        stored: list[list[Tensor]] = [[] for _ in range(len(heads))]
        for head, level in enumerate(levels[:, 0].tolist()):
            if level == LEFT_OUT:
                heads[head] = 0
                continue
            data, heads[head] = encode(heads[head], bits[level], dtype)
            stored[head] = [data]
        of_task = list(range(len(problem.tasks))) if self.groups is None else list(self.groups)
        ups = heads[of_task]
        up_cross, up_gram = (ups @ problem.ups).mT.double(), (ups @ ups.mT).double()
        tasks = len(problem.tasks)
        projected = Projected(up_cross, up_gram, shared.cross, shared.gram.expand(tasks, -1, -1))
        if self.groups is None:
            return stored_module(problem, shared.blocks, [stored], projected)
        blocks = shared.blocks + [block for head in stored for block in head]
        return stored_module(problem, blocks, [[[] for _ in problem.tasks]], projected)

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
    wanted = (problem.norms * problem.weights.to(problem.norms.device)).cpu().numpy()
    found = []
    for rank in ranks:
        if rank <= basis.count:
            left = np.maximum(wanted - held[:, rank - 1], 0).sum()
            solution = DenseHeads(basis.rows, rank, None)
            found.append(
                option(problem, basis, solution, bits, held=held[:, rank - 1 : rank], base_error=float(left))
            )
    return found


def option(
    problem: ModuleProblem,
    basis: Basis,
    solution: DenseHeads,
    bits: Sequence[int],
    *,
    held: Floats,
    base_error: float,
) -> Option:
    """A solution as an option.

    Args:
        problem: The module.
        basis: What its ``A'`` is taken from.
        solution: The rows and groups.
        bits: Precisions, finest first.
        held: (H, 1): weighted energy each head holds.
        base_error: Weighted squared error of heads that are not rounded.
    """
    energies = basis.energies[: solution.rank].cpu().numpy()
    return Option(
        family=NAME,
        solution=solution,
        shared=(Part(energies, Rates.of(bits, (problem.d_in,)), may_leave_out=False),),
        heads=Part(held, Rates.of(bits, (problem.d_out,), (), solution.rank), may_leave_out=True),
        base_error=base_error,
        groups=solution.groups,
        rank=solution.rank,
    )
