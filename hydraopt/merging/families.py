"""Which ways to store a module are looked at."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from hydraopt.merging import dense_heads, separate, shared_a, shared_b, two_sided
from hydraopt.merging.basis import Basis, find_basis
from hydraopt.merging.budget import ModuleCurves
from hydraopt.merging.grouping import SharedHeads, group_tasks
from hydraopt.merging.option import Floats, Option
from hydraopt.merging.problem import ModuleProblem

OUTPUT_SIDE = frozenset({shared_b.NAME, two_sided.NAME})
"""Families that need the directions tasks share on the output side, which cost as much to find as the others."""

_CLEARLY = 0.99


@dataclass(frozen=True)
class Search:
    """What to look at in a module: families, and the largest rank of a shared factor."""

    families: frozenset[str]
    most: int = shared_a.MAX_SHARED_RANK

    @classmethod
    def joined(cls, searches: Sequence[Search]) -> Search:
        """What any of them looks at."""
        families = frozenset[str]().union(*(search.families for search in searches))
        return cls(families, max(search.most for search in searches))


def worthwhile(curves: ModuleCurves, prices: Floats, window: slice) -> Search:
    """What a module like this one should be searched for, given what was found in this one.

    Args:
        curves: Of the module that was tried.
        prices: The grid.
        window: The prices that matter.

    Returns:
        The families without which the module would cost clearly more at one of these prices, and the largest rank
        that was best at any of them with some room above.
    """
    costs = curves.costs(prices)[:, window]
    best, best_cost = costs.argmin(axis=0), costs.min(axis=0)
    families = {separate.NAME}
    most = 1
    for family in {curves.options[i].family for i in best} - families:
        others = [i for i, option in enumerate(curves.options) if option.family != family]
        if (best_cost < _CLEARLY * costs[others].min(axis=0)).any():
            families.add(family)
            most = max(most, *(curves.options[i].rank for i in best if curves.options[i].family == family))
    return Search(frozenset(families), min(shared_a.MAX_SHARED_RANK, most + most // 4 + 1))


def shared_options(
    problem: ModuleProblem,
    families: Iterable[str],
    bits: Sequence[int],
    most: int,
    inputs: Basis | None = None,
) -> list[Option]:
    """Every option of the given families in which tasks share something.

    Args:
        problem: The module, of at least two tasks.
        families: Names of families; "separate" shares nothing.
        bits: Precisions, finest first.
        most: Largest rank of a shared factor.
        inputs: Of the input side, if it was found already.
    """
    wanted = set(families)
    if problem.metric is not None:  # it belongs to the input side alone
        wanted -= OUTPUT_SIDE
    stacked = problem.downs.shape[0] * problem.downs.shape[1]
    ranks = shared_a.candidate_ranks(min(stacked, problem.d_in), most)
    found = []
    if wanted & {shared_a.NAME, two_sided.NAME}:
        inputs = inputs or find_basis(problem, ranks[-1])
    if inputs and shared_a.NAME in wanted:
        found += shared_a.options(problem, inputs, ranks, bits)
    if wanted & OUTPUT_SIDE:
        mirror = problem.mirror()
        out_ranks = shared_a.candidate_ranks(min(stacked, problem.d_out), most)
        outputs = find_basis(mirror, out_ranks[-1])
        if shared_b.NAME in wanted:
            found += shared_b.options(mirror, outputs, out_ranks, bits)
        if inputs and two_sided.NAME in wanted:
            found += two_sided.options(problem, inputs, outputs, ranks, bits)
    return found


def dense_options(
    problem: ModuleProblem,
    largest: int | None,
    bits: Sequence[int],
    sharing: SharedHeads | None = None,
) -> list[Option]:
    """The paper's form at every rank up to ``largest``.

    Args:
        problem: The module.
        largest: Rows of ``A'`` at most; None is as many as any family may have.
        bits: Precisions, finest first.
        sharing: How tasks share heads; None is a head for each.
    """
    limit = largest_rank(problem.downs.shape[0] * problem.downs.shape[1], problem.d_in, largest)
    ranks = range(1, limit + 1)
    grouped = None if sharing is None else group_tasks(problem, sharing, limit)
    if grouped is not None:
        return dense_heads.grouped_options(problem, grouped, ranks, bits)
    return dense_heads.options(problem, find_basis(problem, limit, exact=True), ranks, bits)


def largest_rank(stacked: int, d_in: int, asked: int | None) -> int:
    """Rows ``A'`` of a module can have: no more than all A stacked or the input, nor than was asked for."""
    return min(stacked, d_in, asked or shared_a.MAX_SHARED_RANK)
