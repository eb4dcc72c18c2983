"""One price of a byte over all modules, tasks and families.

Minimise ``error + price * bytes``. For a given price every module decides alone, see :mod:`hydraopt.merging.option`, so
a grid of prices traces the whole trade-off. A byte budget or an error bound is met by narrowing the grid around the
price at which the total crosses it; what the last step leaves over is spent on the best remaining vectors.
Solutions that are feasible by construction (``fixed`` below) are compared at the end, so adapting never loses to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hydraopt.errors import BudgetError
from hydraopt.merging.option import LEFT_OUT, Choice, Floats, Ints, Levels, Option, Part

_GRID = 80
_CHEAPEST, _DEAREST = 1e-7, 1e5  # in units of all error over all bytes
_FREE = 1e-13  # of the cheapest: no direction that a float64 tells from rounding is dropped for its bytes
_NARROW = 17  # prices per narrowing
_PRECISE = 1 + 1e-6


@dataclass(frozen=True)
class ModuleCurves:
    """The options of one module with their cost at every price of a grid; those that are never best left out."""

    options: tuple[Option, ...]
    errors: Floats  # (options, prices)
    bytes: Floats
    doubts: Floats  # (options, 1): what is added to an option's error when it is compared, see Option.doubt

    @classmethod
    def of(cls, options: Sequence[Option], prices: Floats) -> ModuleCurves:
        """Price every option and keep those that are best of all or of their family at some price.

        The first one is kept in any case: it can store nothing.
        """
        costs = [option.cost(prices) for option in options]
        errors, sizes = np.stack([error for error, _ in costs]), np.stack([size for _, size in costs])
        doubts = np.array([[option.doubt] for option in options])
        total = errors + doubts + prices * sizes
        kept = {0}
        for family in {option.family for option in options}:
            members = np.array([i for i, option in enumerate(options) if option.family == family])
            kept |= set(members[np.argmin(total[members], axis=0)].tolist())
        order = sorted(kept)
        return cls(tuple(options[i] for i in order), errors[order], sizes[order], doubts[order])

    @classmethod
    def unpriced(cls, options: Sequence[Option]) -> ModuleCurves:
        """All the options, for solutions that do not go by price."""
        nothing = np.zeros((len(options), 0))
        return cls(tuple(options), nothing, nothing, np.zeros((len(options), 1)))

    def at(self, kept: Sequence[int]) -> ModuleCurves:
        """Some of the options."""
        options = tuple(self.options[i] for i in kept)
        return ModuleCurves(options, self.errors[kept], self.bytes[kept], self.doubts[kept])

    def costs(self, prices: Floats) -> Floats:
        """What every option is compared by at each price, (options, prices)."""
        return self.errors + self.doubts + prices * self.bytes

    def best(self, prices: Floats) -> Ints:
        """Index of the best option at each price."""
        best: Ints = np.argmin(self.costs(prices), axis=0)
        return best


def price_grid(error: float, size: float) -> Floats:
    """Prices from "every direction is worth its bytes" to "none is".

    Args:
        error: The weighted squared error of storing nothing.
        size: Bytes of the adapters.
    """
    unit = max(error, 1e-300) / max(size, 1.0)
    return np.geomspace(_CHEAPEST * unit, _DEAREST * unit, _GRID)


class PricedModules:
    """The curves of all modules on one grid of prices, and what they come to together.

    Args:
        modules: Per module its options.
        prices: The grid they were traced on, ascending; empty for solutions that do not go by price.
    """

    def __init__(self, modules: Sequence[ModuleCurves], prices: Floats) -> None:
        self.modules = tuple(modules)
        self.prices = prices
        self._parts: dict[frozenset[str], PricedModules] = {}
        self._last: list[Choice] | None = None
        self._uniform: dict[int, list[Choice]] = {}

    def only(self, families: Iterable[str]) -> PricedModules:
        """The options of some families; found once, for all the budgets that are asked for."""
        wanted = frozenset(families)
        if wanted not in self._parts:
            self._parts[wanted] = PricedModules(
                [
                    module.at([i for i, option in enumerate(module.options) if option.family in wanted])
                    for module in self.modules
                ],
                self.prices,
            )
        return self._parts[wanted]

    def chosen(self, options: Sequence[Option], price: float) -> list[Choice]:
        """The best levels of one option of each module; where they are those of the last call, the same objects.

        One budget is met in a few steps between which next to nothing changes, and a choice remembers what it costs.
        """
        if self._last is None:
            self._last = [option.choice(price) for option in options]
        else:
            self._last = [
                option.choice_or(price, other) for option, other in zip(options, self._last, strict=True)
            ]
        return self._last

    def uniform(self, rank: int) -> list[Choice]:
        """The paper's form at one rank for all modules: per module the largest shared rank up to it, heads dense.

        For modules whose options are the one of storing nothing, then those of dense heads by rank.

        Args:
            rank: Rows of A'; with 0 nothing is kept.
        """
        if rank not in self._uniform:
            self._uniform[rank] = [_uniform_choice(module.options, rank) for module in self.modules]
        return self._uniform[rank]

    @cached_property
    def ranks(self) -> list[int]:
        """The ranks of all options that have one, ascending."""
        return sorted(
            {option.rank for module in self.modules for option in module.options if option.rank > 0}
        )

    @cached_property
    def best(self) -> list[Ints]:
        """Per module the index of its best option at each price."""
        return [module.best(self.prices) for module in self.modules]

    @cached_property
    def totals(self) -> tuple[Floats, Floats]:
        """Error and bytes of all modules together at each price, every one at its best."""
        columns = np.arange(len(self.prices))
        errors, sizes = np.zeros(len(self.prices)), np.zeros(len(self.prices))
        for module, best in zip(self.modules, self.best, strict=True):
            errors += module.errors[best, columns]
            sizes += module.bytes[best, columns]
        return errors, sizes

    @cached_property
    def whole(self) -> _Interval:
        """All prices, no module settled."""
        return _Interval(self, tuple(range(len(self.modules))), (), ())


class _Interval:
    """Prices between two of a coarser grid, on a finer one. What was found of it is kept for the next budget.

    Args:
        open_modules: Those whose best option may still change.
        places: Which they are.
        settled: The options of the others, by place.
        alike: Their parts; those of the same rates cost as one.
    """

    def __init__(
        self,
        open_modules: PricedModules,
        places: tuple[int, ...],
        settled: tuple[tuple[int, Option], ...],
        alike: tuple[Part, ...],
    ) -> None:
        self.prices = open_modules.prices
        self._open = open_modules
        self._places = places
        self._settled = settled
        self._alike = alike
        self._finer: dict[int, _Interval] = {}

    @cached_property
    def totals(self) -> tuple[Floats, Floats]:
        """Error and bytes of all modules together at each price."""
        errors, sizes = (part.copy() for part in self._open.totals)
        errors += sum(option.base_error for _, option in self._settled)
        for part in self._alike:
            error, size = part.cost(self.prices)
            errors += error
            sizes += size
        return errors, sizes

    def options(self, place: int) -> list[Option]:
        """Every module's best option at one of the prices."""
        found = dict(self._settled)
        for module, best, at in zip(self._open.modules, self._open.best, self._places, strict=True):
            found[at] = module.options[best[place]]
        return [found[at] for at in range(len(found))]

    def finer(self, before: int) -> _Interval:
        """The prices from one to the next, on a grid of their own."""
        if before not in self._finer:
            prices = np.geomspace(self.prices[before], self.prices[before + 1], _NARROW)
            settled, places, still_open = list(self._settled), [], []
            fresh = []
            for module, best, at in zip(self._open.modules, self._open.best, self._places, strict=True):
                ends = sorted({int(best[before]), int(best[before + 1])})
                if len(ends) == 1:
                    fresh.append(module.options[ends[0]])
                    settled.append((at, fresh[-1]))
                else:
                    places.append(at)
                    still_open.append(_narrow(module, ends, prices))
            self._finer[before] = _Interval(
                PricedModules(still_open, prices),
                tuple(places),
                tuple(settled),
                (*self._alike, *_added(fresh)),
            )
        return self._finer[before]


