"""Modules of one shape, worked on together as if they were more tasks of one module.

Nothing is shared between tasks that are stored separately, so modules may stand beside one another in one batch. With
few numbers in each, the calls that a batch saves take longer than what they do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hydraopt.merging.option import LEFT_OUT, Ints, Levels, StoredModule
from hydraopt.merging.problem import ModuleProblem


def joined(problems: Sequence[ModuleProblem]) -> ModuleProblem:
    """The tasks of several modules of one shape and work dtype as those of one, named by numbers.

    Args:
        problems: At least one, without a metric.
    """
    first, rank = problems[0], max(max(problem.ranks) for problem in problems)
    return ModuleProblem(
        " and ".join(problem.name for problem in problems),
        tuple(map(str, range(sum(len(problem.tasks) for problem in problems)))),
        torch.cat([problem.weights for problem in problems]),
        ups=torch.cat([_padded(problem.ups, 2, rank) for problem in problems]),
        downs=torch.cat([_padded(problem.downs, 1, rank) for problem in problems]),
        ranks=tuple(rank for problem in problems for rank in problem.ranks),
        is_bfloat16=first.is_bfloat16,
    )


def joined_levels(levels: Sequence[Ints]) -> Levels:
    """Heads' levels of several modules, each (K, P), below one another."""
    width = max(one.shape[1] for one in levels)
    return Levels(
        (),
        np.concatenate(
            [np.pad(one, ((0, 0), (0, width - one.shape[1])), constant_values=LEFT_OUT) for one in levels]
        ),
    )


def parted(stored: StoredModule, problems: Sequence[ModuleProblem]) -> list[StoredModule]:
    """What was stored of :func:`joined` problems, module by module."""
    heads = iter(stored.heads.values())
    errors, norms = iter(stored.squared_error.values()), iter(stored.squared_norm.values())
    return [
        StoredModule(
            [],
            {task: next(heads) for task in problem.tasks},
            {task: next(errors) for task in problem.tasks},
            {task: next(norms) for task in problem.tasks},
        )
        for problem in problems
    ]


def _padded(factor: Tensor, dimension: int, rank: int) -> Tensor:
    missing = rank - factor.shape[dimension]
    if not missing:
        return factor
    return torch.nn.functional.pad(factor, (0, missing) if dimension == 2 else (0, 0, 0, missing))
