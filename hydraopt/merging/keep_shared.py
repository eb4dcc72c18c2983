"""A merge that keeps a former bundle's shared part: only the tasks that changed are fitted.

Reused as they are: the shared file, byte for byte; the family of each module; and the files of tasks whose adapter has
the digest that the former manifest names. Of such an adapter nothing but the digest is asked for. Fitted anew, in
closed form: the heads of changed and new tasks, at ranks and precisions chosen as in every merge, within the bytes
the budget leaves. Not reused: curves and spectra of the former merge, which cannot be told from a bundle. What is
lost: the shared part does not turn towards the new tasks. How much that costs is measured and, where it is much, said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.adapters.known_digests import hashed, known_digest
from hydraopt.bundle.contents import Bundle, BundleContents, container_bytes
from hydraopt.bundle.layout import (
    SHARED_FILE,
    Manifest,
    ModuleEntry,
    TaskEntry,
    task_file,
)
from hydraopt.errors import BudgetError
from hydraopt.merging import separate
from hydraopt.merging.assembly import Assembly, row_bytes
from hydraopt.merging.budget import (
    ModuleCurves,
    PricedModules,
    every_direction,
    price_grid,
    relative_error,
    total_error,
    within_budget,
    within_error,
)
from hydraopt.merging.families import OUTPUT_SIDE
from hydraopt.merging.former import check_fits
from hydraopt.merging.option import Choice, Floats, Option, StoredModule
from hydraopt.merging.parallel import in_order
from hydraopt.merging.problem import ModuleProblem, load_module, module_names
from hydraopt.merging.run import TINY, check_finite, check_range
from hydraopt.merging.side_by_side import joined, joined_levels, parted
from hydraopt.merging.solving import allowed_bytes, fit_container, within_bound
from hydraopt.merging.stored_factors import StoredFactors
from hydraopt.progress import Progress
from hydraopt.recipe import SOLVER_VERSION, Recipe

Item = TypeVar("Item")
Result = TypeVar("Result")

_FEW_NUMBERS = 1 << 19
"""Numbers of a module below which its operations are too short for threads."""

_BATCH_NUMBERS = 1 << 20
"""Numbers of modules that are built at once: more would leave the processor's cache."""

_FAR_WORSE = 2.0
_NOTICEABLE = 0.05
"""A task is warned of whose relative error is beyond both: so many times the former bundle's, and this."""


@dataclass(frozen=True)
class _Traced:
    """One module of the changed tasks: its tasks, the energies heads can hold (K, P) and each task's whole energy."""

    tasks: tuple[str, ...]
    energies: Floats
    norms: Floats

    @property
    def lost(self) -> Floats:
        """(K,): energy outside the shared factors."""
        lost: Floats = (self.norms - self.energies.sum(axis=1)).clip(min=0)
        return lost


