"""One merge, step by step: weigh the tasks, trace every module's curves, solve, build."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.adapters.known_digests import hashed
from hydraopt.adapters.lora import LoraKind
from hydraopt.bundle.contents import Bundle
from hydraopt.errors import BudgetError
from hydraopt.merging import separate
from hydraopt.merging.assembly import Assembly
from hydraopt.merging.baselines import one_for_all, refuse_zero_adapters
from hydraopt.merging.basis import find_basis
from hydraopt.merging.budget import ModuleCurves, PricedModules, price_grid
from hydraopt.merging.dense_forms import DenseForms
from hydraopt.merging.dense_heads import curve_options
from hydraopt.merging.families import (
    OUTPUT_SIDE,
    Search,
    shared_options,
    worthwhile,
)
from hydraopt.merging.kept_factors import KeptFactors
from hydraopt.merging.option import Choice, Floats, Option, StoredModule
from hydraopt.merging.parallel import in_order
from hydraopt.merging.problem import Grams, ModuleProblem, load_module, module_names
from hydraopt.merging.products import bfloat16_products
from hydraopt.merging.shared_a import MAX_SHARED_RANK
from hydraopt.merging.solving import UNIFORM, most_factor_bytes, solve, within_bound
from hydraopt.progress import Progress
from hydraopt.recipe import ONE_FOR_ALL, Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")

TINY = 1e-280  # squared norms below it are zero: their inverse would overflow
_FEW_MODULES = 48


class MergeRun:
    """One merge, step by step.

    Args:
        adapters: Checked to fit together, in the order of their sorted names.
        recipe: How to merge.
        device: Where to compute.
        progress: Called with (done, total, what).
        metrics: Second moment of the inputs of some modules, (d_in, d_in) by name, from calibration data.
        executor: Where modules are worked on; None is threads of this process.
        kept: Factors of the same adapters on the same device, from another merge; None is a new place on a GPU.
    """

    def __init__(
        self,
        adapters: dict[str, Adapter],
        recipe: Recipe,
        device: torch.device,
        progress: Progress,
        metrics: Mapping[str, Tensor] | None = None,
        *,
        executor: Executor | None = None,
        kept: KeptFactors | None = None,
    ) -> None:
        self.adapters = adapters
        self.recipe = recipe
        self.device = device
        self.progress = progress
        self.metrics = metrics or {}
        self.executor = executor
        self.tasks = tuple(adapters)
        self.modules = module_names(adapters)
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)
        self.assembly = Assembly(adapters, recipe, self.modules)
        self._grams: dict[str, Grams] = {}  # by module, once the tasks were weighed
        self._kept = kept or KeptFactors.on(device, adapters)

    def __getstate__(self) -> dict[str, object]:
        """What a worker elsewhere needs: not who is told of the progress, the executor, or what is kept of modules."""
        return {**self.__dict__, "progress": None, "executor": None, "_grams": {}, "_kept": None}

    def under(self, recipe: Recipe) -> MergeRun:
        """The same set under another recipe with the same relative weights; what was found of the tasks is kept."""
        other = MergeRun(
            self.adapters,
            recipe,
            self.device,
            self.progress,
            self.metrics,
            executor=self.executor,
            kept=self._kept,
        )
        other.__dict__["_spectra"], other._grams = self._spectra, self._grams
        return other

    def run(self) -> Bundle:
        """The bundle."""
        with ThreadPoolExecutor(1) as digests:
            # The digests read the same pages as the merge and cost no BLAS time: beside it, not after it.
            wanted = digests.submit(
                lambda: {task: hashed(adapter) for task, adapter in self.adapters.items()}
            )
            if self.recipe.budget is not None and self.recipe.budget < 1:
                most_factor_bytes(self.assembly, self.recipe)  # refuse at once what no work would meet
            if self.recipe.max_error is None:
                return self._built(self._choices(), wanted.result())
            curves = self.trace()

            def attempt(max_error: float | None) -> Bundle:
                recipe = self.recipe.model_copy(update={"max_error": max_error})
                choices = solve(self.assembly, curves, recipe, self.total_weight)
                return self._built(choices, wanted.result())

            return within_bound(self.recipe, attempt, None if self.metrics else self.weights)

    def _choices(self) -> list[Choice]:
        if self.recipe.method not in ONE_FOR_ALL:
            return solve(self.assembly, self.trace(), self.recipe, self.total_weight)
        return [
            one_for_all(self.recipe, self.assembly.shape(name), self.assembly.ranks(name))
            for name in self.modules
        ]

    def _built(self, choices: Sequence[Choice], digests: Mapping[str, str]) -> Bundle:
        return self.assembly.bundle(self.assembly.entries(choices), self.build(choices), digests)

    @cached_property
    def _spectra(self) -> dict[str, dict[str, Floats]]:
        """By module and task the squared singular values of the update, descending."""
        spectra = {}
        weighed = self._each(self._weigh, self.modules, "weigh the tasks")
        for name, (found, grams) in zip(self.modules, weighed, strict=True):
            spectra[name], self._grams[name] = found, grams
        return spectra

    def _weigh(self, name: str) -> tuple[dict[str, Floats], Grams]:
        problem = self._load(name, weights=dict.fromkeys(self.tasks, 1.0))
        return dict(zip(problem.tasks, separate.spectra(problem), strict=True)), problem.grams

    @cached_property
    def weights(self) -> dict[str, float]:
        """``w_k = c_k / |dW_k|^2`` over the whole adapter, with the recipe's relative weight ``c_k``.

        A zero adapter is reproduced by anything, so its weight is 0. In methods of one update for all tasks, which
        minimise no error, it is the coefficient ``c_k / sum c``.

        Raises:
            BudgetError: If such a method has no task to weigh.
        """
        if self.recipe.method in ONE_FOR_ALL:
            return self._coefficients()
        norms = dict.fromkeys(self.tasks, 0.0)
        for module in self._spectra.values():
            for task, spectrum in module.items():
                norms[task] += float(spectrum.sum())
        relative = self.recipe.weights
        return {task: relative.get(task, 1.0) / norm if norm > TINY else 0.0 for task, norm in norms.items()}

    def _coefficients(self) -> dict[str, float]:
        relative = {task: self.recipe.weights.get(task, 1.0) for task in self.tasks}
        total = sum(relative.values())
        return {task: weight / total for task, weight in relative.items()}

    @cached_property
    def total_weight(self) -> float:
        """Weighted squared error of storing nothing: the sum of the relative weights of tasks that change something."""
        return sum(self.recipe.weights.get(task, 1.0) for task, weight in self.weights.items() if weight > 0)

    @cached_property
    def prices(self) -> Floats:
        """The prices of a byte at which every module is traced."""
        return price_grid(self.total_weight, self.assembly.reference_bytes)

    def trace(self) -> PricedModules:
        """Per module every way to store it that the recipe allows, "separate" first, priced."""
        if self.recipe.method in UNIFORM:
            return PricedModules(
                [ModuleCurves.unpriced(options) for options in self._dense_options()], np.empty(0)
            )
        families = frozenset(self.recipe.families)
        if self.recipe.budget == 1 or self.recipe.rank is not None:
            families &= {separate.NAME}
        traced = self._trace_all(families, (self.recipe.precisions,))
        return PricedModules([curves for (curves,) in traced], self.prices)

    def trace_frontier(
        self, precisions: Sequence[tuple[int, ...]], dense: tuple[int, ...] | None
    ) -> tuple[list[PricedModules], PricedModules | None]:
        """As :meth:`trace` for any budget, at several sets of precisions: the bases and spectra are found once.

        Args:
            precisions: Sets of them.
            dense: The set for the paper's form with a head for each task, whose curve comes from the same bases. None
                is no such curve.

        Returns:
            Per set of precisions; and of the paper's form, for sizes and errors alone.
        """
        traced = self._trace_all(frozenset(self.recipe.families), precisions, dense, any_price=True)
        columns = list(zip(*traced, strict=True))
        paper = None if dense is None else PricedModules(columns.pop(), np.empty(0))
        return [PricedModules(column, self.prices) for column in columns], paper

    def _dense_options(self) -> list[list[Option]]:
        _ = self.weights
        size = None if self.recipe.budget is None else most_factor_bytes(self.assembly, self.recipe)
        forms = DenseForms.of(self.recipe, self.assembly, size)

        def options(item: tuple[str, Grams]) -> list[Option]:
            name, grams = item
            own = self._own_option(name)
            return [
                own,
                *(forms.options(name, lambda: self._load(name, grams)) if own.heads.energies.any() else []),
            ]

        # Groups are told apart by products of directions, which are no bfloat16 numbers.
        is_grouped = forms.sharing is not None
        return list(self._each(options, list(self._grams.items()), "trace the curves", exact=is_grouped))

    def _trace_all(
        self,
        families: frozenset[str],
        precisions: Sequence[tuple[int, ...]],
        dense: tuple[int, ...] | None = None,
        *,
        any_price: bool = False,
    ) -> list[list[ModuleCurves]]:
        _ = self.weights, self.prices  # needed before the first module
        if len(self.modules) <= _FEW_MODULES or not families & OUTPUT_SIDE:
            return self._trace({name: Search(families) for name in self.modules}, precisions, dense)
        # Look in all modules of a kind (all `up_proj`, say) only for what pays in one of them.
        kinds: dict[str, list[str]] = {}
        for name in self.modules:
            kinds.setdefault(re.sub(r"\d+", "#", name), []).append(name)
        tried = {kind: names[len(names) // 2] for kind, names in kinds.items()}
        found = self._trace({name: Search(families) for name in tried.values()}, precisions, dense)
        curves = dict(zip(tried.values(), found, strict=True))
        first = [one[0] for one in found]
        window = slice(None) if any_price else self._price_window(first, list(tried.values()))
        searches = {
            name: Search.joined(
                [worthwhile(one, self.prices, window) for one in curves[tried[kind]][: len(precisions)]]
            )
            for kind, names in kinds.items()
            for name in names
            if name not in curves
        }
        curves |= zip(searches, self._trace(searches, precisions, dense), strict=True)
        return [curves[name] for name in self.modules]

    def _trace(
        self,
        searches: Mapping[str, Search],
        precisions: Sequence[tuple[int, ...]],
        dense: tuple[int, ...] | None,
    ) -> list[list[ModuleCurves]]:
        """By module its curves at each set of precisions and, where that is asked for, of the paper's form last."""

        def curves(item: tuple[str, Search, Grams]) -> list[ModuleCurves]:
            options, paper = self._options(*item, dense)
            found = [ModuleCurves.of([one.at(bits) for one in options], self.prices) for bits in precisions]
            return found if dense is None else [*found, ModuleCurves.unpriced(paper)]

        work = [(name, search, self._grams[name]) for name, search in searches.items()]
        return list(self._each(curves, work, "trace the curves"))

    def _options(
        self, name: str, search: Search, grams: Grams, dense: tuple[int, ...] | None
    ) -> tuple[list[Option], list[Option]]:
        """Ways to store a module, "separate" first; and of the paper's form for a curve, if that is asked for."""
        own = self._own_option(name)
        shared, paper = [own], [] if dense is None else [own.at(dense)]
        is_shared = bool(search.families - {separate.NAME}) and len(self._spectra[name]) > 1
        is_dense = dense is not None and bool(own.heads.energies.any())
        if is_shared or is_dense:
            problem = self._load(name, grams)
            inputs = find_basis(problem, MAX_SHARED_RANK) if is_dense else None
            if is_shared:
                shared += shared_options(
                    problem, search.families, self.recipe.precisions, search.most, inputs
                )
            if inputs is not None and dense is not None:
                paper += curve_options(problem, inputs, dense)
        return shared, paper

    def _price_window(self, curves: Sequence[ModuleCurves], names: Sequence[str]) -> slice:
        """The two prices between which these modules alone would take their share of the budget or error."""
        errors, sizes = PricedModules(curves, self.prices).totals
        own = [self._own_option(name).heads.energies for name in names]
        if self.recipe.max_error is not None:
            beyond = errors > self.recipe.max_error**2 * sum(float(energies.sum()) for energies in own)
        else:
            numbers = sum(
                one.size * sum(self.assembly.shape(name)) for one, name in zip(own, names, strict=True)
            )
            beyond = sizes <= (self.recipe.budget or 1.0) * 2 * numbers
        crossing = int(np.argmax(beyond)) if beyond.any() else len(self.prices) - 1
        return slice(max(crossing - 1, 0), crossing + 1)

    def _own_option(self, name: str) -> Option:
        """Storing every task of a module separately."""
        spectra = self._spectra[name]
        width = max(len(spectrum) for spectrum in spectra.values())
        energies = np.zeros((len(spectra), width))
        for k, (task, spectrum) in enumerate(spectra.items()):
            energies[k, : len(spectrum)] = self.weights[task] * spectrum
        return separate.option(energies, self.assembly.shape(name), self.recipe.precisions)

    def build(self, choices: Sequence[Choice]) -> Iterator[StoredModule]:
        """Every module as it is stored, in order."""
        _ = self.weights  # needed before the first module

        def build(item: tuple[str, Choice, Grams | None]) -> StoredModule:
            name, choice, grams = item
            problem = self._load(name, grams)
            stored = choice.option.solution.build(problem, choice.levels, self.recipe.precisions, self.dtype)
            check_range(name, self.dtype, stored)
            return stored

        grams = [self._grams.get(name) for name in self.modules]
        work = list(zip(self.modules, choices, grams, strict=True))
        stored = self._each(build, work, "build the heads", exact=True)
        if self.recipe.method in ONE_FOR_ALL:
            stored = refuse_zero_adapters(stored, self.recipe.method)
        return stored

    def _load(
        self, name: str, grams: Grams | None = None, *, weights: Mapping[str, float] | None = None
    ) -> ModuleProblem:
        weights = self.weights if weights is None else weights
        metric = self.metrics.get(name)
        problem = load_module(name, self.adapters, weights, self.device, metric, known=grams, kept=self._kept)
        check_finite(problem, self.adapters)
        return problem

    @cached_property
    def _is_bfloat16(self) -> bool:
        """Whether all factors are bfloat16 numbers: stored as such, not computed, and scaled by powers of two."""
        adapters = self.adapters.values()
        return (
            not self.metrics
            and all(adapter.kind == LoraKind.name for adapter in adapters)
            and all(
                entry.dtype == torch.bfloat16
                for adapter in adapters
                for entry in adapter.file.entries.values()
            )
            and all(
                abs(math.frexp(module.scaling)[0]) == 0.5
                for adapter in adapters
                for module in adapter.modules.values()
            )
        )

    def _each(
        self, function: Callable[[Item], Result], items: Sequence[Item], what: str, *, exact: bool = False
    ) -> Iterator[Result]:
        names = [str(item[0] if isinstance(item, tuple) else item) for item in items]
        ahead = self._kept.reading_ahead(names) if self._kept and not self.executor else nullcontext()
        with bfloat16_products(allowed=self._is_bfloat16 and not exact), ahead:
            yield from in_order(
                function, items, what, self.progress, self.executor, alone=self.device.type != "cpu"
            )


def check_finite(problem: ModuleProblem, adapters: Mapping[str, Adapter]) -> None:
    """Refuse updates whose norm is no number.

    Raises:
        AdapterFormatError: If a tensor holds NaN or infinite values.
        BudgetError: If the updates are too large for the work dtype.
    """
    if bool(torch.isfinite(problem.norms).all()):
        return
    for task in problem.tasks:
        adapters[task].factors(problem.name)  # names the tensor that is not finite
    raise BudgetError(
        f"module {problem.name!r}: its updates are too large to be squared in {problem.ups.dtype}"
    )


def check_range(module: str, dtype: torch.dtype, stored: StoredModule) -> None:
    """Refuse factors that overflowed the stored dtype.

    Raises:
        BudgetError: If what is stored is not finite.
    """
    if not all(math.isfinite(error) for error in stored.squared_error.values()):
        raise BudgetError(
            f"module {module!r} does not fit the range of {dtype}; use dtype='bfloat16' or 'float32'"
        )
