"""Family "two-sided": ``B'`` (d_out, q') and ``A'`` (q, d_in) for all tasks, and a small low-rank core per task.

``dW_k ~ B'^T X_k^T Y_k A'``. Wins with very many tasks, or with tasks that repeat one another: one more costs next to
nothing. The two bases are those of the one-sided families (the truncated higher-order SVD; De Lathauwer, De Moor &
Vandewalle, SIAM J. Matrix Anal. Appl. 2000).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraopt.merging.basis import Basis
from hydraopt.merging.option import LEFT_OUT, Ints, Levels, Option, Part, Rates, StoredModule
from hydraopt.merging.problem import ModuleProblem, principal_directions
from hydraopt.merging.refit import masked_solve, stored_module
from hydraopt.merging.shared_a import SharedRows, projected_grams, store_rows
from hydraopt.merging.small_eigen import eigh, eigvalsh
from hydraopt.precision import core_bits, encode_ragged

NAME = "two-sided"


@dataclass(frozen=True)
class TwoSided:
    """Both shared factors of one module, at one rank."""

    inputs: Tensor  # (n, d_in), n >= rank
    outputs: Tensor  # (n', d_out)
    rank: int

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Round both shared factors, then fit the cores between the rounded ones."""
        inputs = store_rows(problem, self.inputs[: self.rank], levels.shared[0], bits, dtype)
        outputs = store_rows(problem.mirror(), self.outputs[: self.rank], levels.shared[1], bits, dtype)
        return fit_cores(problem, inputs, outputs, levels.heads, bits=bits, dtype=dtype)


def whitened_core(inputs: SharedRows, outputs: SharedRows) -> Tensor:
    """``L_out^-1 (B' B_k) (A_k A'^T) L_in^-T`` (K, q', q), float64: what the shared factors hold of each task."""
    return outputs.whitened(outputs.cross).mT @ inputs.whitened(inputs.cross)


def fit_cores(
    problem: ModuleProblem,
    inputs: SharedRows,
    outputs: SharedRows,
    levels: Ints,
    *,
    bits: Sequence[int],
    dtype: torch.dtype,
) -> StoredModule:
    """Truncate the cores between the shared factors, round ``X``, fit ``Y``, round ``Y``."""
    kept = levels != LEFT_OUT
    width = int(kept.sum(axis=1).max(initial=0))
    core = whitened_core(inputs, outputs)
    vectors, root = principal_directions(core @ core.mT, width)
    left = torch.linalg.solve_triangular(
        outputs.lower.mT, vectors * root[:, None, :], upper=True
    ).mT  # X: (K, p, q')
    stored_left, left = encode_ragged(left, levels[:, :width], bits, dtype)
    up = outputs.combined(left)
    solved = masked_solve(up.gram, up.cross.mT @ inputs.cross, kept[:, :width])
    fine = [core_bits(one) for one in bits]
    stored_right, right = encode_ragged(inputs.fit(solved), levels[:, :width], fine, dtype)
    blocks = inputs.blocks + outputs.blocks
    return stored_module(problem, blocks, [stored_left, stored_right], up, inputs.combined(right))


def options(
    problem: ModuleProblem, inputs: Basis, outputs: Basis, ranks: Sequence[int], bits: Sequence[int]
) -> list[Option]:
    """One option per rank, the same on both sides.

    Args:
        problem: The module.
        inputs: Basis of the input side.
        outputs: Basis of the output side, of the transposed problem.
        ranks: Candidates for both ranks, ascending.
        bits: Precisions, finest first.
    """
    ranks = [rank for rank in ranks if rank <= min(inputs.count, outputs.count)]
    if not ranks:
        return []
    weights = problem.weights.to(inputs.cross.device)
    wanted = problem.norms.to(weights.device) * weights
    # The core on q rows is U_q^T D_q with U, D the products with both bases: its singular values, from r x r matrices,
    # are those of R_q U_q with D_q D_q^T = R_q^T R_q.
    ups, downs = projected_grams(outputs.cross, ranks), projected_grams(inputs.cross, ranks)
    values, vectors = eigh(downs)
    roots = vectors * values.clamp_min(0).sqrt()[..., None, :]
    spectra = eigvalsh(roots.mT @ ups @ roots).flip(-1).clamp_min(0) * weights[:, None]
    base = (wanted - spectra.sum(-1)).clamp_min(0).sum(-1).cpu()
    return [
        Option(
            family=NAME,
            solution=TwoSided(inputs.rows, outputs.rows, rank),
            shared=(
                Part(
                    inputs.energies[:rank].cpu().numpy(), Rates.of(bits, (problem.d_in,)), may_leave_out=False
                ),
                Part(
                    outputs.energies[:rank].cpu().numpy(),
                    Rates.of(bits, (problem.d_out,)),
                    may_leave_out=False,
                ),
            ),
            heads=Part(
                spectra[i, :, :rank].cpu().numpy(), Rates.of(bits, (rank,), (rank,)), may_leave_out=True
            ),
            base_error=float(base[i]),
            rank=rank,
        )
        for i, rank in enumerate(ranks)
    ]