def _added(options: Sequence[Option]) -> list[Part]:
    """The parts of some options, those of the same rates put together."""
    alike: dict[tuple[bytes, bytes, bool], list[Part]] = {}
    for part in (part for option in options for part in option.parts):
        key = part.rates.bytes.tobytes(), part.rates.noise.tobytes(), part.may_leave_out
        alike.setdefault(key, []).append(part)
    return [
        replace(parts[0], energies=np.concatenate([part.energies.reshape(-1) for part in parts]))
        for parts in alike.values()
    ]


def total_bytes(choices: Iterable[Choice]) -> int:
    """Bytes of the factors of all modules together."""
    return sum(choice.bytes for choice in choices)


def total_error(choices: Iterable[Choice]) -> float:
    """Expected weighted squared error of all modules together."""
    return sum(choice.error for choice in choices)


def relative_error(choices: Iterable[Choice], whole: float) -> float:
    """Root of the expected weighted squared error over ``whole``, that of storing nothing."""
    return math.sqrt(max(total_error(choices), 0.0) / max(whole, 1e-300))


def within_budget(modules: PricedModules, size: int, simple: PricedModules | None = None) -> list[Choice]:
    """The choice of least error that stores at most ``size`` bytes of factors.

    Args:
        modules: Per module its options.
        size: The budget.
        simple: The same modules with no option that shares; its own solution is compared with.

    Raises:
        BudgetError: If the budget is negative.
    """
    if size < 0:
        raise BudgetError(f"a budget of {size} bytes cannot be met")
    over, under = _bracket(modules, lambda _, total: total > size)
    candidates = [fill(_swap(under, over, size), size)]
    if simple is not None:
        # Where nothing is shared on either side of the price, the simple solution is the same one.
        shares = any(choice.option.shared for choice in (*over, *under))
        own = within_budget(simple, size) if shares else candidates[0]
        candidates.append(fill(own, size))
    return min(candidates, key=lambda choices: (total_error(choices), total_bytes(choices)))


