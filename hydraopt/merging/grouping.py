"""Fewer heads than tasks: which tasks of a module share a head.

With the groups given, the best heads on rows ``A'`` are the weighted means of their tasks' ``dW_k A'^T``, and the best
``A'`` spans the leading directions of ``sum_g W_g mean_g^T mean_g`` with ``W_g`` the sum of a group's weights. What is
lost is the scatter within the groups plus the energy of the means outside ``A'``. Only the groups are combinatorial.
They are searched as follows (the derivation is our own; the parts are Ward, JASA 1963; Hartigan & Wong, Applied
Statistics 1979):

- start from Ward's hierarchy, weighted, once over all of ``dW`` and once over the heads on the ``A'`` of all tasks, and
  from random groups;
- with ``A'`` fixed, move single tasks to another head, the best move first, as long as one gains; then take the
  best ``A'`` for the groups; repeat until nothing moves. Neither step can lose;
- keep the best of all starts.

Everything happens on Gram matrices of the stacked factors. Of the input side the search looks at the leading
directions alone where there are many; the final ``A'`` is the optimum for its groups over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.basis import combined_rows, compact, stacked_directions
from hydraopt.merging.option import Floats, Ints
from hydraopt.merging.problem import Grams, ModuleProblem
from hydraopt.merging.refit import left_directions
from hydraopt.merging.small_eigen import eigh

FEW_ROWS = 320
"""Stacked rows up to which a start costs next to nothing."""

_STARTS, _FEWER_STARTS = 30, 6
"""Random starts beside the two of Ward: for short stacks of factors, and for tall ones."""

_SEARCHED = 64
"""Leading coordinates of the input side a search looks at; four times the rows of ``A'`` where that is more."""

_UNWEIGHTED = 1e-9
"""Weight of a task that does not count: it gets the head nearest to it and moves nothing."""

_GAINS = 1e-12  # of the energy of the heads: less is rounding
_MAX_ROUNDS = 100


@dataclass(frozen=True)
class SharedHeads:
    """How many heads a module's tasks share, and what their groups are chosen for."""

    heads: int
    """Groups M at most: a task that changes nothing needs no head."""
    rank: int | None
    """Rows of ``A'`` the groups should be good at; None is all there are."""
    seed: int
    """Of the random starts."""


@dataclass(frozen=True)
class Grouped:
    """Groups of a module's tasks, and the best ``A'`` for them, of any rank."""

    groups: tuple[int, ...]  # head of each task, -1 for one that changes nothing
    rows: Tensor  # (n, d_in), the most important first
    along: Floats  # (M, n): weighted energy of every head along every row


@dataclass(frozen=True)
class HeadSpace:
    """The weighted updates of K tasks of one module in small coordinates: ``sqrt(w_k) dW_k = Q_k root_k basis``.

    The ``Q_k`` have orthonormal columns and ``basis`` has orthonormal rows. All in float64, and on the CPU: a search
    takes thousands of steps too small for a GPU.
    """

    root: Tensor  # (K, r, m), coordinates in descending order of energy
    gram: Tensor  # (K, r, K, r): Q_j^T Q_k
    weights: Floats  # (K,), positive

    def narrowed(self, coordinates: int) -> HeadSpace:
        """The leading coordinates of the input side alone."""
        return HeadSpace(self.root[:, :, :coordinates], self.gram, self.weights)

    @property
    def energy(self) -> float:
        """``sum_k w_k |dW_k|^2`` within the coordinates."""
        return float(self.root.square().sum())

    def best_rows(self, groups: Ints) -> tuple[Floats, Tensor]:
        """The best ``A'`` of every rank for some groups.

        Returns:
            Weighted energies of the means along the rows, descending (m,); and the rows (m, m) in columns.
        """
        tasks, rank, width = self.root.shape
        mixed = torch.from_numpy(_mixing(groups, self.weights))
        stacked = self.root.reshape(tasks * rank, width)
        means = (self.gram * mixed[:, None, :, None]).view(tasks * rank, tasks * rank) @ stacked
        values, vectors = eigh(stacked.mT @ means)
        return values.flip(-1).clamp_min(0).numpy(), vectors.flip(-1)

    def products(self, rows: Tensor | None = None) -> Floats:
        """``sqrt(w_j w_k) <H_j, H_k>`` (K, K) of the heads on some rows (columns of ``rows``), by default on all."""
        heads = self.root if rows is None else self.root @ rows
        tasks, rank, _ = heads.shape
        stacked = heads.reshape(tasks * rank, -1)
        met = (stacked @ stacked.mT).view(tasks, rank, tasks, rank) * self.gram
        found: Floats = met.sum(dim=(1, 3)).numpy()
        return found

    def along(self, groups: Ints, rows: Tensor) -> Floats:
        """Weighted energy of every group's mean along every row: (M, n)."""
        tasks, rank, _ = self.root.shape
        mixed = torch.from_numpy(_mixing(groups, self.weights))
        along = (self.root @ rows).reshape(tasks * rank, -1)
        means = (self.gram * mixed[:, None, :, None]).view(tasks * rank, tasks * rank) @ along
        of_task = (along * means).view(tasks, rank, -1).sum(dim=1).numpy()
        return np.stack([of_task[groups == group].sum(axis=0) for group in range(groups.max() + 1)])


