"""Error over storage for every method, from one tracing of the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydraopt.adapters import Adapter
from hydraopt.devices import find_device
from hydraopt.errors import BudgetError
from hydraopt.merging.budget import relative_error
from hydraopt.merging.merge import make_recipe, open_set, silent
from hydraopt.merging.run import MergeRun
from hydraopt.merging.solving import solve
from hydraopt.progress import Progress

BUDGETS = (0.03, 0.05, 0.07, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
"""Budgets of the default curve, as shares of the input bytes."""

CURVES: tuple[tuple[str, int | str], ...] = (
    ("hydraopt", "auto"),
    ("hydraopt", 16),
    ("separate", "auto"),
    ("separate", 16),
    ("two-sided", "auto"),
    ("paper", 16),
)
"""The methods and bits a frontier compares."""


@dataclass(frozen=True)
class FrontierPoint:
    """One bundle that could be made: its method, its size and its error before rounding to the stored dtype."""

    method: str
    bits: int | str
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
    """The whole trade-off between size and error, for all methods, in about the time of two merges.

    Args:
        adapters: Opened adapters or their folders, by task name.
        budgets: Shares of the input bytes, each in (0, 1]. Those a method cannot meet are left out.
        dtype: How factors would be stored.
        device: ``auto``, ``cpu`` or ``cuda``.
        progress: Called with (done, total, what).

    Returns:
        Points by method and bits, then budget. ``storage_ratio`` and ``relative_error`` are as for
        :class:`hydraopt.Bundle`, the error as expected before anything is built.

    Raises:
        AdapterMismatchError: As for :func:`hydraopt.merge`.
        BudgetError: If no budget can be met by any method.
    """
    opened = open_set(adapters)
    curves = [(m, b) for m, b in CURVES if dtype != "float32" or (b == "auto" and m != "paper")]
    # Traced under the largest budget: a smaller one may not even hold the headers of a set of tiny adapters.
    recipes = [
        make_recipe(method=method, bits=bits, budget=max(budgets), dtype=dtype) for method, bits in curves
    ]
    run = MergeRun(opened, recipes[0], find_device(device), progress or silent)
    sets = sorted({recipe.precisions for recipe in recipes if recipe.method != "paper"})
    dense = next((recipe.precisions for recipe in recipes if recipe.method == "paper"), None)
    curves_of_sets, paper = run.trace_frontier(sets, dense)
    traced = dict(zip(sets, curves_of_sets, strict=True))
    points = []
    refused: BudgetError | None = None
    for recipe in recipes:
        one = run.under(recipe)
        modules = paper if paper is not None and recipe.method == "paper" else traced[recipe.precisions]
        for budget in budgets:
            wanted = make_recipe(**(recipe.model_dump() | {"budget": budget}))
            try:
                choices = solve(one.assembly, modules, wanted, run.total_weight)
            except BudgetError as reason:
                refused = reason
                continue
            error = relative_error(choices, run.total_weight)
            ratio = one.assembly.storage_ratio(choices)
            points.append(FrontierPoint(recipe.method, recipe.bits, budget, ratio, error))
    if not points and refused is not None:
        raise refused
    return points