def within_error(modules: PricedModules, max_error: float, whole: float) -> list[Choice]:
    """The choice of fewest bytes whose relative error is at most ``max_error``.

    Args:
        modules: Per module its options.
        max_error: Root of the weighted squared error over ``whole``.
        whole: Weighted squared error of storing nothing.

    Raises:
        BudgetError: If no choice reaches it.
    """
    bound = max_error**2 * whole
    close, _ = _bracket(modules, lambda total, _: total <= bound)
    if total_error(close) > bound:
        close, _ = _bracket(_cheaper(modules), lambda total, _: total <= bound)
    if total_error(close) > bound:
        raise _unreachable(
            max_error, relative_error(close, whole), "this recipe", "more bits, dtype='float32'"
        )
    return close


def _cheaper(modules: PricedModules) -> PricedModules:
    """The same options at prices below the grid's, down to none: every direction at the finest precision."""
    prices = np.geomspace(_FREE * modules.prices[0], modules.prices[0], _GRID)
    return PricedModules([ModuleCurves.of(module.options, prices) for module in modules.modules], prices)


def _unreachable(max_error: float, least: float, what: str, way_out: str) -> BudgetError:
    return BudgetError(
        f"max_error={max_error} cannot be met: the least relative error of {what} is {least:.4g}, by what rounding "
        f"usually leaves. Ask for that much, or for {way_out} or budget=1"
    )


def _bracket(
    modules: PricedModules, is_low: Callable[[float, float], bool]
) -> tuple[list[Choice], list[Choice]]:
    """The solutions on both sides of the price at which ``is_low(error, bytes)`` turns false.

    They are at the lower and the higher price; both are the same where it never turns.
    """
    interval = modules.whole
    while True:
        prices = interval.prices
        low = [is_low(float(error), float(size)) for error, size in zip(*interval.totals, strict=True)]
        first = low.index(False) if False in low else len(low) - 1
        before = max(first - 1, 0)
        if before == first or prices[first] / prices[before] < _PRECISE:
            break
        interval = interval.finer(before)
    lower = modules.chosen(interval.options(before), float(prices[before]))
    higher = [
        option.choice_or(float(prices[first]), other)
        for option, other in zip(interval.options(first), lower, strict=True)
    ]
    if first == len(prices) - 1 and low[first]:
        higher = lower
    if first == 0 and not low[0]:
        lower = higher
    return lower, higher


def _narrow(module: ModuleCurves, kept: Sequence[int], prices: Floats) -> ModuleCurves:
    """Some of the options, on a finer grid."""
    options = tuple(module.options[i] for i in kept)
    costs = [option.cost(prices) for option in options]
    errors, sizes = np.stack([error for error, _ in costs]), np.stack([size for _, size in costs])
    return ModuleCurves(options, errors, sizes, module.doubts[kept])


def _swap(choices: list[Choice], better: list[Choice], size: int) -> list[Choice]:
    """Take single modules from a dearer solution while they fit, the best gain per byte first."""
    left = size - total_bytes(choices)
    gains = []
    for m, (now, then) in enumerate(zip(choices, better, strict=True)):
        if now is then:
            continue
        extra = then.bytes - now.bytes
        gain = now.error + now.option.doubt - then.error - then.option.doubt
        if gain > 0:
            gains.append((gain / max(extra, 1e-9), m, extra))
    chosen = list(choices)
    for _, m, extra in sorted(gains, reverse=True):
        if extra <= left:
            chosen[m] = better[m]
            left -= extra
    return chosen


