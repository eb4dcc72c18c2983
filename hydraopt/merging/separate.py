"""Family "separate": every task keeps its own truncated SVD; nothing is shared.

The fair baseline at equal bytes, and the best choice for modules whose tasks have nothing in common.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hydraopt.merging.option import LEFT_OUT, Floats, Levels, Option, Part, Rates, StoredModule
from hydraopt.merging.problem import ModuleProblem, StoredSide, principal_directions
from hydraopt.merging.refit import left_directions, masked_solve, stored_module
from hydraopt.merging.small_eigen import eigvalsh
from hydraopt.precision import encode_ragged

NAME = "separate"


@dataclass(frozen=True)
class Separate:
    """Per task ``U_k`` (p_k, d_out) and ``V_k`` (p_k, d_in)."""

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Truncate every task (Eckart & Young, Psychometrika 1936), round ``U``, fit ``V`` to the rounded one."""
        kept = levels.heads != LEFT_OUT
        width = int(kept.sum(axis=1).max(initial=0))
        vectors, root = principal_directions(problem.rows_gram, width)
        ups = left_directions(problem, vectors * root[:, None, :])
        stored_ups, ups = encode_ragged(ups, levels.heads[:, :width], bits, dtype)
        up_cross, up_gram = (ups @ problem.ups).mT.double(), (ups @ ups.mT).double()
        # V minimises |dW_k - U^T V|: (U U^T) V = U B_k A_k, in any metric of the inputs
        solved = masked_solve(up_gram, up_cross.mT, kept[:, :width])
        stored_downs, downs = encode_ragged(
            solved.to(problem.downs.dtype) @ problem.downs, levels.heads[:, :width], bits, dtype
        )
        down_cross, down_gram = (downs @ problem.downs.mT).mT.double(), (downs @ downs.mT).double()
        up = StoredSide(ups, None, up_cross, up_gram)
        down = StoredSide(downs, None, down_cross, down_gram)
        return stored_module(problem, [], [stored_ups, stored_downs], up, down)


def spectra(problem: ModuleProblem) -> Floats:
    """Squared singular values of every task's update in the metric, descending: (K, r)."""
    values = eigvalsh(problem.rows_gram).flip(-1).clamp_min(0)
    return np.asarray(values.cpu().numpy())


def option(energies: Floats, shape: tuple[int, int], bits: Sequence[int]) -> Option:
    """The one way to store a module separately: the strongest directions of every task.

    Args:
        energies: Weighted :func:`spectra`.
        shape: (d_out, d_in).
        bits: Precisions, finest first.
    """
    return Option(NAME, Separate(), (), Part(energies, Rates.of(bits, shape), may_leave_out=True), 0.0)
