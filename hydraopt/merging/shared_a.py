"""Family "shared-a": one ``A'`` (q, d_in) for all tasks, and a low-rank head ``U_k^T C_k`` (d_out, q) per task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.basis import Basis
from hydraopt.merging.option import LEFT_OUT, Ints, Levels, Option, Part, Rates, StoredModule
from hydraopt.merging.problem import ModuleProblem, StoredSide, principal_directions
from hydraopt.merging.refit import left_directions, masked_solve, stored_module
from hydraopt.merging.small_eigen import eigvalsh
from hydraopt.precision import Block, core_bits, encode_ragged

NAME = "shared-a"
MAX_SHARED_RANK = 128


@dataclass(frozen=True)
class SharedRows:
    """A shared factor as it is stored, and what fitting to it needs."""

    blocks: list[Block]
    rows: Tensor  # (q, d_in): what the blocks decode to
    gram: Tensor  # (q, q), float64: rows rows^T
    measured_gram: Tensor  # (q, q), float64: rows C rows^T
    lower: Tensor  # (q, q), float64: Cholesky factor of the measured Gram matrix
    cross: Tensor  # (K, r, q), float64: A_k rows^T
    measured_cross: Tensor  # (K, r, q), float64: A_k C rows^T

    def fit(self, right: Tensor) -> Tensor:
        """``right (rows C rows^T)^-1``: coefficients of the best combination of rows; ``right`` (..., q)."""
        solved: Tensor = torch.linalg.solve_triangular(
            self.lower, self.whitened(right), upper=False, left=False
        )
        return solved

    def combined(self, inner: Tensor) -> StoredSide:
        """Combinations of the rows, ``inner`` (K, p, q), as what is stored of each task."""
        return StoredSide(self.rows, inner, self.cross @ inner.mT, inner @ self.gram @ inner.mT)

    def whitened(self, right: Tensor) -> Tensor:
        """Coordinates on an orthonormal basis of the rows' span; ``right`` (..., q) as in :meth:`fit`."""
        solved: Tensor = torch.linalg.solve_triangular(self.lower.mT, right, upper=True, left=False)
        return solved


def store_rows(
    problem: ModuleProblem, rows: Tensor, levels: Ints, bits: Sequence[int], dtype: torch.dtype
) -> SharedRows:
    """Round a shared factor first: whatever is fitted to the rounded one makes up for most of its rounding."""
    stored, decoded = encode_ragged(rows[None].to(problem.downs.dtype, copy=True), levels[None], bits, dtype)
    return stored_rows(problem, stored[0], decoded[0])


def stored_rows(problem: ModuleProblem, blocks: list[Block], rows: Tensor) -> SharedRows:
    """What fitting to rows needs that are stored as they are.

    Args:
        problem: The module.
        blocks: Their bytes.
        rows: (q, d_in): what the bytes decode to, in the work dtype.
    """
    measured = rows if problem.metric is None else rows @ problem.metric
    gram = (rows @ rows.mT).double()
    measured_gram = (rows @ measured.mT).double()
    size = measured_gram.diagonal().mean()
    jitter = 1e-13 * size * torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    cross = (problem.downs @ rows.mT).double()
    measured_cross = cross if problem.metric is None else (problem.measured_downs @ rows.mT).double()
    lower = torch.linalg.cholesky(measured_gram + jitter)
    return SharedRows(blocks, rows, gram, measured_gram, lower, cross, measured_cross)