def fill(choices: list[Choice], size: int) -> list[Choice]:
    """Spend what is left of the budget on the vectors that gain most per byte from the next finer precision."""
    left = size - total_bytes(choices)
    levels = [[*choice.levels.shared, choice.levels.heads] for choice in choices]
    offers = [
        (m, *choice.offers)
        for m, choice in enumerate(choices)
        if min(part.least_step for part in choice.option.parts) <= left
    ]
    if not offers:
        return choices
    modules, ratios, sizes, places = zip(*offers, strict=True)
    ratio, extra = np.concatenate(ratios), np.concatenate(sizes)
    module = np.repeat(modules, [len(one) for one in ratios])
    where = np.concatenate([module[:, None], np.concatenate(places)], axis=1)
    able = np.flatnonzero((ratio > 0) & (extra <= left))
    able = able[np.argsort(-ratio[able], kind="stable")]
    filled = list(choices)
    for m in _take(levels, extra[able], where[able], left):
        *shared, heads = levels[m]
        filled[m] = replace(choices[m], levels=Levels(tuple(shared), heads))
    return filled


def _take(levels: list[list[Ints]], extra: Floats, where: Ints, left: int) -> set[int]:
    """Take one offer after the other as long as it fits: replaces levels in the list; returns the modules' places."""
    least = extra.min(initial=np.inf)
    fresh: set[tuple[int, int]] = set()
    for i, more in enumerate(extra.tolist()):
        if left < least:
            break
        if more > left:
            continue
        m, p, row, column, level = where[i].tolist()
        if (m, p) not in fresh:
            fresh.add((m, p))
            levels[m][p] = levels[m][p].copy()
        flat = levels[m][p].reshape(-1, levels[m][p].shape[-1])
        if column and _is_finer(level, int(flat[row, column - 1])):
            continue  # directions stay in the order of their precision
        flat[row, column] = level
        left -= int(more)
    return {m for m, _ in fresh}


def _is_finer(level: int, other: int) -> bool:
    return level != LEFT_OUT and (other == LEFT_OUT or level < other)


def every_direction(options: Sequence[Option], ranks: Sequence[Sequence[int]]) -> list[Choice]:
    """The given option of each module with the given head ranks, all at the finest precision."""
    return [_uniform(option, list(rank)) for option, rank in zip(options, ranks, strict=True)]


def _uniform(option: Option, ranks: Sequence[int]) -> Choice:
    columns = np.arange(option.heads.energies.shape[1])
    heads = np.where(columns < np.asarray(ranks)[:, None], 0, LEFT_OUT).astype(np.int64)
    shared = tuple(np.zeros(part.energies.shape, dtype=np.int64) for part in option.shared)
    return Choice(option, Levels(shared, heads))


def _uniform_choice(options: Sequence[Option], rank: int) -> Choice:
    nothing, *dense = options
    fitting = [option for option in dense if option.rank <= rank]
    option = max(fitting, key=lambda one: one.rank) if fitting else nothing
    return _uniform(option, [1 if fitting else 0] * len(option.heads.energies))


def largest_uniform(modules: PricedModules, size: int) -> list[Choice]:
    """The paper's form at the largest single rank that stores at most ``size`` bytes.

    Raises:
        BudgetError: If not even rank 1 fits.
    """
    best: list[Choice] | None = None if modules.ranks else modules.uniform(0)  # adapters that change nothing
    for rank in modules.ranks:
        choices = modules.uniform(rank)
        if total_bytes(choices) > size:
            break
        best = choices
    if best is None:
        smallest = total_bytes(modules.uniform(1))
        raise BudgetError(f"the paper's form stores {smallest} bytes at rank 1, but the budget leaves {size}")
    return best


def least_uniform(modules: PricedModules, max_error: float, whole: float) -> list[Choice]:
    """The paper's form at the smallest single rank whose relative error is at most ``max_error``.

    Args:
        modules: Per module its options.
        max_error: Root of the weighted squared error over ``whole``.
        whole: Weighted squared error of storing nothing.

    Raises:
        BudgetError: If no rank reaches it.
    """
    for rank in [0, *modules.ranks]:
        choices = modules.uniform(rank)
        if total_error(choices) <= max_error**2 * whole:
            return choices
    raise _unreachable(max_error, relative_error(choices, whole), "the paper's form", "method='hydraopt'")
