"""The one verb: merge a set of adapters into a bundle."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from hydraopt.adapters import Adapter, read_adapter
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
from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.merging import separate, shared_a
from hydraopt.merging.budget import (
    Choice,
    every_direction,
    total_numbers,
    uniform,
    within_budget,
    within_error,
)
from hydraopt.merging.problem import Factors, ModuleProblem, Option, load_module, module_names
from hydraopt.merging.recipe import SOLVER_VERSION, Recipe
from hydraopt.names import check_task_name

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what)."""

SHARED = ""
"""Key of the shared part among the files; no task can have this name."""

_DIGEST_LENGTH = 64
_LONGEST_ERROR = 0.12345678  # errors are rounded to eight digits: none is longer


def merge(
    adapters: Mapping[str, Adapter | Path | str],
    *,
    budget: float | None = None,
    max_error: float | None = None,
    method: str = "hydraopt",
    heads: int | None = None,
    rank: int | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> Bundle:
    """Merge the adapters of one base model into a bundle.

    Minimises ``sum_k w_k |dW_k - merged_k|^2`` over all modules, with ``w_k = 1 / |dW_k|^2`` (a task with large
    updates must not drown the others), in closed form. Memory stays at about one module of all adapters plus
    the bundle. The result does not depend on the order of the tasks or on how an adapter was factorised.

    Args:
        adapters: Opened adapters or their folders, by task name.
        budget: Bundle bytes as a share of the adapters' bytes counted at the stored dtype's size (two bytes a number
            for the 16-bit dtypes), in (0, 1]. 1 keeps every direction of every adapter. Default 0.25 unless
            ``max_error`` or ``rank`` is given.
        max_error: Instead of a budget: the largest relative Frobenius error |dW - merged| / |dW| over all tasks.
        method: ``hydraopt`` (adaptive), ``paper`` (one A' and dense heads at one rank), ``separate``.
        heads: For ``paper``: number of dense heads; one per task is supported.
        rank: For ``paper``: rows of A'; for ``separate``: directions per task. Instead of a budget.
        dtype: How factors are stored: ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of random choices; the present methods make none that could change a result.
        progress: Called with (done, total, what).

    Raises:
        AdapterMismatchError: If the adapters belong to different base models or disagree about a module.
        BudgetError: If the budget, error or rank cannot be met.
        AdapterFormatError: If an adapter cannot be read exactly.
    """
    if budget is None and max_error is None and rank is None:
        budget = 0.25
    recipe = make_recipe(
        method=method, budget=budget, max_error=max_error, heads=heads, rank=rank, dtype=dtype, seed=seed
    )
    opened = {check_task_name(task): _open(adapters[task]) for task in sorted(adapters)}
    check_set(opened)
    if recipe.heads is not None and recipe.heads != len(opened):
        raise BudgetError(
            f"heads={recipe.heads} is not supported: `paper` stores one dense head per task, here {len(opened)}"
        )
    return _Merge(opened, recipe, _device(device), progress or _silent).run()


def make_recipe(**settings: object) -> Recipe:
    """A :class:`Recipe` from loose settings.

    Raises:
        BudgetError: If a setting is out of range; the message names it and its value.
    """
    try:
        return Recipe.model_validate(settings)
    except ValidationError as reason:
        first = reason.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        value = f"{where}={first['input']!r}: " if where else ""
        raise BudgetError(value + first["msg"].removeprefix("Value error, ")) from reason


def check_set(adapters: Mapping[str, Adapter]) -> None:
    """Check that the adapters can live in one bundle.

    Raises:
        AdapterMismatchError: If there is none, two base models or revisions, or a module of two sizes.
    """
    if not adapters:
        raise AdapterMismatchError("there is no adapter to merge")
    first_task, first = next(iter(adapters.items()))
    sizes: dict[str, tuple[str, tuple[int, int]]] = {}
    for task, adapter in adapters.items():
        for what, found, expected in (
            ("base model", adapter.base_model, first.base_model),
            ("base model revision", adapter.revision, first.revision),
        ):
            if found != expected:
                raise AdapterMismatchError(
                    f"task {task!r} has {what} {found!r}, but task {first_task!r} has {expected!r}; "
                    "a bundle holds adapters of one base model: merge them separately"
                )
        for name, module in adapter.modules.items():
            size = (module.d_out, module.d_in)
            other, known = sizes.setdefault(name, (task, size))
            if size != known:
                raise AdapterMismatchError(
                    f"module {name!r}: task {task!r} updates a weight of {size}, but task {other!r} one of {known} "
                    "(d_out, d_in). Were both trained on the same base model?"
                )


def _open(adapter: Adapter | Path | str) -> Adapter:
    return adapter if isinstance(adapter, Adapter) else read_adapter(adapter)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in {"cpu", "cuda"}:
        raise BudgetError(f"device={name!r}: use 'auto', 'cpu' or 'cuda'")
    if name == "cuda" and not torch.cuda.is_available():
        raise BudgetError("device='cuda': this machine shows no CUDA device; use 'auto' or 'cpu'")
    return torch.device(name)


def _silent(_done: int, _total: int, _what: str) -> None:
    pass


@dataclass
class _Errors:
    """Squared error and norm of each task, summed over modules."""

    squared: dict[str, float]
    norm: dict[str, float]

    def relative(self, task: str) -> float:
        norm = self.norm[task]
        return _rounded(math.sqrt(max(self.squared[task], 0.0) / norm)) if norm > 0 else 0.0

    def mean(self, tasks: Sequence[str]) -> float:
        shares = [
            max(self.squared[task], 0.0) / self.norm[task] if self.norm[task] > 0 else 0.0 for task in tasks
        ]
        return _rounded(math.sqrt(sum(shares) / len(shares)))


def _rounded(error: float) -> float:
    """Eight digits after the point: finer is rounding noise, and longer would make the manifest's size vary."""
    return round(error, 8)


class _Merge:
    """One merge, step by step; nothing here outlives it."""

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
        self.weights: dict[str, float] = {}

    def run(self) -> Bundle:
        """Weigh the tasks, trace every module's curves, choose, build."""
        with ThreadPoolExecutor(1) as digests:
            # The digests read the same pages as the merge and cost no BLAS time: beside it, not after it.
            wanted = digests.submit(lambda: {task: adapter.digest for task, adapter in self.adapters.items()})
            self.weights = self._weigh()
            extras = {task: self._extras(task) for task in self.tasks}
            choices = self._choose(extras)
            flats, errors = self._build(choices)
            return self._bundle(choices, flats, extras, errors, wanted.result())

    def _weigh(self) -> dict[str, float]:
        """``w_k = 1 / |dW_k|^2`` over the whole adapter; a zero adapter is reproduced by anything, so 0."""
        norms = dict.fromkeys(self.tasks, 0.0)
        for done, name in enumerate(self.modules):
            self.progress(done, len(self.modules), "weigh the tasks")
            for task, adapter in self.adapters.items():
                if name in adapter.modules:
                    up, down = (factor.to(self.device) for factor in adapter.factors(name))
                    norms[task] += float(((up.mT @ up).double() * (down @ down.mT).double()).sum())
        return {task: 1 / norm if norm > 0 else 0.0 for task, norm in norms.items()}

    def _extras(self, task: str) -> dict[str, Tensor]:
        adapter = self.adapters[task]
        return {name: adapter.extra(name) for name in adapter.extras}

    def _choose(self, extras: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Choice]:
        modules: list[list[Option]] = []
        forms: list[list[Option]] = []
        for done, name in enumerate(self.modules):
            self.progress(done, len(self.modules), "trace the curves")
            problem = self._load(name)
            own, shared = self._options(problem)
            modules.append(own + shared)
            forms.append(
                [*own, *(o for o in shared if o.dense_numbers is not None)]
                if self.recipe.method == "hydraopt"
                else shared
            )
        self.progress(len(self.modules), len(self.modules), "trace the curves")
        return dict(zip(self.modules, self._solve(modules, forms, extras), strict=True))

    def _options(self, problem: ModuleProblem) -> tuple[list[Option], list[Option]]:
        """The options of the family "separate", and of the shared one, that the recipe allows."""
        recipe = self.recipe
        if recipe.method == "separate" or recipe.budget == 1:
            return separate.options(problem), []
        stacked = problem.rows.shape[0] * problem.rows.shape[1]
        ranks = shared_a.candidate_ranks(min(stacked, problem.d_in))
        if recipe.method == "paper":
            largest = min(recipe.rank or shared_a.MAX_SHARED_RANK, stacked, problem.d_in)
            basis = shared_a.find_basis(problem, largest)
            return [], shared_a.options(problem, basis, range(1, largest + 1), low_rank=False)
        own = separate.options(problem)
        if len(problem.tasks) == 1:  # nothing to share
            return own, []
        basis = shared_a.find_basis(problem, ranks[-1])
        return own, shared_a.options(problem, basis, ranks)

    def _solve(
        self,
        modules: list[list[Option]],
        forms: list[list[Option]],
        extras: Mapping[str, Mapping[str, Tensor]],
    ) -> list[Choice]:
        recipe = self.recipe
        if recipe.budget == 1:
            return every_direction(modules, [self._full_ranks(name) for name in self.modules])
        if recipe.rank is not None:
            if recipe.method == "paper":
                return uniform(modules, recipe.rank)
            full = [np.minimum(self._full_ranks(name), recipe.rank) for name in self.modules]
            return every_direction(modules, full)
        if recipe.max_error is not None:
            scale = sum(1 for task in self.tasks if self.weights[task] > 0)
            return within_error(modules, recipe.max_error**2 * scale)
        numbers = self._budget_in_numbers(extras)
        if recipe.method == "paper":
            return self._largest_uniform(modules, numbers)
        own = [[option for option in module if option.family == separate.NAME] for module in modules]
        fixed = [within_budget(own, numbers)]
        if recipe.method == "hydraopt" and len(self.tasks) > 1:
            fixed.append(self._largest_uniform(forms, numbers))
        return within_budget(modules, numbers, fixed)

    def _full_ranks(self, name: str) -> list[int]:
        return [adapter.modules[name].rank for adapter in self.adapters.values() if name in adapter.modules]

    def _largest_uniform(self, modules: list[list[Option]], numbers: int) -> list[Choice]:
        """The paper's form at the largest single rank that fits."""
        ranks = sorted({option.shared_rank for module in modules for option in module})
        best: list[Choice] | None = None
        for rank in ranks:
            choices = uniform(modules, rank)
            if total_numbers(choices) > numbers:
                break
            best = choices
        if best is None:
            smallest = total_numbers(uniform(modules, 1))
            raise BudgetError(
                f"budget={self.recipe.budget}: the paper's form needs {smallest} numbers at rank 1, but the budget leaves {numbers}"
            )
        return best

    def _budget_in_numbers(self, extras: Mapping[str, Mapping[str, Tensor]]) -> int:
        """How many factor numbers the byte budget leaves once extras, headers and manifest are paid.

        Raises:
            BudgetError: If nothing is left; the message says the smallest budget that works.
        """
        budget = self.recipe.budget or 0.0
        reference = sum(adapter.reference_bytes for adapter in self.adapters.values())
        # float32 was asked for knowingly: the budget is then a share of the inputs at four bytes a number.
        allowed = int(budget * reference * max(1.0, self.dtype.itemsize / 2))
        fixed = self._container_bytes(extras)
        if allowed < fixed:
            whole = sum(tensor.nbytes for tensors in extras.values() for tensor in tensors.values())
            minimum = math.ceil(1000 * fixed / (reference * max(1.0, self.dtype.itemsize / 2))) / 1000
            raise BudgetError(
                f"budget={budget}: {allowed} bytes do not hold the {fixed} bytes that are always needed ({whole} of "
                f"whole-layer extras, the rest manifest and headers); the least possible budget is {minimum}"
            )
        return (allowed - fixed) // self.dtype.itemsize

    def _container_bytes(self, extras: Mapping[str, Mapping[str, Tensor]]) -> int:
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
        return len(manifest.canonical()) + container_bytes(extras)

    def _build(self, choices: Mapping[str, Choice]) -> tuple[dict[str, Tensor], _Errors]:
        """The stored factors of every module, written one after the other into one flat tensor per file."""
        entries = self._module_entries(choices)
        flats = {
            file: torch.empty(sum(rows * columns for rows, columns in shapes), dtype=self.dtype)
            for file, shapes in self._flat_shapes(entries).items()
        }
        filled = dict.fromkeys(flats, 0)
        errors = _Errors(dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0))

        def append(file: str, parts: tuple[Tensor, ...]) -> None:
            for part in parts:
                start = filled[file]
                flats[file][start : start + part.numel()] = part.flatten().cpu()
                filled[file] = start + part.numel()

        for done, (name, choice) in enumerate(choices.items()):
            self.progress(done, len(choices), "build the heads")
            problem = self._load(name)
            ranks = dict(zip(problem.tasks, choice.ranks, strict=True))
            factors = choice.option.solution.build(problem, ranks, self.dtype)
            check_range(name, factors)
            append(SHARED, factors.shared)
            for task in problem.tasks:
                append(task, factors.heads[task])
            add_errors(errors, problem, factors)
        self.progress(len(choices), len(choices), "build the heads")
        return flats, errors

    def _load(self, name: str) -> ModuleProblem:
        return load_module(name, self.adapters, self.weights, self.device)

    def _module_entries(self, choices: Mapping[str, Choice]) -> list[ModuleEntry]:
        entries = []
        for name, choice in choices.items():
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
        choices: Mapping[str, Choice],
        flats: dict[str, Tensor],
        extras: dict[str, dict[str, Tensor]],
        errors: _Errors,
        digests: Mapping[str, str],
    ) -> Bundle:
        contents = BundleContents(flats.pop(SHARED), flats, extras)
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


def add_errors(errors: _Errors, problem: ModuleProblem, factors: Factors) -> None:
    """Add this module's ``|dW_k|^2`` and ``|dW_k - stored_k|^2``, from the factors as they are stored.

    ``|X Y|^2 = tr((X^T X)(Y Y^T))`` with ``X = [B_k, -U_k]`` and ``Y`` the matching right factors: r + p wide.
    """
    for k, task in enumerate(problem.tasks):
        up, down = effective_factors(factors, task, problem.ups.dtype)
        left = torch.cat([problem.ups[k], -up], dim=1)
        right = torch.cat([problem.downs[k], down], dim=0)
        gram = (left.mT @ left).double() * (right @ right.mT).double()
        rank = problem.ups.shape[2]
        errors.squared[task] += float(gram.sum())
        errors.norm[task] += float(gram[:rank, :rank].sum())


def effective_factors(factors: Factors, task: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``(up, down)`` of one task as any reader of the bundle multiplies them."""
    head = [part.to(dtype) for part in factors.heads[task]]
    if not factors.shared:
        return head[0], head[1]
    shared = factors.shared[0].to(dtype)
    return (head[0], shared) if len(head) == 1 else (head[0], head[1] @ shared)
