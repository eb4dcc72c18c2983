"""Heads fitted to shared factors that a bundle stores already and that stay as they are.

A family finds its shared factor, rounds it, and fits the heads to the rounded one. Here an earlier merge did the first
two steps, and the same closed forms fit the heads to what was read back. No head on given rows ``A'`` can hold more of
an update than its projection ``dW P``, ``P = C A'^T (A' C A'^T)^-1 A'``; the rest of its energy is lost at any size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hydraopt.bundle.layout import ModuleEntry, shared_blocks
from hydraopt.bundle.stored_rows import Reader
from hydraopt.merging import dense_heads, separate, shared_a, shared_b, two_sided
from hydraopt.merging.option import Floats, Levels, Option, Part, Rates, StoredModule
from hydraopt.merging.problem import ModuleProblem
from hydraopt.merging.shared_a import SharedRows, stored_rows


@dataclass(frozen=True)
class StoredFactors:
    """What a bundle shares in one module, as a family that has nothing but its heads to decide."""

    entry: ModuleEntry
    data: Tensor  # bytes
    precisions: tuple[int, ...]
    dtype: torch.dtype

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rows of each shared factor."""
        return tuple(sum(counts) for counts in self.entry.shared)

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Fit the heads of the problem's tasks, and round them."""
        family = self.entry.family
        if family == separate.NAME:
            return separate.Separate().build(problem, levels, bits, dtype)
        rows = self._rows(problem)
        if family == two_sided.NAME:
            return two_sided.fit_cores(problem, rows[0], rows[1], levels.heads, bits=bits, dtype=dtype)
        if family == dense_heads.NAME:
            dense = dense_heads.DenseHeads(rows[0].rows, self.ranks[0], None)
            return dense.fit_heads(problem, rows[0], levels.heads, bits, dtype)
        own = problem.mirror() if family == shared_b.NAME else problem
        return shared_a.fit_heads(own, rows[0], levels.heads, bits, dtype)

    def energies(self, problem: ModuleProblem) -> Floats:
        """Squared norms of the directions a head can hold, descending: (K, P), not weighted."""
        family = self.entry.family
        if family == separate.NAME:
            return separate.spectra(problem)
        rows = self._rows(problem)
        if family == two_sided.NAME:
            core = two_sided.whitened_core(rows[0], rows[1])
        else:
            own = problem.mirror() if family == shared_b.NAME else problem
            core = own.cores @ rows[0].whitened(rows[0].measured_cross)
        if family == dense_heads.NAME:  # the whole head or nothing
            return np.asarray(core.square().sum(dim=(1, 2))[:, None].cpu().numpy())
        return np.asarray(torch.linalg.svdvals(core).square().cpu().numpy())

    def option(self, energies: Floats, lost: float) -> Option:
        """The heads' levels as the solver's only choice.

        Args:
            energies: As of :meth:`energies`, weighted.
            lost: Weighted squared error that no head on these factors can avoid.
        """
        heads = Part(energies, self._rates(), may_leave_out=True)
        return Option(self.entry.family, self, (), heads, lost)

    def _rates(self) -> Rates:
        d_out, d_in = self.entry.shape
        family, ranks = self.entry.family, self.ranks
        if family == dense_heads.NAME:
            return Rates.of(self.precisions, (d_out,), (), ranks[0])
        long, short = {
            separate.NAME: ((d_out, d_in), ()),
            shared_a.NAME: ((d_out,), ranks),
            shared_b.NAME: ((d_in,), ranks),
            two_sided.NAME: (ranks[1:], ranks[:1]),
        }[family]
        return Rates.of(self.precisions, long, short)

    def _rows(self, problem: ModuleProblem) -> list[SharedRows]:
        """The shared factors as read back: of the input side, of the output side, or both."""
        sides = [problem.mirror()] if self.entry.family == shared_b.NAME else [problem]
        if self.entry.family == two_sided.NAME:
            sides = [problem, problem.mirror()]
        parts = Reader(self.data, self.dtype).take(shared_blocks(self.entry, self.precisions))
        return [
            stored_rows(side, [self.data.numpy()] if i == 0 else [], part.read().to(side.downs))
            for i, (side, part) in enumerate(zip(sides, parts, strict=True))
        ]
