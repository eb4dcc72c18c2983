"""What every module stores under a recipe, once its curves are known.

A budget counts the whole bundle: what manifest, headers and whole-layer tensors take is no longer there for factors,
and the manifest grows with what there is to tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from hydraopt.bundle.contents import Bundle
from hydraopt.errors import BudgetError
from hydraopt.merging import separate
from hydraopt.merging.assembly import Assembly
from hydraopt.merging.budget import (
    PricedModules,
    every_direction,
    fill,
    largest_uniform,
    least_uniform,
    total_bytes,
    within_budget,
    within_error,
)
from hydraopt.merging.option import Choice
from hydraopt.recipe import Recipe

UNIFORM = ("paper", "gradient")
"""Methods with one rank of ``A'`` for all modules."""

_FILLINGS = 4

_CLOSER = (0.999, 0.995, 0.98, 0.95, 0.9, 0.8, 0.65)
"""By how much a bound is tightened from one attempt to the next: where there are few ranks and bits to choose from, the
next choice may be far."""
_LAST_DIGIT = 1e-8  # of errors as bundles tell them
_TINY = 1e-300


def solve(assembly: Assembly, curves: PricedModules, recipe: Recipe, total_weight: float) -> list[Choice]:
    """What every module stores.

    Args:
        assembly: Knows the modules, and what a bundle takes beside its factors.
        curves: Per module every way to store it, "separate" first; families the recipe's method does not allow are
            left aside.
        recipe: Its method, and its budget, error bound or rank.
        total_weight: Weighted squared error of storing nothing.

    Raises:
        BudgetError: If the budget or error bound cannot be met.
    """
    if recipe.method in UNIFORM:
        return _solve_uniform(assembly, curves, recipe, total_weight)
    own = [module.options[0] for module in curves.modules]
    all_ranks = [assembly.ranks(name) for name in assembly.modules]
    if recipe.budget == 1:
        return every_direction(own, all_ranks)
    if recipe.rank is not None:
        most = recipe.rank
        return every_direction(own, [[min(rank, most) for rank in ranks] for ranks in all_ranks])
    allowed = curves.only({separate.NAME, *recipe.families})
    if recipe.max_error is not None:
        return within_error(allowed, recipe.max_error, total_weight)
    # Compared with at the end: adapting must never lose to the simple form at the same bytes.
    alone = curves.only({separate.NAME}) if recipe.method == "hydraopt" else None
    return _within_recipe(assembly, recipe, lambda size: within_budget(allowed, size, alone))


def within_bound(
    recipe: Recipe, attempt: Callable[[float | None], Bundle], weights: Mapping[str, float] | None
) -> Bundle:
    """A bundle that keeps the recipe's error bound as it is stored, and not only as its rounding was expected to be.

    Args:
        recipe: Its bound and relative weights; without a bound the first attempt counts.
        attempt: Merges under an error bound.
        weights: Weights of the merged tasks, 0 for those that change nothing; None where the bound is on another error
            than bundles tell, with calibration data.

    Raises:
        BudgetError: Of ``attempt``, or if no attempt keeps the bound.
    """
    bundle = attempt(recipe.max_error)
    if recipe.max_error is None or weights is None:
        return bundle
    asked = aim = recipe.max_error
    least = reached = _reached(recipe, bundle, weights)
    for closer in _CLOSER:
        if reached <= asked + _LAST_DIGIT:
            return bundle
        aim *= closer * min(asked / reached, 1.0)
        try:
            bundle = attempt(aim)
        except BudgetError:  # that bound is beyond what rounding is expected to leave
            break
        reached = _reached(recipe, bundle, weights)
        least = min(least, reached)
    if reached <= asked + _LAST_DIGIT:
        return bundle
    raise BudgetError(
        f"max_error={asked} cannot be met: what was stored has {least:.4g}, for rounding. Ask for that much, or for "
        "more bits, dtype='float32' or budget=1"
    )


