"""One multiplier over all modules, tasks and families.

Minimise ``error + lambda * numbers``. For a given lambda every module decides alone: within an option a task
keeps the directions whose energy exceeds ``lambda * numbers per direction`` (or stores its head dense where
that is cheaper), and the module takes its cheapest option. Bisecting lambda meets a budget or an error bound;
what the last step leaves over is spent on the best remaining directions. Solutions that are feasible by
construction (``fixed`` below) are compared at the end, so adapting never loses to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hydraopt.errors import BudgetError
from hydraopt.merging.problem import Floats, Ints, Option

_BISECTIONS = 64
_PRECISE = 1 + 1e-4  # of the multiplier; what is left over is spent afterwards
_TINY = 1e-280
_NEVER = 1e300  # numbers nobody pays for
_CHEAPER = (1.0, 0.6, 0.3)  # multipliers at which leftovers are offered, relative to the last infeasible one


@dataclass(frozen=True)
class Choice:
    """What one module stores: an option, and the rank of every task's head (``option.dense_rank``: dense)."""

    option: Option
    ranks: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers this stores."""
        return self.option.shared_numbers + sum(head_numbers(self.option, rank) for rank in self.ranks)

    @property
    def error(self) -> float:
        """Weighted squared error that remains."""
        option = self.option
        return float(
            sum(
                option.base_error[k] + (0.0 if is_dense(option, rank) else option.energies[k, rank:].sum())
                for k, rank in enumerate(self.ranks)
            )
        )


def is_dense(option: Option, rank: int) -> bool:
    """Whether a head of that rank is stored dense."""
    return option.dense_numbers is not None and rank == option.dense_rank


def head_numbers(option: Option, rank: int) -> int:
    """Numbers a head of that rank stores."""
    if option.dense_numbers is not None and rank == option.dense_rank:
        return option.dense_numbers
    return rank * option.direction_numbers


@dataclass(frozen=True)
class Prices:
    """Every option of every module at its best ranks for one multiplier."""

    options: Sequence[Option]
    row_starts: Ints
    ranks: Ints  # per row: task of an option
    errors: Floats  # per option
    numbers: Floats  # per option

    def choice(self, index: int) -> Choice:
        """Option ``index`` with its ranks."""
        option = self.options[index]
        start = self.row_starts[index]
        return Choice(option, tuple(int(rank) for rank in self.ranks[start : start + len(option.base_error)]))


class Curves:
    """All options of all modules as flat arrays: the cost of any multiplier in a few vector operations.

    Args:
        modules: Per module its options; at least one each.
    """

    def __init__(self, modules: Sequence[Sequence[Option]]) -> None:
        options = [option for module in modules for option in module]
        self.options = options
        self._module_starts = np.cumsum([0, *(len(module) for module in modules)])[:-1]
        rows = [len(option.base_error) for option in options]
        self._row_starts = np.cumsum([0, *rows])[:-1]
        width = max(option.energies.shape[1] for option in options)
        self._energies = np.zeros((sum(rows), width))
        for start, count, option in zip(self._row_starts, rows, options, strict=True):
            self._energies[start : start + count, : option.energies.shape[1]] = option.energies
        self._direction = np.repeat([float(option.direction_numbers) for option in options], rows)
        self._dense = np.repeat(
            [_NEVER if option.dense_numbers is None else float(option.dense_numbers) for option in options],
            rows,
        )
        self._dense_rank = np.repeat([option.dense_rank for option in options], rows)
        self._base = np.concatenate([option.base_error for option in options])
        self._shared = np.array([float(option.shared_numbers) for option in options])

    def choose(self, multiplier: float) -> list[Choice]:
        """The best choice of every module when a number costs ``multiplier`` of weighted squared error."""
        prices = self.prices(multiplier)
        costs = prices.errors + multiplier * prices.numbers
        best = [int(start + np.argmin(costs[start:end])) for start, end in self.spans()]
        return [prices.choice(index) for index in best]

    def prices(self, multiplier: float) -> Prices:
        """Every option at its best ranks for that multiplier."""
        kept = self._energies > multiplier * self._direction[:, None]
        low_rank = np.where(kept, multiplier * self._direction[:, None], self._energies).sum(axis=1)
        is_dense = multiplier * self._dense < low_rank
        ranks = np.where(is_dense, self._dense_rank, kept.sum(axis=1))
        lost = self._base + np.where(is_dense, 0.0, np.where(kept, 0.0, self._energies).sum(axis=1))
        stored = np.where(is_dense, self._dense, kept.sum(axis=1) * self._direction)
        return Prices(
            self.options,
            self._row_starts,
            np.asarray(ranks, dtype=np.int64),
            errors=np.add.reduceat(lost, self._row_starts),
            numbers=np.add.reduceat(stored, self._row_starts) + self._shared,
        )

    def spans(self) -> list[tuple[int, int]]:
        """Per module the range of its options."""
        ends = [*self._module_starts[1:], len(self.options)]
        return list(zip(self._module_starts.tolist(), (int(end) for end in ends), strict=True))

    def largest_multiplier(self) -> float:
        """A price at which nothing is kept."""
        return float(self._energies.sum(axis=1).max(initial=0.0) + self._base.max(initial=0.0)) + 1e-300


def total_numbers(choices: Iterable[Choice]) -> int:
    """Numbers stored by all modules together."""
    return sum(choice.numbers for choice in choices)


def total_error(choices: Iterable[Choice]) -> float:
    """Weighted squared error left by all modules together."""
    return sum(choice.error for choice in choices)


def within_budget(
    modules: Sequence[Sequence[Option]], numbers: int, fixed: Iterable[list[Choice]] = ()
) -> list[Choice]:
    """The choice of least error that stores at most ``numbers`` numbers.

    Args:
        modules: Per module its options.
        numbers: The budget.
        fixed: Other solutions to compare with; those over the budget are left out.

    Raises:
        BudgetError: If the budget is negative.
    """
    if numbers < 0:
        raise BudgetError(f"a budget of {numbers} numbers cannot be met")
    curves = Curves(modules)
    low, high = 0.0, curves.largest_multiplier()
    best = curves.choose(high)
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high) if low > 0 else high * 1e-6
        choices = curves.choose(middle)
        if total_numbers(choices) <= numbers:
            high, best = middle, choices
        else:
            low = middle
        if (low > 0 and high / low < _PRECISE) or high < _TINY:
            break
    candidates = [fill(upgrade(curves, best, low, numbers), numbers)]
    candidates += [fill(choices, numbers) for choices in fixed if total_numbers(choices) <= numbers]
    return min(candidates, key=lambda choices: (total_error(choices), total_numbers(choices)))


def within_error(modules: Sequence[Sequence[Option]], error: float) -> list[Choice]:
    """The choice of fewest numbers whose weighted squared error is at most ``error``.

    Raises:
        BudgetError: If no choice reaches it.
    """
    curves = Curves(modules)
    best = curves.choose(0.0)
    if total_error(best) > error:
        raise BudgetError(
            f"the least weighted squared error is {total_error(best):.3g}, but {error:.3g} was asked for"
        )
    low, high = 0.0, curves.largest_multiplier()
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low * high) if low > 0 else high * 1e-6
        choices = curves.choose(middle)
        if total_error(choices) <= error:
            low, best = middle, choices
        else:
            high = middle
        if (low > 0 and high / low < _PRECISE) or high < _TINY:
            break
    return best


def upgrade(curves: Curves, choices: list[Choice], multiplier: float, numbers: int) -> list[Choice]:
    """Spend what is left on better options for single modules, the best gain per number first.

    Args:
        curves: All options.
        choices: A solution within the budget.
        multiplier: One at which the solution would just exceed it.
        numbers: The budget.
    """
    offers = [curves.prices(factor * multiplier) for factor in _CHEAPER]
    choices = list(choices)
    left = numbers - total_numbers(choices)
    state = [(choice.error, choice.numbers) for choice in choices]
    spans = curves.spans()
    while True:
        best: tuple[float, int, Prices, int] | None = None
        for m, (start, end) in enumerate(spans):
            for prices in offers:
                gain = state[m][0] - prices.errors[start:end]
                extra = prices.numbers[start:end] - state[m][1]
                fits = (extra > 0) & (extra <= left) & (gain > 0)
                if not fits.any():
                    continue
                ratio = np.where(fits, gain / np.where(fits, extra, 1.0), -1.0)
                i = int(np.argmax(ratio))
                if best is None or ratio[i] > best[0]:
                    best = (float(ratio[i]), m, prices, start + i)
        if best is None:
            return choices
        _, m, prices, index = best
        choices[m] = prices.choice(index)
        left -= choices[m].numbers - state[m][1]
        state[m] = (choices[m].error, choices[m].numbers)


def fill(choices: list[Choice], numbers: int) -> list[Choice]:
    """Spend what is left of the budget on the directions with the most energy per number."""
    left = numbers - total_numbers(choices)
    ranks = [list(choice.ranks) for choice in choices]
    waiting: list[tuple[float, int, int, int]] = []
    for m, choice in enumerate(choices):
        option = choice.option
        for k, rank in enumerate(choice.ranks):
            if is_dense(option, rank) or option.direction_numbers > left:
                continue
            for p in range(rank, option.energies.shape[1]):
                if option.energies[k, p] <= 0:
                    break
                waiting.append((-option.energies[k, p] / option.direction_numbers, m, k, p))
    waiting.sort()
    for _, m, k, p in waiting:
        option = choices[m].option
        if ranks[m][k] != p:  # an earlier direction of this task did not fit
            continue
        extra = head_numbers(option, p + 1) - head_numbers(option, p)
        if extra <= left:
            ranks[m][k] = p + 1
            left -= extra
    return [Choice(choice.option, tuple(rank)) for choice, rank in zip(choices, ranks, strict=True)]


def uniform(modules: Sequence[Sequence[Option]], rank: int) -> list[Choice]:
    """The paper's form at one rank for all modules: per module the largest shared rank up to ``rank``, heads dense.

    Modules without such an option keep nothing; with ``rank`` 0 none do.
    """
    choices = []
    for module in modules:
        fitting = [
            option for option in module if option.dense_numbers is not None and option.shared_rank <= rank
        ]
        if fitting:
            option = max(fitting, key=lambda o: o.shared_rank)
            choices.append(Choice(option, (option.dense_rank,) * len(option.base_error)))
        else:
            choices.append(Choice(module[0], (0,) * len(module[0].base_error)))
    return choices


def largest_uniform(modules: Sequence[Sequence[Option]], numbers: int) -> list[Choice]:
    """The paper's form at the largest single rank that stores at most ``numbers`` numbers.

    Raises:
        BudgetError: If not even rank 1 fits.
    """
    ranks = _uniform_ranks(modules)
    best: list[Choice] | None = None if ranks else uniform(modules, 0)  # adapters that change nothing
    for rank in ranks:
        choices = uniform(modules, rank)
        if total_numbers(choices) > numbers:
            break
        best = choices
    if best is None:
        smallest = total_numbers(uniform(modules, 1))
        raise BudgetError(
            f"the paper's form stores {smallest} numbers at rank 1, but the budget leaves {numbers}"
        )
    return best


def least_uniform(modules: Sequence[Sequence[Option]], error: float) -> list[Choice]:
    """The paper's form at the smallest single rank whose weighted squared error is at most ``error``.

    Raises:
        BudgetError: If no rank reaches it.
    """
    choices = uniform(modules, 0)
    if total_error(choices) <= error:
        return choices
    for rank in _uniform_ranks(modules):
        choices = uniform(modules, rank)
        if total_error(choices) <= error:
            return choices
    least = total_error(choices)
    raise BudgetError(
        f"the paper's form leaves a weighted squared error of {least:.3g}, but {error:.3g} was asked for"
    )


def _uniform_ranks(modules: Sequence[Sequence[Option]]) -> list[int]:
    return sorted({option.shared_rank for module in modules for option in module if option.shared_rank > 0})


def every_direction(modules: Sequence[Sequence[Option]], ranks: Sequence[Sequence[int]]) -> list[Choice]:
    """The first option of each module with the given head ranks."""
    return [
        Choice(module[0], tuple(int(r) for r in rank)) for module, rank in zip(modules, ranks, strict=True)
    ]
