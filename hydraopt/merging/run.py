"""One merge, step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.bundle.contents import Bundle, BundleContents, container_bytes, describe
from hydraopt.bundle.layout import (
    SCHEMA,
    BaseModelEntry,
    FileEntry,
    Manifest,
    ModuleEntry,
    TaskEntry,
    head_shapes,
    shared_shapes,
)
from hydraopt.errors import BudgetError
from hydraopt.merging import separate, shared_a
from hydraopt.merging.budget import (
    Choice,
    every_direction,
    largest_uniform,
    least_uniform,
    total_numbers,
    uniform,
    within_budget,
    within_error,
)
from hydraopt.merging.parallel import in_order
from hydraopt.merging.problem import Factors, ModuleProblem, Option, load_module, module_names
from hydraopt.merging.recipe import SOLVER_VERSION, Recipe

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

SHARED = ""
"""Key of the shared part among the files; no task can have this name."""

_DIGEST_LENGTH = 64
_LONGEST_ERROR = 0.12345678  # errors are rounded to eight digits: none is longer
_TINY = 1e-280  # squared norms below it are zero: their inverse would overflow


@dataclass
class Errors:
    """Squared error and norm of each task, summed over modules."""

    squared: dict[str, float]
    norm: dict[str, float]

    def add(self, other: Errors) -> None:
        """Count another module in."""
        for task in other.squared:
            self.squared[task] += other.squared[task]
            self.norm[task] += other.norm[task]

    def relative(self, task: str) -> float:
        """|dW - merged| / |dW| of one task; 0 for a task that changes nothing."""
        norm = self.norm[task]
        return _rounded(math.sqrt(max(self.squared[task], 0.0) / norm)) if norm > 0 else 0.0

    def mean(self, tasks: Sequence[str]) -> float:
        """Root of the mean squared relative error."""
        shares = [
            max(self.squared[task], 0.0) / self.norm[task] if self.norm[task] > 0 else 0.0 for task in tasks
        ]
        return _rounded(math.sqrt(sum(shares) / len(shares)))


def _rounded(error: float) -> float:
    """Eight digits after the point: finer is rounding noise, and longer would make the manifest's size vary."""
    return round(error, 8)


