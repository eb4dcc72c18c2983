"""Family "separate": every task keeps its own truncated SVD; nothing is shared.

The fair baseline at equal bytes, and the best choice for modules whose tasks have nothing in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hydraopt.merging.problem import Factors, ModuleProblem, Option, truncated

NAME = "separate"


@dataclass(frozen=True)
class Separate:
    """Per task ``U_k`` (d_out, p_k) and ``V_k`` (p_k, d_in)."""

    def build(self, problem: ModuleProblem, ranks: Mapping[str, int], dtype: torch.dtype) -> Factors:
        """Truncate every task to its rank; Eckart & Young, Psychometrika 1936."""
        heads: dict[str, tuple[Tensor, ...]] = {}
        for k, task in enumerate(problem.tasks):
            up, down = truncated(problem, k, problem.rows[k].double(), ranks[task])
            heads[task] = (up.to(dtype), down.to(dtype))
        return Factors((), heads)


def options(problem: ModuleProblem) -> list[Option]:
    """The one way to store a module separately: p_k (d_out + d_in) numbers for the p_k strongest directions."""
    gram = (problem.rows @ problem.rows.mT).double()
    energies = torch.linalg.eigvalsh(gram).flip(-1).clamp_min(0) * problem.weights.to(gram.device)[:, None]
    return [
        Option(
            family=NAME,
            shared_rank=0,
            shared_numbers=0,
            direction_numbers=problem.d_out + problem.d_in,
            dense_numbers=None,
            base_error=torch.zeros(len(problem.tasks), dtype=torch.float64).numpy(),
            energies=energies.cpu().numpy(),
            solution=Separate(),
        )
    ]
