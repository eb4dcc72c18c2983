"""The baselines as ways to store a module: in the layout of dense heads, so that everything a bundle can do works.

Methods of one update for all tasks keep it as ``A'`` and a single head that every task uses. The paper's form fitted by
Adam keeps ``A'`` and heads exactly as fitted. Nothing is re-fitted after rounding: they are what their sources make.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydraopt.errors import BudgetError
from hydraopt.merging.dare import dare, dare_ties
from hydraopt.merging.dense_heads import option_of_size, stored_heads
from hydraopt.merging.gradient import gradient
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.option import Choice, Ints, Levels, Option, StoredModule
from hydraopt.merging.problem import ModuleProblem
from hydraopt.merging.task_arithmetic import task_arithmetic
from hydraopt.merging.ties import ties
from hydraopt.precision import Block, encode_ragged
from hydraopt.recipe import Recipe


@dataclass(frozen=True)
class OneForAll:
    """One update for all tasks of a module.

    The problem's weights are the coefficients of the merge: those of all tasks of the set sum to one. A task that
    lacks the module counts with an update of zero: the others are not scaled up for it.
    """

    recipe: Recipe
    rank: int  # directions it has in this module
    groups: tuple[int, ...]  # 0 for every task

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Merge, round both factors, and measure the error of every task."""
        merged = self._merged(problem)
        rows = _rounded_rows(problem, merged.down, levels.shared[0], bits, dtype)
        heads = merged.up.mT[None].to(problem.ups.dtype).contiguous()
        return stored_heads(
            problem, rows, heads, groups=self.groups, levels=levels.heads, bits=bits, dtype=dtype
        )

    def _merged(self, problem: ModuleProblem) -> LowRank:
        recipe, updates, weights = self.recipe, own_updates(problem), problem.weights.tolist()
        on = recipe.on or "dw"
        seed = module_seed(recipe.seed, problem.name)
        density, scale = recipe.density or 1.0, 1.0 if recipe.scale is None else recipe.scale
        if recipe.method == "ties":
            return ties(updates, weights, recipe.rank, density=density, on=on, scale=scale, seed=seed)
        if recipe.method == "dare-ties":
            return dare_ties(updates, weights, recipe.rank, density=density, on=on, scale=scale, seed=seed)
        if recipe.method == "dare":
            merged = dare(updates, weights, recipe.rank, density=density, on=on, seed=seed)
        else:
            merged = task_arithmetic(updates, weights, recipe.rank, on=on)
        return LowRank(scale * merged.up, merged.down)


def one_for_all(recipe: Recipe, shape: tuple[int, int], ranks: Sequence[int]) -> Choice:
    """What a module stores under a method of one update for all tasks.

    Args:
        recipe: Its method and rank.
        shape: (d_out, d_in).
        ranks: Rank of each task's update.
    """
    rank = _merged_rank(recipe, shape, ranks)
    option = option_of_size(shape, OneForAll(recipe, rank, (0,) * len(ranks)), recipe.precisions, 1)
    levels = Levels((np.zeros(rank, dtype=np.int64),), np.zeros((1, 1), dtype=np.int64))
    return Choice(option, levels)


def _merged_rank(recipe: Recipe, shape: tuple[int, int], ranks: Sequence[int]) -> int:
    """Directions a merged update has, known before it is made."""
    asked = recipe.rank or max(ranks)
    if recipe.on == "factors" and max(ranks) <= asked:
        return max(ranks)  # as merged, never compressed
    largest = min(asked, *shape)
    return min(largest, sum(ranks)) if recipe.method == "ta" else largest


@dataclass(frozen=True)
class FittedHeads:
    """The paper's form fitted by Adam: see :func:`hydraopt.merging.gradient.gradient`."""

    recipe: Recipe
    rank: int
    groups: tuple[int, ...] | None  # head of each task, -1 where it changes nothing; None is one each

    def build(
        self, problem: ModuleProblem, levels: Levels, bits: Sequence[int], dtype: torch.dtype
    ) -> StoredModule:
        """Fit, round ``A'`` and the heads, and measure the error of every task."""
        heads_of = tuple(range(len(problem.tasks))) if self.groups is None else self.groups
        fitted_tasks = [k for k, head in enumerate(heads_of) if head >= 0]
        updates, weights = own_updates(problem), problem.weights.tolist()
        fitted = gradient(
            [updates[k] for k in fitted_tasks],
            [weights[k] for k in fitted_tasks],
            self.rank,
            heads=[heads_of[k] for k in fitted_tasks],
            steps=self.recipe.steps or 1,
            seed=module_seed(self.recipe.seed, problem.name),
        )
        rows = _rounded_rows(problem, fitted.shared, levels.shared[0], bits, dtype)
        heads = torch.stack(fitted.heads).mT.to(problem.ups.dtype).contiguous()
        return stored_heads(
            problem, rows, heads, groups=self.groups, levels=levels.heads, bits=bits, dtype=dtype
        )


def fitted_options(
    recipe: Recipe, shape: tuple[int, int], tasks: int, groups: tuple[int, ...] | None, ranks: Sequence[int]
) -> list[Option]:
    """The fitted form at each of some ranks of ``A'``.

    Args:
        recipe: Its steps, seed and precision.
        shape: (d_out, d_in).
        tasks: How many update the module.
        groups: Head of each task, -1 for none; None is one each.
        ranks: Rows of ``A'``.
    """
    heads = tasks if groups is None else max(groups) + 1
    return [
        option_of_size(shape, FittedHeads(recipe, rank, groups), recipe.precisions, heads) for rank in ranks
    ]


class _RoundedRows(NamedTuple):
    """``A'`` as it is stored; see :class:`hydraopt.merging.dense_heads.StoredRows`."""

    blocks: list[Block]
    rows: Tensor
    gram: Tensor
    cross: Tensor


def _rounded_rows(
    problem: ModuleProblem, rows: Tensor, levels: Ints, bits: Sequence[int], dtype: torch.dtype
) -> _RoundedRows:
    stored, decoded = encode_ragged(rows[None].to(problem.downs.dtype, copy=True), levels[None], bits, dtype)
    (rows,) = decoded
    return _RoundedRows(stored[0], rows, (rows @ rows.mT).double(), (problem.downs @ rows.mT).double())


def own_updates(problem: ModuleProblem) -> list[LowRank]:
    """The tasks' factors without the zeros that pad their ranks."""
    return [
        LowRank(up[:, :rank], down[:rank])
        for up, down, rank in zip(problem.ups, problem.downs, problem.ranks, strict=True)
    ]


def module_seed(seed: int, name: str) -> int:
    """A seed of its own for every module, so that no two drop the same entries."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def refuse_zero_adapters(stored: Iterator[StoredModule], method: str) -> Iterator[StoredModule]:
    """The same modules, unless a task that changes nothing was given an update.

    Raises:
        BudgetError: After the last one, naming the task: its relative error would be infinite.
    """
    lost: dict[str, float] = {}
    wanted: dict[str, float] = {}
    for module in stored:
        for task, error in module.squared_error.items():
            lost[task] = lost.get(task, 0.0) + error
            wanted[task] = wanted.get(task, 0.0) + module.squared_norm[task]
        yield module
    for task, error in lost.items():
        if wanted[task] == 0 and error > 0:
            raise BudgetError(
                f"the adapter of task {task!r} changes nothing, but {method!r} would give it what the other tasks "
                "change; leave it out"
            )