class MergeRun:
    """One merge, step by step: weigh the tasks, trace every module's curves, choose, build.

    Args:
        adapters: Checked to fit together, in the order of their sorted names.
        recipe: How to merge.
        device: Where to compute.
        progress: Called with (done, total, what).
    """

    def __init__(
        self, adapters: dict[str, Adapter], recipe: Recipe, device: torch.device, progress: Progress
    ) -> None:
        self.adapters = adapters
        self.recipe = recipe
        self.device = device
        self.progress = progress
        self.tasks = tuple(adapters)
        self.modules = module_names(adapters)
        self.dtype: torch.dtype = getattr(torch, recipe.dtype)

    def run(self) -> Bundle:
        """The bundle."""
        with ThreadPoolExecutor(1) as digests:
            # The digests read the same pages as the merge and cost no BLAS time: beside it, not after it.
            wanted = digests.submit(lambda: {task: adapter.digest for task, adapter in self.adapters.items()})
            if self.recipe.budget is not None:
                self._budget_in_numbers(self.recipe)  # refuse at once what no amount of work would meet
            choices = self.solve(self.trace(), self.recipe)
            flats, errors = self._build(dict(zip(self.modules, choices, strict=True)))
            return self._bundle(choices, flats, errors, wanted.result())

    @cached_property
    def weights(self) -> dict[str, float]:
        """``w_k = 1 / |dW_k|^2`` over the whole adapter; a zero adapter is reproduced by anything, so 0."""
        norms = dict.fromkeys(self.tasks, 0.0)
        for done, squares in enumerate(in_order(self._squared_norms, self.modules)):
            self.progress(done, len(self.modules), "weigh the tasks")
            for task, square in squares.items():
                norms[task] += square
        self.progress(len(self.modules), len(self.modules), "weigh the tasks")
        return {task: 1 / norm if norm > _TINY else 0.0 for task, norm in norms.items()}

    def _squared_norms(self, name: str) -> dict[str, float]:
        squares = {}
        for task, adapter in self.adapters.items():
            if name in adapter.modules:
                up, down = (factor.to(self.device) for factor in adapter.factors(name))
                squares[task] = float(((up.mT @ up).double() * (down @ down.mT).double()).sum())
        return squares

    @cached_property
    def extras(self) -> dict[str, dict[str, Tensor]]:
        """Whole-layer tensors by task."""
        return {
            task: {name: adapter.extra(name) for name in adapter.extras}  # noqa: S610 - not Django's
            for task, adapter in self.adapters.items()
        }

    def trace(self) -> list[list[Option]]:
        """Per module every way to store it that the recipe allows, "separate" first."""
        modules = []
        _ = self.weights  # all of them are needed before the first module
        for done, options in enumerate(in_order(lambda name: self._options(self._load(name)), self.modules)):
            self.progress(done, len(self.modules), "trace the curves")
            modules.append(options)
        self.progress(len(self.modules), len(self.modules), "trace the curves")
        return modules

    def _options(self, problem: ModuleProblem) -> list[Option]:
        recipe = self.recipe
        own = separate.options(problem)
        is_paper = recipe.method == "paper"
        if recipe.method == "separate" or (not is_paper and (recipe.budget == 1 or len(problem.tasks) == 1)):
            return own
        stacked = min(problem.rows.shape[0] * problem.rows.shape[1], problem.d_in)
        ranks = shared_a.candidate_ranks(stacked)
        if is_paper:  # its one knob is a rank, so every rank is a candidate
            ranks = list(range(1, min(recipe.rank or shared_a.MAX_SHARED_RANK, stacked) + 1))
        basis = shared_a.find_basis(problem, ranks[-1])
        return own + shared_a.options(problem, basis, ranks, low_rank=not is_paper)

    def solve(self, modules: list[list[Option]], recipe: Recipe) -> list[Choice]:
        """What every module stores under ``recipe``.

        Args:
            modules: From :meth:`trace`; more options than the recipe's method allows are left aside.
            recipe: Its method, and its budget, error bound or rank.

        Raises:
            BudgetError: If the budget or error bound cannot be met.
        """
        own = [module[:1] for module in modules]
        if recipe.method != "paper" and recipe.budget == 1:
            return every_direction(own, [self._full_ranks(name) for name in self.modules])
        if recipe.rank is not None:
            if recipe.method == "paper":
                return uniform(modules, recipe.rank)
            ranks = [[min(rank, recipe.rank) for rank in self._full_ranks(name)] for name in self.modules]
            return every_direction(own, ranks)
        allowed = own if recipe.method == "separate" else modules
        if recipe.max_error is not None:
            error = recipe.max_error**2 * sum(1 for task in self.tasks if self.weights[task] > 0)
            return least_uniform(modules, error) if recipe.method == "paper" else within_error(allowed, error)
        numbers = self._budget_in_numbers(recipe)
        if recipe.method == "paper":
            return largest_uniform(modules, numbers)
        # Compared with at the end: adapting must never lose to a simple form at the same bytes.
        simple = [] if recipe.method == "separate" else [within_budget(own, numbers)]
        if recipe.method == "hydraopt" and total_numbers(uniform(modules, 1)) <= numbers:
            simple.append(largest_uniform(modules, numbers))
        return within_budget(allowed, numbers, simple)

    def _full_ranks(self, name: str) -> list[int]:
        return [adapter.modules[name].rank for adapter in self.adapters.values() if name in adapter.modules]

    def _budget_in_numbers(self, recipe: Recipe) -> int:
        """How many factor numbers the byte budget leaves once extras, headers and manifest are paid.

        Raises:
            BudgetError: If nothing is left; the message says the smallest budget that works.
        """
        budget = recipe.budget or 0.0
        reference = sum(adapter.reference_bytes for adapter in self.adapters.values())
        # float32 was asked for knowingly: the budget is then a share of the inputs at four bytes a number.
        allowed = int(budget * reference * max(1.0, self.dtype.itemsize / 2))
        fixed = self._container_bytes()
        if allowed < fixed:
            whole = sum(tensor.nbytes for tensors in self.extras.values() for tensor in tensors.values())
            # 16: the budget's own digits are in the manifest
            minimum = math.ceil(1000 * (fixed + 16) / (reference * max(1.0, self.dtype.itemsize / 2))) / 1000
            raise BudgetError(
                f"budget={budget}: {allowed} bytes do not hold the {fixed} bytes that are always needed ({whole} of "
                f"whole-layer extras, the rest manifest and headers); the least possible budget is {minimum}"
            )
        return (allowed - fixed) // self.dtype.itemsize

    def storage_ratio(self, numbers: int) -> float:
        """Storage ratio of a bundle with that many factor numbers; its container is bounded from above."""
        reference = sum(adapter.reference_bytes for adapter in self.adapters.values())
        return (self._container_bytes() + numbers * self.dtype.itemsize) / reference

    def _container_bytes(self) -> int:
        """An upper bound of the bundle's bytes without its factors."""
        entry = FileEntry(sha256="0" * _DIGEST_LENGTH, bytes=10**9)
        widest = [
            ModuleEntry(
                name=name,
                shape=self._shape(name),
                family=shared_a.NAME,
                rank=shared_a.MAX_SHARED_RANK,
                ranks=tuple(
                    adapter.modules[name].rank if name in adapter.modules else -1
                    for adapter in self.adapters.values()
                ),
            )
            for name in self.modules
        ]
        tasks = {
            task: self._task_entry(task, "0" * _DIGEST_LENGTH, entry, _LONGEST_ERROR) for task in self.tasks
        }
        manifest = self._manifest(widest, entry, tasks, _LONGEST_ERROR)
        return len(manifest.canonical()) + container_bytes(self.extras)

    def _build(self, choices: Mapping[str, Choice]) -> tuple[dict[str, Tensor], Errors]:
        """The stored factors of every module, written one after the other into one flat tensor per file."""
        entries = self._module_entries(choices.values())
        flats = {
            file: torch.empty(sum(rows * columns for rows, columns in shapes), dtype=self.dtype)
            for file, shapes in self._flat_shapes(entries).items()
        }
        filled = dict.fromkeys(flats, 0)
        errors = Errors(dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0))

        def append(file: str, parts: tuple[Tensor, ...]) -> None:
            for part in parts:
                start = filled[file]
                flats[file][start : start + part.numel()] = part.flatten().cpu()
                filled[file] = start + part.numel()

        built = in_order(lambda item: self._build_module(*item), list(choices.items()))
        for done, (factors, module_errors) in enumerate(built):
            self.progress(done, len(choices), "build the heads")
            append(SHARED, factors.shared)
            for task, parts in factors.heads.items():
                append(task, parts)
            errors.add(module_errors)
        self.progress(len(choices), len(choices), "build the heads")
        return flats, errors

    def _build_module(self, name: str, choice: Choice) -> tuple[Factors, Errors]:
        problem = self._load(name)
        ranks = dict(zip(problem.tasks, choice.ranks, strict=True))
        factors = choice.option.solution.build(problem, ranks, self.dtype)
        check_range(name, factors)
        return factors, measure_errors(problem, factors)

    def _load(self, name: str) -> ModuleProblem:
        return load_module(name, self.adapters, self.weights, self.device)

    def _module_entries(self, choices: Iterable[Choice]) -> list[ModuleEntry]:
        entries = []
        for name, choice in zip(self.modules, choices, strict=True):
            ranks = iter(choice.ranks)
            present = [name in adapter.modules for adapter in self.adapters.values()]
            entries.append(
                ModuleEntry(
                    name=name,
                    shape=self._shape(name),
                    family=choice.option.family,
                    rank=choice.option.shared_rank,
                    ranks=tuple(next(ranks) if is_present else -1 for is_present in present),
                )
            )
        return entries

    def _flat_shapes(self, entries: Iterable[ModuleEntry]) -> dict[str, list[tuple[int, int]]]:
        shapes: dict[str, list[tuple[int, int]]] = {SHARED: [], **{task: [] for task in self.tasks}}
        for entry in entries:
            shapes[SHARED] += shared_shapes(entry)
            for task, rank in zip(self.tasks, entry.ranks, strict=True):
                shapes[task] += head_shapes(entry, rank)
        return shapes

    def _shape(self, name: str) -> tuple[int, int]:
        module = next(adapter.modules[name] for adapter in self.adapters.values() if name in adapter.modules)
        return module.d_out, module.d_in

    def _task_entry(self, task: str, digest: str, file: FileEntry, error: float) -> TaskEntry:
        adapter = self.adapters[task]
        return TaskEntry(
            adapter=digest,
            bytes=adapter.reference_bytes,
            file=file,
            relative_error=error,
            task_type=adapter.task_type,
            fan_in_fan_out=bool(adapter.config.get("fan_in_fan_out")),
            saved_modules=adapter.saved_modules,
        )

    def _manifest(
        self, modules: Sequence[ModuleEntry], shared: FileEntry, tasks: dict[str, TaskEntry], error: float
    ) -> Manifest:
        first = next(iter(self.adapters.values()))
        return Manifest(
            schema_version=SCHEMA,
            base_model=BaseModelEntry(name=first.base_model, revision=first.revision),
            recipe=self.recipe,
            solver=SOLVER_VERSION,
            relative_error=error,
            modules=tuple(modules),
            shared=shared,
            tasks=tasks,
        )

    def _bundle(
        self,
        choices: Sequence[Choice],
        flats: dict[str, Tensor],
        errors: Errors,
        digests: Mapping[str, str],
    ) -> Bundle:
        contents = BundleContents(flats.pop(SHARED), flats, self.extras)
        shared = describe(contents.encode_shared())
        tasks = {
            task: self._task_entry(
                task, digests[task], describe(contents.encode_task(task)), errors.relative(task)
            )
            for task in self.tasks
        }
        manifest = self._manifest(self._module_entries(choices), shared, tasks, errors.mean(self.tasks))
        return Bundle(manifest, contents)