def fit_heads(
    problem: ModuleProblem, shared: SharedRows, levels: Ints, bits: Sequence[int], dtype: torch.dtype
) -> StoredModule:
    """Truncate the heads in the span of the rows, round ``U``, fit ``C`` to it and to the rows, round ``C``."""
    kept = levels != LEFT_OUT
    width = int(kept.sum(axis=1).max(initial=0))
    coordinates = problem.cores @ shared.whitened(shared.measured_cross)
    vectors, root = principal_directions(coordinates @ coordinates.mT, width)
    ups = left_directions(problem, vectors * root[:, None, :])
    stored_ups, ups = encode_ragged(ups, levels[:, :width], bits, dtype)
    up_cross, up_gram = (ups @ problem.ups).mT.double(), (ups @ ups.mT).double()
    # C minimises |dW_k - U^T C A'|: (U U^T) C (A' C A'^T) = U B_k A_k C A'^T
    solved = masked_solve(up_gram, up_cross.mT @ shared.measured_cross, kept[:, :width])
    fine = [core_bits(one) for one in bits]
    stored_inner, inner = encode_ragged(shared.fit(solved), levels[:, :width], fine, dtype)
    up = StoredSide(ups, None, up_cross, up_gram)
    return stored_module(problem, shared.blocks, [stored_ups, stored_inner], up, shared.combined(inner))


@dataclass(frozen=True)
class SharedA:
    """``A'`` of one module, at one rank."""

    rows: Tensor  # (n, d_in), n >= rank
    rank: int

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Round ``A'``, then fit the heads to the rounded one."""
        shared = store_rows(problem, self.rows[: self.rank], levels.shared[0], bits, dtype)
        return fit_heads(problem, shared, levels.heads, bits, dtype)


def options(problem: ModuleProblem, basis: Basis, ranks: Sequence[int], bits: Sequence[int]) -> list[Option]:
    """One option per rank of ``A'``.

    Args:
        problem: The module.
        basis: From :func:`hydraopt.merging.basis.find_basis`.
        ranks: Candidates for q, ascending; those beyond the basis are left out.
        bits: Precisions, finest first.
    """
    ranks = [rank for rank in ranks if rank <= basis.count]
    if not ranks:
        return []
    grams = projected_grams(problem.cores @ basis.cross, ranks)
    weights = problem.weights.to(grams.device)
    spectra = eigvalsh(grams).flip(-1).clamp_min(0) * weights[:, None]
    base = ((problem.norms.to(weights.device) * weights) - spectra.sum(-1)).clamp_min(0).sum(-1).cpu()
    energies = basis.energies.cpu().numpy()
    row = Rates.of(bits, (problem.d_in,))
    return [
        Option(
            family=NAME,
            solution=SharedA(basis.rows, rank),
            shared=(Part(energies[:rank], row, may_leave_out=False),),
            heads=Part(
                spectra[i, :, :rank].cpu().numpy(),
                Rates.of(bits, (problem.d_out,), (rank,)),
                may_leave_out=True,
            ),
            base_error=float(base[i]),
            rank=rank,
        )
        for i, rank in enumerate(ranks)
    ]


def projected_grams(coordinates: Tensor, ranks: Sequence[int]) -> Tensor:
    """Gram matrices of the heads on the first q rows, for each q: (len(ranks), K, r, r) in float64.

    Args:
        coordinates: (K, r, n), float64.
        ranks: Values of q, ascending.
    """
    grams = []
    gram = torch.zeros_like(coordinates[:, :, :1] @ coordinates[:, :, :1].mT)
    for low, high in zip([0, *ranks[:-1]], ranks, strict=True):
        block = coordinates[:, :, low:high]
        gram = gram + block @ block.mT
        grams.append(gram)
    return torch.stack(grams)


def candidate_ranks(stacked: int, most: int = MAX_SHARED_RANK) -> list[int]:
    """Ranks of ``A'`` worth trying for a stack of that many rows: dense at first, then steps of about a fifth."""
    largest = min(stacked, most)
    first = range(1, 17) if stacked <= 2 * MAX_SHARED_RANK else (2, 4, 6, 8, 10, 12, 14, 16)
    ranks = {*first, *np.round(16 * 1.19 ** np.arange(0, 13)).astype(int)}
    return sorted({int(rank) for rank in ranks if rank < largest} | {largest})