def _mixing(groups: Ints, weights: Floats) -> Floats:
    """``sqrt(w_j w_k) / W_g`` for two tasks of group g, else 0: what turns products of tasks into those of means."""
    totals = np.bincount(groups, weights)
    shares = np.sqrt(weights / totals[groups])
    return np.where(groups[:, None] == groups, shares[:, None] * shares, 0.0)


def group_tasks(problem: ModuleProblem, wanted: SharedHeads, largest: int) -> Grouped | None:
    """Groups of a module's tasks that lose little when each group shares a head.

    Args:
        problem: The module.
        wanted: How many, and for what.
        largest: Rows of ``A'`` to return at most.

    Returns:
        Groups and rows; None where every task can have a head of its own, or none changes anything.
    """
    changing = np.flatnonzero(problem.norms.cpu().numpy() > 0)
    if len(problem.tasks) <= wanted.heads or len(changing) == 0:
        return None
    own = _weighted_alike(problem, changing)
    values, vectors = stacked_directions(own)
    space = head_space(own, values, vectors)
    rank = wanted.rank or len(values)
    searched = space.narrowed(max(_SEARCHED, 4 * rank))
    groups, _ = find_groups(searched, min(wanted.heads, len(changing)), rank, wanted.seed)
    energies, rows = space.best_rows(groups)
    noise = 8 * torch.finfo(problem.downs.dtype).eps * space.energy
    count = min(largest, int((energies > noise).sum()))
    rows = rows[:, :count]
    whole = np.full(len(problem.tasks), -1)
    whole[changing] = groups
    return Grouped(
        tuple(whole.tolist()),
        compact(problem, combined_rows(own, ((vectors / values.sqrt()) @ rows.to(vectors)).mT)),
        space.along(groups, rows),
    )


def _weighted_alike(problem: ModuleProblem, tasks: Ints) -> ModuleProblem:
    """Some tasks of a module, those of weight 0 with next to none instead."""
    weights = problem.weights[tasks]
    least = _UNWEIGHTED / problem.norms[tasks].to(weights.device)
    return replace(
        problem,
        tasks=tuple(problem.tasks[k] for k in tasks),
        ranks=tuple(problem.ranks[k] for k in tasks),
        weights=torch.where(weights > 0, weights, least),
        ups=problem.ups if len(tasks) == len(problem.tasks) else problem.ups[tasks],
        downs=problem.downs if len(tasks) == len(problem.tasks) else problem.downs[tasks],
        known=Grams(problem.grams.up[tasks], problem.grams.down[tasks]),
    )


def head_space(problem: ModuleProblem, values: Tensor, vectors: Tensor) -> HeadSpace:
    """Of the eigenvalues and -vectors of the stacked weighted rows."""
    tasks, rank, _ = problem.downs.shape
    identity = torch.eye(rank, dtype=torch.float64, device=problem.ups.device).expand(tasks, rank, rank)
    stacked = left_directions(problem, identity).flatten(0, 1)  # (K r, d_out): Q_k^T
    gram = (stacked @ stacked.mT).double().view(tasks, rank, tasks, rank)
    root = (vectors * values.sqrt()).view(tasks, rank, len(values))
    return HeadSpace(root.cpu(), gram.cpu(), problem.weights.numpy())