def check_range(module: str, factors: Factors) -> None:
    """Refuse factors that overflowed the stored dtype.

    Raises:
        BudgetError: If a stored number is infinite.
    """
    for part in (*factors.shared, *(part for parts in factors.heads.values() for part in parts)):
        if part.numel() and not bool(torch.isfinite(part.abs().max())):
            raise BudgetError(
                f"module {module!r} does not fit the range of {part.dtype}; use dtype='bfloat16' or 'float32'"
            )


def measure_errors(problem: ModuleProblem, factors: Factors) -> Errors:
    """A module's ``|dW_k|^2`` and ``|dW_k - stored_k|^2``, from the factors as they are stored.

    ``|X Y|^2 = tr((X^T X)(Y Y^T))`` with ``X = [B_k, -U_k]`` and ``Y`` the matching right factors: r + p wide.
    """
    errors = Errors({}, {})
    for k, task in enumerate(problem.tasks):
        up, down = effective_factors(factors, task, problem.ups.dtype)
        left = torch.cat([problem.ups[k], -up], dim=1)
        right = torch.cat([problem.downs[k], down], dim=0)
        gram = (left.mT @ left).double() * (right @ right.mT).double()
        rank = problem.ups.shape[2]
        errors.squared[task] = float(gram.sum())
        errors.norm[task] = float(gram[:rank, :rank].sum())
    return errors


def effective_factors(factors: Factors, task: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(up, down)`` of one task as any reader of the bundle multiplies them."""
    head = [part.to(dtype) for part in factors.heads[task]]
    if not factors.shared:
        return head[0], head[1]
    shared = factors.shared[0].to(dtype)
    return (head[0], shared) if len(head) == 1 else (head[0], head[1] @ shared)