class KeepingRun:
    """One merge onto a former bundle's shared part.

    Args:
        former: The bundle.
        adapters: The whole new set, checked to fit together, in the order of the sorted names.
        recipe: The former recipe, with what is different now.
        device: Where to compute.
        progress: Called with (done, total, what).
        metrics: Second moment of the inputs of some modules, (d_in, d_in) by name.
    """

    def __init__(
        self,
        former: Bundle,
        adapters: Mapping[str, Adapter],
        recipe: Recipe,
        *,
        device: torch.device,
        progress: Progress,
        metrics: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_fits(former.manifest, adapters)
        self.former = former
        self.adapters = adapters
        self.recipe = recipe
        self.device = device
        self.progress = progress
        self.metrics = metrics or {}
        known = former.manifest.adapters
        self.digests = _digests(adapters, known)
        self.kept = tuple(task for task, digest in self.digests.items() if known.get(task) == digest)
        self.changed = {task: adapters[task] for task in adapters if task not in self.kept}
        self.modules = module_names(self.changed)
        self.assembly = Assembly(self.changed, recipe, self.modules)
        entries = {module.name: module for module in former.manifest.modules}
        data, precisions = former.shared_bytes(), former.manifest.precisions
        self.factors = {
            name: StoredFactors(entries[name], data[name], precisions, former.dtype) for name in self.modules
        }

    def run(self) -> Bundle:
        """The bundle; the former one itself where no task has changed, come or gone."""
        if not self.changed and self.kept == self.former.task_names:
            return self.former
        return within_bound(self.recipe, self._attempt, None if self.metrics else self._weights)

    def _attempt(self, max_error: float | None) -> Bundle:
        choices = self._solve(max_error)
        entries = [
            entry.model_copy(update={"shared": self.factors[entry.name].entry.shared})
            for entry in self.assembly.entries(choices)
        ]
        _, heads, errors, scratch = self.assembly.flats(entries, self._build(choices))
        kept = {SHARED_FILE, *map(task_file, self.kept)}
        contents = BundleContents(
            self.former.contents.shared,
            {task: self.former.contents.heads[task] for task in self.kept} | heads,
            {task: self.former.contents.extras[task] for task in self.kept} | self.assembly.extras,
            {name: file for name, file in self.former.files.items() if name in kept},
            (*self.former.contents.scratch, self.assembly.scratch, scratch),
        )
        fresh = self.assembly.task_entries(contents, errors, self.digests)
        manifest = self._manifest(entries, fresh)
        return Bundle(manifest, contents, self._warnings(manifest))

    @cached_property
    def _traced(self) -> dict[str, _Traced]:
        """By module of the changed tasks."""

        def trace(name: str) -> _Traced:
            problem = self._load(name, dict.fromkeys(self.changed, 1.0))
            check_finite(problem, self.changed)
            return _Traced(problem.tasks, self.factors[name].energies(problem), problem.norms.cpu().numpy())

        return dict(
            zip(
                self.modules,
                self._each(trace, self.modules, "weigh the changed tasks"),
                strict=True,
            )
        )

    @cached_property
    def _weights(self) -> dict[str, float]:
        """As in every merge: ``c_k / |dW_k|^2`` over the whole adapter."""
        norms = self._per_task(lambda module: module.norms)
        relative = self.recipe.weights
        return {task: relative.get(task, 1.0) / norm if norm > TINY else 0.0 for task, norm in norms.items()}

    def _per_task(self, part: Callable[[_Traced], Floats]) -> dict[str, float]:
        sums = dict.fromkeys(self.changed, 0.0)
        for module in self._traced.values():
            for task, value in zip(module.tasks, part(module).tolist(), strict=True):
                sums[task] += value
        return sums

    def _options(self) -> list[Option]:
        options = []
        for name, module in self._traced.items():
            weights = np.array([self._weights[task] for task in module.tasks])
            options.append(
                self.factors[name].option(weights[:, None] * module.energies, float(weights @ module.lost))
            )
        return options

    def _solve(self, max_error: float | None) -> list[Choice]:
        options, recipe = self._options(), self.recipe
        if not options:
            return []
        if recipe.rank is not None or recipe.budget == 1:
            return every_direction(options, [self._full_ranks(name) for name in self.modules])
        total = sum(recipe.weights.get(task, 1.0) for task, weight in self._weights.items() if weight > 0)
        prices = price_grid(total, self.assembly.reference_bytes)
        curves = PricedModules([ModuleCurves.of([option], prices) for option in options], prices)
        if max_error is None:
            return self._fit_container(curves)
        least = every_direction(options, [self._full_ranks(name) for name in self.modules])
        bound = max_error**2 * total
        if total_error(least) > bound:
            reached = relative_error(least, total)
            raise BudgetError(
                f"max_error={max_error}: on the shared part that is kept, the changed tasks reach no less than "
                f"{reached:.4f}; merge afresh, without keep_shared"
            )
        return within_error(curves, max_error, total)

    def _full_ranks(self, name: str) -> list[int]:
        module = self._traced[name]
        # for dense heads a rank is that of A', and the head is kept whole
        most = module.energies.shape[1] if self.recipe.method == "paper" else self.recipe.rank or math.inf
        ranks = [self.changed[task].modules[name].rank for task in module.tasks]
        return [int(min(rank, most, module.energies.shape[1])) for rank in ranks]

    def _fit_container(self, curves: PricedModules) -> list[Choice]:
        """The solution within the bytes the budget leaves to the changed tasks."""
        left = self._bytes_left()
        nothing = [module.options[0] for module in curves.modules]
        size = left - self._container_bytes(
            every_direction(nothing, [[0] * len(o.heads.energies) for o in nothing])
        )
        if size < 0:
            raise BudgetError(
                f"budget={self.recipe.budget}: what is kept of the former bundle leaves {max(left, 0)} bytes to the "
                f"changed tasks {', '.join(self.changed)}, and {left - size} are needed before their first direction; "
                "give a larger budget or merge afresh, without keep_shared"
            )
        return fit_container(partial(within_budget, curves), size, left, self._container_bytes)

    def _bytes_left(self) -> int:
        """Bytes of the budget that neither the shared file nor the kept tasks' files take."""
        tasks = self.former.manifest.tasks
        files = [self.former.manifest.shared, *(tasks[task].file for task in self.kept)]
        return self._allowed_bytes - sum(file.bytes for file in files)

    @cached_property
    def _allowed_bytes(self) -> int:
        reference = sum(self.former.manifest.tasks[task].bytes for task in self.kept)
        reference += self.assembly.reference_bytes
        return allowed_bytes(self.recipe, reference)

    def _container_bytes(self, choices: Sequence[Choice]) -> int:
        """Bytes of the manifest and of the headers and extras of the changed tasks' files."""
        heads = (choice.kept(len(self.recipe.precisions))[1] for choice in choices)
        return self._frame_bytes + sum(int((row_bytes(counts) - len("null")).sum()) for counts in heads)

    @cached_property
    def _frame_bytes(self) -> int:
        """The same while no module keeps anything of a changed task: its manifest says null there."""
        manifest = self._manifest((), self.assembly.unknown_task_entries())
        return len(manifest.canonical()) + container_bytes(self.assembly.extras)

    def _manifest(self, entries: Iterable[ModuleEntry], fresh: Mapping[str, TaskEntry]) -> Manifest:
        tasks = {task: self.former.manifest.tasks[task] for task in self.kept} | dict(fresh)
        shares = [entry.relative_error**2 for entry in tasks.values()]
        changes = {
            "recipe": self.recipe,
            "solver": SOLVER_VERSION,
            "relative_error": round(math.sqrt(sum(shares) / len(shares)), 8),
            "modules": tuple(self._modules({entry.name: entry for entry in entries})),
            "tasks": tasks,
        }
        return self.former.manifest.model_copy(update=changes)

    def _modules(self, fresh: Mapping[str, ModuleEntry]) -> Iterator[ModuleEntry]:
        """The former entries, with the heads of the new set."""
        for module in self.former.manifest.modules:
            heads = dict(zip(self.former.task_names, module.heads, strict=True))
            heads = {task: heads[task] for task in self.kept}
            if module.name in fresh:
                heads |= zip(self.changed, fresh[module.name].heads, strict=True)
            yield module.model_copy(update={"heads": tuple(heads.get(task) for task in self.adapters)})

    def _build(self, choices: Sequence[Choice]) -> Iterator[StoredModule]:
        """Every module, in order."""
        chosen = dict(zip(self.modules, choices, strict=True))
        bits, dtype = self.former.manifest.precisions, self.former.dtype

        def build(names: Sequence[str]) -> list[StoredModule]:
            problems = [self._load(name, self._weights) for name in names]
            levels = [chosen[name].levels for name in names]
            family = chosen[names[0]].option.solution
            if len(names) == 1:
                stored = [family.build(problems[0], levels[0], bits, dtype)]
            else:
                together = joined_levels([one.heads for one in levels])
                stored = parted(family.build(joined(problems), together, bits, dtype), problems)
            for name, one in zip(names, stored, strict=True):
                check_range(name, dtype, one)
            return stored

        batches = self._batches()
        ready: dict[str, StoredModule] = {}
        left = iter(self.modules)
        following = next(left, None)
        for names, stored in zip(batches, self._each(build, batches, "build the heads"), strict=True):
            ready.update(zip(names, stored, strict=True))
            while following in ready:
                yield ready.pop(following)
                following = next(left, None)

    def _batches(self) -> list[list[str]]:
        """Modules to build at once: those of one shape that share nothing, where they have few numbers."""
        alike: dict[object, list[str]] = {}
        for name in self.modules:
            shares = self.factors[name].entry.family != separate.NAME or name in self.metrics
            alike.setdefault(name if shares or not self._few else self.assembly.shape(name), []).append(name)
        most = max(1, _BATCH_NUMBERS * len(self.modules) // max(self.assembly.numbers, 1))
        return [
            names[start : start + most] for names in alike.values() for start in range(0, len(names), most)
        ]

    @property
    def _few(self) -> bool:
        """Whether modules have so few numbers that calls take longer than what they do."""
        return self.assembly.numbers < _FEW_NUMBERS * len(self.modules)

    def _each(self, function: Callable[[Item], Result], items: Sequence[Item], what: str) -> Iterator[Result]:
        alone = self._few or self.device.type != "cpu"
        return in_order(function, items, what, self.progress, alone=alone)

    def _load(self, name: str, weights: Mapping[str, float]) -> ModuleProblem:
        # A metric belongs to the input side alone: families that share the output side do without.
        metric = None if self.factors[name].entry.family in OUTPUT_SIDE else self.metrics.get(name)
        return load_module(name, self.changed, weights, self.device, metric)

    def _warnings(self, manifest: Manifest) -> tuple[str, ...]:
        usual = self.former.relative_error
        norms, lost = self._per_task(lambda module: module.norms), self._per_task(lambda module: module.lost)
        found = [
            f"task {task!r}: relative error {error:.4f}, against {usual:.4f} over the former bundle; "
            f"{100 * lost[task] / norms[task]:.1f} % of its energy lies outside the shared part that was kept, where "
            "no head reaches: merge afresh, without keep_shared, if that is too much"
            for task in self.changed
            if (error := manifest.tasks[task].relative_error) > max(_FAR_WORSE * usual, _NOTICEABLE)
        ]
        whole = self.recipe.budget in {None, 1}  # 1 keeps every direction, in whatever it takes
        if not whole and manifest.bytes_on_disk > self._allowed_bytes:
            found.append(
                f"the bundle takes {manifest.bytes_on_disk} bytes, more than the {self._allowed_bytes} that "
                f"budget={self.recipe.budget} gives {len(self.adapters)} tasks: its shared part was sized for "
                f"{len(self.former.task_names)}"
            )
        return tuple(found)


def _digests(adapters: Mapping[str, Adapter], former: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 over every adapter's bytes, looked up where that says that the task may be kept."""

    def find(task: str) -> str:
        found = known_digest(adapters[task])
        return found if found == former.get(task) else hashed(adapters[task])

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(zip(adapters, pool.map(find, adapters), strict=True))
