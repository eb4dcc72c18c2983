"""Error over storage for every method, from one tracing of the curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from hydraopt.adapters import Adapter
from hydraopt.errors import BudgetError
from hydraopt.merging.budget import total_error
from hydraopt.merging.merge import check_set, find_device, make_recipe, open_adapter, silent
from hydraopt.merging.recipe import Method
from hydraopt.merging.run import MergeRun, Progress
from hydraopt.names import check_task_name

BUDGETS = (0.03, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Budgets of the default curve, as shares of the input bytes."""


@dataclass(frozen=True)
class FrontierPoint:
    """One bundle that could be made: its method, its size and its error before rounding to the stored dtype."""

    method: str
    budget: float
    storage_ratio: float
    relative_error: float


def frontier(
    adapters: Mapping[str, Adapter | Path | str],
    *,
    budgets: Sequence[float] = BUDGETS,
    dtype: str = "bfloat16",
    device: str = "auto",
    progress: Progress | None = None,
) -> list[FrontierPoint]:
    """The whole trade-off between size and error, for all methods, in about the time of one merge.

    Args:
        adapters: Opened adapters or their folders, by task name.
        budgets: Shares of the input bytes, each in (0, 1]. Those a method cannot meet are left out.
        dtype: How factors would be stored.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Called with (done, total, what).

    Returns:
        Points by method, then budget. ``storage_ratio`` and ``relative_error`` are as for :class:`hydraopt.Bundle`.

    Raises:
        AdapterMismatchError: As for :func:`hydraopt.merge`.
        BudgetError: If no budget can be met by any method.
    """
    opened = {check_task_name(task): open_adapter(adapters[task]) for task in sorted(adapters)}
    check_set(opened)
    recipe = make_recipe(method="hydraopt", budget=0.25, dtype=dtype)
    run = MergeRun(opened, recipe, find_device(device), progress or silent)
    modules = run.trace()
    counted = sum(1 for weight in run.weights.values() if weight > 0)
    points = []
    refused: BudgetError | None = None
    for method in get_args(Method):
        for budget in budgets:
            wanted = make_recipe(method=method, budget=budget, dtype=dtype)
            try:
                choices = run.solve(modules, wanted)
            except BudgetError as reason:
                refused = reason
                continue
            error = math.sqrt(max(total_error(choices), 0.0) / max(counted, 1))
            points.append(FrontierPoint(method, budget, run.storage_ratio(total_numbers(choices)), error))
    if not points and refused is not None:
        raise refused
    return points
