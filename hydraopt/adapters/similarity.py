"""How much the adapters of different tasks have in common, on either side of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FactorsOf = Callable[[str, str], tuple[Tensor, Tensor] | None]
"""``factors(task, module)`` gives ``(up, down)`` or None where the task leaves the module alone."""


@dataclass(frozen=True)
class Similarity:
    """Mean overlap of the row spaces (A) and column spaces (B) of the updates, 0 to 1, one row and column per task."""

    tasks: tuple[str, ...]
    a: Tensor  # (K, K)
    b: Tensor  # (K, K)

    def mean(self, side: Tensor) -> float:
        """Mean overlap between different tasks; 1 for a single one."""
        count = len(self.tasks)
        if count < 2:
            return 1.0
        return float((side.sum() - side.diagonal().sum()) / (count * (count - 1)))


def similarity(tasks: Sequence[str], modules: Sequence[str], factors: FactorsOf) -> Similarity:
    """Overlap ``|V_j V_k^T|_F^2 / min(r_j, r_k)`` of orthonormal bases, averaged over the modules both tasks update.

    It depends on the updates alone, not on how they were factorised.
    """
    count = len(tasks)
    sums = torch.zeros(2, count, count, dtype=torch.float64)
    seen = torch.zeros(count, count, dtype=torch.float64)
    for module in modules:
        bases: list[tuple[Tensor, Tensor] | None] = []
        for task in tasks:
            found = factors(task, module)
            bases.append(None if found is None or found[0].shape[1] == 0 else _bases(*found))
        for j, one in enumerate(bases):
            for k, other in enumerate(bases):
                if one is None or other is None:
                    continue
                seen[j, k] += 1
                for side in (0, 1):
                    shared = (one[side].mT @ other[side]).square().sum()
                    sums[side, j, k] += shared / max(min(one[side].shape[1], other[side].shape[1]), 1)
    seen = seen.clamp_min(1)
    return Similarity(tuple(tasks), sums[0] / seen, sums[1] / seen)


def _bases(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the row space (d_in, r) and the column space (d_out, r) of ``up @ down``."""
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().mT)
    u, sigma, vh = torch.linalg.svd(upper @ lower.mT)
    rank = int((sigma > sigma.max() * 1e-6).sum()) if sigma.numel() else 0
    return right @ vh[:rank].mT, left @ u[:, :rank]
