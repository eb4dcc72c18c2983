"""Family "shared-a": one ``A'`` (q, d_in) for all tasks, and a head (d_out, q) per task.

The rows of ``A'`` are the top q right singular vectors of the stacked ``sqrt(w_k) T_k``: for dense heads
``B'_k = dW_k A'^T`` this is the global optimum of ``sum_k w_k |dW_k - B'_k A'|^2`` (Eckart & Young). A head is
stored dense, or as ``U_k C_k`` with ``U_k`` (d_out, p_k) and ``C_k`` (p_k, q) where that is smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.problem import Factors, ModuleProblem, Option, truncated

NAME = "shared-a"
FULL_EIGH = 1024  # up to this size a full eigendecomposition is as fast as an iteration
MAX_SHARED_RANK = 128
_OVERSAMPLING = 16
_MAX_SWEEPS = 12


@dataclass(frozen=True)
class Basis:
    """Leading right singular vectors of the stacked rows, kept as combinations of them.

    ``vectors = combinations @ stacked rows``: small enough to keep for every module of a model.
    """

    combinations: Tensor  # (q_max, K r)

    def vectors(self, problem: ModuleProblem, rank: int) -> Tensor:
        """The first ``rank`` vectors as rows (rank, d_in), orthonormal up to the work dtype's rounding."""
        return self.combinations[:rank] @ problem.rows.flatten(0, 1)


@dataclass(frozen=True)
class SharedA:
    """The shared rows of one module, at one rank."""

    basis: Basis
    rank: int

    def build(self, problem: ModuleProblem, ranks: Mapping[str, int], dtype: torch.dtype) -> Factors:
        """Round ``A'`` first, then fit the heads to the rounded one: its rounding costs (almost) nothing."""
        shared = self.basis.vectors(problem, self.rank).to(dtype)
        exact = shared.double()
        lower = torch.linalg.cholesky(exact @ exact.mT)
        # rows of the task in the coordinates of the rounded A': T_k A'^T (A' A'^T)^-1 L = T_k A'^T L^-T
        projected = (problem.rows @ shared.to(problem.rows.dtype).mT).double()
        coordinates = torch.linalg.solve_triangular(lower, projected.mT, upper=False).mT
        heads: dict[str, tuple[Tensor, ...]] = {}
        for k, task in enumerate(problem.tasks):
            rank = ranks[task]
            if rank == self.rank:
                fitted = torch.linalg.solve_triangular(lower, coordinates[k], upper=False, left=False)
                whitener = problem.whiteners[k].double()
                heads[task] = ((problem.ups[k] @ (whitener @ fitted).to(problem.ups.dtype)).to(dtype),)
            else:
                up, inner = truncated(problem, k, coordinates[k], rank)
                tail = torch.linalg.solve_triangular(lower, inner, upper=False, left=False)
                heads[task] = (up.to(dtype), tail.to(dtype))
        return Factors((shared,), heads)


def find_basis(problem: ModuleProblem, largest: int) -> Basis:
    """The leading right singular vectors of the stacked, weighted rows.

    Args:
        problem: The module.
        largest: How many at most; fewer come back where the stack has a lower numerical rank.
    """
    scale = problem.weights.sqrt().to(problem.rows.device, problem.rows.dtype)
    scale = scale.repeat_interleave(problem.rows.shape[1])
    stacked = problem.rows.flatten(0, 1)
    gram = (stacked @ stacked.mT) * (scale[:, None] * scale)  # scaled afterwards: no second copy of the rows
    values, vectors = leading_eigenvectors(gram, min(largest, gram.shape[0], problem.d_in))
    noise = 8 * gram.shape[0] * torch.finfo(gram.dtype).eps
    count = int((values > noise * values[:1].clamp_min(torch.finfo(torch.float64).tiny)).sum())
    values, vectors = values[:count], vectors[:, :count]
    combinations = (vectors / values.sqrt()).mT * scale.double()
    return Basis(combinations.to(problem.rows.dtype))


def leading_eigenvectors(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest eigenvalues, descending, and eigenvectors of a symmetric matrix.

    They come back in float64, as precise as the dtype of ``gram`` allows. Very large matrices go through block
    subspace iteration with Rayleigh-Ritz (Halko, Martinsson & Tropp, SIAM Review 2011), started from a fixed
    seed, until the captured energy changes by less than 1e-7 of the trace.
    """
    size = gram.shape[0]
    block = count + _OVERSAMPLING
    if size <= FULL_EIGH or 2 * block > size:
        values, vectors = torch.linalg.eigh(gram)
        return values.double().flip(-1)[:count], vectors.double().flip(-1)[:, :count]
    start = torch.randn(size, block, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    subspace = gram @ start.to(gram.device, gram.dtype)
    trace = float(gram.diagonal().sum(dtype=torch.float64))
    captured = 0.0
    for _ in range(_MAX_SWEEPS):
        q = torch.linalg.qr(gram @ torch.linalg.qr(gram @ subspace).Q).Q
        subspace = q
        ritz, rotation = torch.linalg.eigh((q.mT @ (gram @ q)).double())
        energy = float(ritz[-count:].sum())
        if energy - captured <= 1e-7 * trace:
            break
        captured = energy
    return ritz.flip(-1)[:count], (q.double() @ rotation).flip(-1)[:, :count]


def options(
    problem: ModuleProblem, basis: Basis, ranks: Sequence[int], *, low_rank: bool = True
) -> list[Option]:
    """One option per rank of ``A'``: the error that remains for every choice of head ranks.

    Args:
        problem: The module.
        basis: From :func:`find_basis`.
        ranks: Candidates for q, ascending; those beyond the basis are left out.
        low_rank: Whether heads may be stored as two factors; False is the paper's form.
    """
    count = basis.combinations.shape[0]
    ranks = [rank for rank in ranks if rank <= count]
    if not ranks:
        return []
    weights = problem.weights.to(problem.rows.device)[:, None]
    coordinates = problem.rows @ basis.vectors(problem, ranks[-1]).mT  # (K, r, q_max)
    energies = []
    gram = torch.zeros(
        *problem.rows.shape[:2], problem.rows.shape[1], dtype=torch.float64, device=weights.device
    )
    for low, high in zip([0, *ranks[:-1]], ranks, strict=True):
        block = coordinates[:, :, low:high]
        gram = gram + (block @ block.mT).double()
        energies.append(gram)
    spectra = torch.linalg.eigvalsh(torch.stack(energies)).flip(-1).clamp_min(0) * weights
    wanted = problem.norms.to(weights.device) * weights[:, 0]
    base = (wanted - spectra.sum(-1)).clamp_min(0)
    return [
        Option(
            family=NAME,
            shared_rank=rank,
            shared_numbers=rank * problem.d_in,
            direction_numbers=problem.d_out + rank if low_rank else _NEVER,
            dense_numbers=rank * problem.d_out,
            base_error=base[i].cpu().numpy(),
            energies=spectra[i, :, :rank].cpu().numpy(),
            solution=SharedA(basis, rank),
        )
        for i, rank in enumerate(ranks)
    ]


_NEVER = 1 << 50  # numbers per direction nobody pays for


def candidate_ranks(stacked: int) -> list[int]:
    """Ranks of ``A'`` worth trying for a stack of that many rows: all small ones, then steps of about a sixth."""
    largest = min(stacked, MAX_SHARED_RANK)
    ranks = {*range(1, 17), *np.round(16 * 1.16 ** np.arange(0, 16)).astype(int)}
    return sorted({int(rank) for rank in ranks if rank < largest} | {largest})