def _reached(recipe: Recipe, bundle: Bundle, weights: Mapping[str, float]) -> float:
    """Root of the mean squared relative error over the merged tasks, by their relative weights."""
    errors = {task: bundle.manifest.tasks[task].relative_error for task in weights}
    counted = [task for task, weight in weights.items() if weight > 0 or errors[task] > 0]
    shares = [recipe.weights.get(task, 1.0) for task in counted]
    lost = sum(share * errors[task] ** 2 for task, share in zip(counted, shares, strict=True))
    return math.sqrt(lost / max(sum(shares), _TINY))


def _solve_uniform(
    assembly: Assembly, curves: PricedModules, recipe: Recipe, total_weight: float
) -> list[Choice]:
    if recipe.rank is not None:
        return curves.uniform(recipe.rank)
    if recipe.max_error is not None:
        return least_uniform(curves, recipe.max_error, total_weight)
    return _within_recipe(assembly, recipe, lambda size: largest_uniform(curves, size))


def _within_recipe(assembly: Assembly, recipe: Recipe, within: Callable[[int], list[Choice]]) -> list[Choice]:
    size = most_factor_bytes(assembly, recipe)
    allowed = allowed_bytes(recipe, assembly.reference_bytes)
    return fit_container(within, size, allowed, assembly.container_bytes())


def fit_container(
    within: Callable[[int], list[Choice]],
    size: int,
    allowed: int,
    container_bytes: Callable[[Sequence[Choice]], int],
) -> list[Choice]:
    """The best choices that fit with everything around them.

    Args:
        within: The best choices of at most so many bytes of factors; refuses less than none.
        size: Bytes of factors that would fit beside the least container there can be.
        allowed: Bytes of factors and container together.
        container_bytes: What is needed beside some choices.

    Raises:
        BudgetError: Of ``within``, if not even nothing fits.
    """
    choices = within(size)
    # What other counts may lengthen the manifest by: a digit or an entry here and there.
    slack = 24 + len(choices)
    while (left := allowed - total_bytes(choices) - container_bytes(choices)) < 0:
        size = max(size + left - slack, 0) if size else -1
        choices = within(size)
    for _ in range(_FILLINGS):
        filled = fill(choices, total_bytes(choices) + left - slack)
        now = allowed - total_bytes(filled) - container_bytes(filled)
        if now < 0 or now == left:
            break
        choices, left = filled, now
    return choices


def allowed_bytes(recipe: Recipe, reference_bytes: int) -> int:
    """Bytes of the whole bundle of such adapters under the recipe's budget."""
    return int((recipe.budget or 0.0) * reference_bytes * _widening(recipe))


def most_factor_bytes(assembly: Assembly, recipe: Recipe) -> int:
    """How many bytes of factors the budget leaves once extras, headers and the shortest manifest are paid.

    Raises:
        BudgetError: If nothing is left; the message says the smallest budget that works.
    """
    allowed, fixed = allowed_bytes(recipe, assembly.reference_bytes), assembly.least_container_bytes()
    if allowed < fixed:
        reference = assembly.reference_bytes * _widening(recipe)
        # 16: the budget's own digits are in the manifest
        minimum = math.ceil(1000 * (fixed + 16) / reference) / 1000
        way_out = (
            f"the least possible budget is {minimum}"
            if minimum < 1
            else "no smaller budget holds them either: take budget=1, which keeps everything whatever it needs, or "
            "max_error"
        )
        raise BudgetError(
            f"budget={recipe.budget}: {allowed} bytes do not hold the {fixed} bytes that are always needed "
            f"({assembly.extra_bytes} of whole-layer extras, the rest manifest and headers); {way_out}"
        )
    return allowed - fixed


def _widening(recipe: Recipe) -> float:
    """2 for float32, which was asked for knowingly: its budget is a share of the inputs at four bytes a number."""
    return 2.0 if recipe.dtype == "float32" else 1.0