def find_groups(space: HeadSpace, heads: int, rank: int, seed: int) -> tuple[Ints, float]:
    """Groups of tasks that lose little when each shares a head on an ``A'`` of ``rank`` rows.

    Args:
        space: The module, at least ``heads`` tasks.
        heads: Number of groups M; none will be empty.
        rank: Rows of ``A'``.
        seed: Of the random starts.

    Returns:
        The group of each task, numbered by their first task; and the weighted squared error within the coordinates.
    """
    everything = space.products()
    _, rows = space.best_rows(np.arange(len(space.weights)))
    starts = [
        ward(everything, space.weights, heads),
        ward(space.products(rows[:, :rank]), space.weights, heads),
    ]
    generator = np.random.default_rng(seed)
    tasks, width, _ = space.root.shape
    count = _STARTS if tasks * width <= FEW_ROWS else _FEWER_STARTS
    starts += [_random_groups(tasks, heads, generator) for _ in range(count)]
    found = [improved(space, start, rank) for start in starts]
    groups, errors = min(found, key=lambda one: one[1][-1])
    return numbered(groups), errors[-1]


def improved(space: HeadSpace, groups: Ints, rank: int) -> tuple[Ints, list[float]]:
    """Move tasks and refit ``A'`` in turns until nothing gains.

    Returns:
        The groups, and the weighted squared error at the start and after every turn, never rising.
    """
    errors: list[float] = []
    for _ in range(_MAX_ROUNDS):
        values, rows = space.best_rows(groups)
        errors.append(space.energy - float(values[:rank].sum()))
        moved = moved_tasks(space.products(rows[:, :rank]), space.weights, groups)
        if (moved == groups).all():
            break
        groups = moved
    return groups, errors


def moved_tasks(products: Floats, weights: Floats, groups: Ints) -> Ints:
    """Move single tasks to other groups, the best move first, until none lowers the scatter of the heads.

    Args:
        products: (K, K): ``sqrt(w_j w_k) <H_j, H_k>``.
        weights: (K,), positive.
        groups: (K,): the start; no group loses its last task.
    """
    groups, heads = groups.copy(), int(groups.max()) + 1
    root = np.sqrt(weights)
    weighted = root[:, None] * products * root  # <w_j H_j, w_k H_k>
    own = weighted.diagonal()
    tasks = np.arange(len(groups))
    least = _GAINS * products.trace()
    while True:
        member = np.eye(heads)[groups]  # (K, M)
        totals, sums = member.T @ weights, weighted @ member
        energy = np.einsum("km,km->m", member, sums)  # |sum_k w_k H_k|^2
        held = energy / totals
        here = groups
        smaller = totals[here] - weights
        left = np.divide(
            energy[here] - 2 * sums[tasks, here] + own, smaller, out=np.zeros_like(own), where=smaller > 0
        )
        joined = (energy + 2 * sums + own[:, None]) / (totals + weights[:, None])
        gains = joined - held + (left - held[here])[:, None]
        gains[tasks, here] = 0.0
        gains[np.bincount(here, minlength=heads)[here] == 1] = 0.0
        task, group = divmod(int(gains.argmax()), heads)
        if gains[task, group] <= least:
            return groups
        groups[task] = group


def ward(products: Floats, weights: Floats, heads: int) -> Ints:
    """Groups from merging the two that lose least again and again (Ward, JASA 1963), with weights.

    Args:
        products: (K, K): ``sqrt(w_j w_k) <H_j, H_k>``.
        weights: (K,), positive.
        heads: Groups to stop at.
    """
    root = np.sqrt(weights)
    sums, totals = root[:, None] * products * root, weights.copy()
    groups = np.arange(len(weights))
    for _ in range(len(weights) - heads):
        held = sums.diagonal() / totals
        together = (sums.diagonal()[:, None] + 2 * sums + sums.diagonal()) / (totals[:, None] + totals)
        lost = held[:, None] + held - together
        lost[np.tril_indices(len(totals))] = np.inf
        one, other = divmod(int(lost.argmin()), len(totals))
        sums[one] += sums[other]
        sums[:, one] += sums[:, other]
        totals[one] += totals[other]
        kept = np.arange(len(totals)) != other
        sums, totals = sums[kept][:, kept], totals[kept]
        groups[groups == other] = one
        groups[groups > other] -= 1
    return groups


def _random_groups(tasks: int, heads: int, generator: np.random.Generator) -> Ints:
    """Groups drawn at random, none empty."""
    groups = np.concatenate([np.arange(heads), generator.integers(heads, size=tasks - heads)])
    return generator.permutation(groups)


def numbered(groups: Ints) -> Ints:
    """The same groups, numbered in the order of their first task."""
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    renamed: Ints = np.argsort(np.argsort(first))[inverse]
    return renamed
