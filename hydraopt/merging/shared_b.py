"""Family "shared-b": one ``B'`` (d_out, q) for all tasks, and per task a low-rank tail. The mirror of "shared-a"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hydraopt.merging import shared_a
from hydraopt.merging.basis import Basis
from hydraopt.merging.option import Levels, Option, StoredModule
from hydraopt.merging.problem import ModuleProblem

NAME = "shared-b"


@dataclass(frozen=True)
class SharedB:
    """``B'`` of one module, at one rank."""

    mirrored: shared_a.SharedA

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """As "shared-a" for the transposed updates."""
        return self.mirrored.build(problem.mirror(), levels, bits, dtype)


def options(mirror: ModuleProblem, basis: Basis, ranks: Sequence[int], bits: Sequence[int]) -> list[Option]:
    """One option per rank of ``B'``.

    Args:
        mirror: The transposed problem.
        basis: Its basis.
        ranks: Candidates for q, ascending.
        bits: Precisions, finest first.
    """
    found = []
    for option in shared_a.options(mirror, basis, ranks, bits):
        assert isinstance(option.solution, shared_a.SharedA)  # noqa: S101 - what shared_a makes
        found.append(replace(option, family=NAME, solution=SharedB(option.solution)))
    return found
