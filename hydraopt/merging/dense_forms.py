"""The methods with dense heads and one rank of ``A'`` for all modules: the paper's form, closed or fitted by Adam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hydraopt.merging.assembly import Assembly
from hydraopt.merging.baselines import fitted_options
from hydraopt.merging.families import dense_options, largest_rank
from hydraopt.merging.grouping import SharedHeads, group_tasks
from hydraopt.merging.option import Option
from hydraopt.merging.problem import ModuleProblem
from hydraopt.merging.shared_a import MAX_SHARED_RANK
from hydraopt.precision import vector_bytes
from hydraopt.recipe import Recipe


@dataclass(frozen=True)
class DenseForms:
    """What a recipe of such a method can store in each module.

    Args:
        recipe: How to merge.
        assembly: Knows the modules.
        sharing: How tasks share heads, None for one each.
    """

    recipe: Recipe
    assembly: Assembly
    sharing: SharedHeads | None

    @classmethod
    def of(cls, recipe: Recipe, assembly: Assembly, size: int | None) -> DenseForms:
        """With groups chosen for the rank asked for, or the one that ``size`` bytes of factors will about allow."""
        if recipe.heads is None or recipe.heads >= len(assembly.tasks):
            return cls(recipe, assembly, None)
        rank = recipe.rank
        if size is not None:
            rank = 1
            while rank < MAX_SHARED_RANK and _dense_bytes(recipe, assembly, rank + 1) <= size:
                rank += 1
        return cls(recipe, assembly, SharedHeads(recipe.heads, rank, recipe.seed))

    def options(self, name: str, load: Callable[[], ModuleProblem]) -> list[Option]:
        """Ways to store a module in which some task changes something, by rank; ``load`` reads it."""
        if self.recipe.method == "gradient":
            return self._fitted(name, load)
        return dense_options(load(), self.recipe.rank, self.recipe.precisions, self.sharing)

    def _fitted(self, name: str, load: Callable[[], ModuleProblem]) -> list[Option]:
        shape, ranks = self.assembly.shape(name), self.assembly.ranks(name)
        largest = largest_rank(len(ranks) * max(ranks), shape[1], self.recipe.rank)
        tried = range(1 if self.recipe.rank is None else largest, largest + 1)
        grouped = None
        if self.sharing is not None and len(ranks) > self.sharing.heads:
            grouped = group_tasks(load(), self.sharing, 0)
        groups = None if grouped is None else grouped.groups
        return fitted_options(self.recipe, shape, len(ranks), groups, tried)


def _dense_bytes(recipe: Recipe, assembly: Assembly, rank: int) -> int:
    """Bytes of dense heads at one rank."""
    bits, total = recipe.precisions[0], 0
    for name in assembly.modules:
        (d_out, d_in), ranks = assembly.shape(name), assembly.ranks(name)
        heads = min(len(ranks), recipe.heads or len(ranks))
        rows = largest_rank(len(ranks) * max(ranks), d_in, rank)
        total += rows * (vector_bytes(d_in, bits) + heads * vector_bytes(d_out, bits))
    return total
