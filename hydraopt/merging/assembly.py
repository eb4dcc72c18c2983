"""From stored modules to a bundle: manifest, files, and how many bytes they take before they exist."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.adapters.module import AdapterModule
from hydraopt.bundle.contents import Bundle, BundleContents, container_bytes
from hydraopt.bundle.layout import (
    SCHEMA,
    BaseModelEntry,
    Counts,
    FileEntry,
    Manifest,
    ModuleEntry,
    TaskEntry,
    canonical_json,
    head_sizes,
    shared_blocks,
)
from hydraopt.bundle.scratch import Scratch
from hydraopt.bundle.tensor_bytes import describe
from hydraopt.merging.option import Choice, Ints, StoredModule, ends, trimmed
from hydraopt.precision import Block
from hydraopt.recipe import SOLVER_VERSION, Recipe

_DIGEST_LENGTH = 64
_LONGEST_ERROR = 0.12345678  # errors are rounded to eight digits: none is longer
_LARGEST_FILE = 10**9
_BRACKETS = 2
_UNKNOWN_FILE = FileEntry(sha256="0" * _DIGEST_LENGTH, bytes=_LARGEST_FILE)


@dataclass
class Errors:
    """Squared error and norm of each task, summed over modules."""

    squared: dict[str, float] = field(default_factory=dict)
    norm: dict[str, float] = field(default_factory=dict)

    def add(self, module: StoredModule) -> None:
        """Count another module in."""
        for task, error in module.squared_error.items():
            self.squared[task] = self.squared.get(task, 0.0) + error
            self.norm[task] = self.norm.get(task, 0.0) + module.squared_norm[task]

    def relative(self, task: str) -> float:
        """|dW - merged| / |dW| of one task; 0 for a task that changes nothing."""
        return _rounded(math.sqrt(self._share(task)))

    def mean(self, tasks: Sequence[str]) -> float:
        """Root of the mean squared relative error."""
        return _rounded(math.sqrt(sum(self._share(task) for task in tasks) / len(tasks)))

    def _share(self, task: str) -> float:
        norm = self.norm.get(task, 0.0)
        return max(self.squared[task], 0.0) / norm if norm > 0 else 0.0


def row_bytes(counts: Ints) -> Ints:
    """Bytes of each row of counts, (n, precisions), as a list in JSON: brackets, digits, commas."""
    kept = ends(counts)
    digits = 1 + np.floor(np.log10(np.maximum(counts, 1))).astype(np.int64)
    inside = np.arange(counts.shape[1]) < kept[:, None]
    found: Ints = _BRACKETS + np.where(inside, digits, 0).sum(axis=1) + np.maximum(kept - 1, 0)
    return found


def _rounded(error: float) -> float:
    """Eight digits after the point: finer is rounding noise, and longer would make the manifest's size vary."""
    return round(error, 8)


class Assembly:
    """The bundle of one adapter set under one recipe.

    Args:
        adapters: By sorted task name.
        recipe: How they are merged.
        modules: Sorted names of the modules.
    """

    def __init__(self, adapters: Mapping[str, Adapter], recipe: Recipe, modules: Sequence[str]) -> None:
        self.adapters = adapters
        self.recipe = recipe
        self.modules = modules
        self.tasks = tuple(adapters)
        self.scratch = Scratch(
            one.file.entries[name].size for one in adapters.values() for name in one.extras
        )
        self.extras: dict[str, dict[str, Tensor]] = {
            task: {name: self.scratch.keep(adapter.extra(name)) for name in adapter.extras}  # noqa: S610 - not Django's
            for task, adapter in adapters.items()
        }
        # Bytes of a module's entry beside its counts, by module, family and groups.
        self._constant_bytes: dict[tuple[str, str, tuple[int, ...] | None], int] = {}

    @property
    def reference_bytes(self) -> int:
        """Bytes of the adapters at two bytes a number."""
        return sum(adapter.reference_bytes for adapter in self.adapters.values())

    @property
    def numbers(self) -> int:
        """Numbers in the factors of all adapters."""
        return sum(module.numbers for one in self.adapters.values() for module in one.modules.values())

    @property
    def extra_bytes(self) -> int:
        """Bytes of whole-layer tensors."""
        return sum(tensor.nbytes for tensors in self.extras.values() for tensor in tensors.values())

    def least_container_bytes(self) -> int:
        """The bundle's bytes if it keeps no factor at all."""
        return self._frame_bytes + sum(
            self._entry_bytes(
                self._entry(
                    name, "separate", (), [() if present else None for present in self._has[name]], ()
                )
            )
            for name in self.modules
        )

    def container_bytes(self) -> Callable[[Sequence[Choice]], int]:
        """A function that gives the bundle's bytes without its factors.

        Digests and errors are not known yet, but as long as any. The function remembers what it last saw of every
        module, as solutions of one budget differ in few of them.
        """
        known: dict[str, tuple[Choice, int]] = {}

        def measured(choices: Sequence[Choice]) -> int:
            for name, choice in zip(self.modules, choices, strict=True):
                if name not in known or known[name][0] is not choice:
                    known[name] = choice, self._chosen_bytes(name, choice)
            return self._frame_bytes + sum(length for _, length in known.values())

        return measured

    def storage_ratio(self, choices: Sequence[Choice]) -> float:
        """Of the bundle these choices would make."""
        size = sum(choice.bytes for choice in choices) + self.container_bytes()(choices)
        return size / self.reference_bytes

    def _chosen_bytes(self, name: str, choice: Choice) -> int:
        """Bytes of a module's entry in the manifest: what changes from price to price are its counts."""
        option, has = choice.option, self._has[name]
        shared, heads = (row_bytes(counts) for counts in choice.kept(len(self.recipe.precisions)))
        if option.groups is not None:
            heads = heads[[group for group in option.groups if group >= 0]]
        nulls = len("null") * (len(has) - len(heads))
        lists = (int(shared.sum()), len(shared)), (int(heads.sum()) + nulls, len(has))
        changing = sum(_BRACKETS + content + max(count - 1, 0) for content, count in lists)
        key = name, option.family, option.groups
        if key not in self._constant_bytes:
            self._constant_bytes[key] = self._entry_bytes(self._chosen(name, choice)) - changing
        return self._constant_bytes[key] + changing

    @cached_property
    def _frame_bytes(self) -> int:
        """Bytes of everything that no choice changes: headers, extras, and the manifest without its modules."""
        manifest = self._manifest((), _UNKNOWN_FILE, self.unknown_task_entries(), _LONGEST_ERROR)
        commas = max(len(self.modules) - 1, 0)
        return len(manifest.canonical()) + commas + container_bytes(self.extras)

    @staticmethod
    def _entry_bytes(entry: ModuleEntry) -> int:
        return len(canonical_json(entry.model_dump(mode="json", exclude_defaults=True)))

    def unknown_task_entries(self) -> dict[str, TaskEntry]:
        """Entries as long as any: of files that do not exist yet."""
        digest = "0" * _DIGEST_LENGTH
        return {task: self._task_entry(task, digest, _UNKNOWN_FILE, _LONGEST_ERROR) for task in self.tasks}

    def entries(self, choices: Sequence[Choice]) -> list[ModuleEntry]:
        """The manifest's entry of every module."""
        return [self._chosen(name, choice) for name, choice in zip(self.modules, choices, strict=True)]

    def _chosen(self, name: str, choice: Choice) -> ModuleEntry:
        shared, counts, groups = self._counts(name, choice)
        return self._entry(name, choice.option.family, shared, counts, groups)

    def _counts(
        self, name: str, choice: Choice
    ) -> tuple[tuple[Counts, ...], list[Counts | None], tuple[int, ...]]:
        """How many vectors are kept at each precision, per shared factor and per task; and the tasks' groups."""
        groups, has = choice.option.groups, self._has[name]
        shared, heads = (trimmed(counts) for counts in choice.kept(len(self.recipe.precisions)))
        if groups is None:
            rows = iter(heads)
            return shared, [next(rows) if present else None for present in has], ()
        members = iter(groups)
        own = tuple(next(members) if present else -1 for present in has)
        return shared, [heads[group] if group >= 0 else None for group in own], own

    @cached_property
    def _has(self) -> dict[str, list[bool]]:
        """Which of the adapters update each module."""
        return {name: [name in one.modules for one in self.adapters.values()] for name in self.modules}

    def _entry(
        self,
        name: str,
        family: str,
        shared: tuple[Counts, ...],
        heads: Iterable[Counts | None],
        groups: tuple[int, ...],
    ) -> ModuleEntry:
        return ModuleEntry(
            name=name,
            shape=self.shape(name),
            layer=self._module(name).layer,
            family=family,
            shared=shared,
            heads=tuple(heads),
            groups=groups,
        )

    def shape(self, name: str) -> tuple[int, int]:
        """(d_out, d_in) of a module."""
        module = self._module(name)
        return module.d_out, module.d_in

    def ranks(self, name: str) -> list[int]:
        """Rank of every update of a module."""
        return [adapter.modules[name].rank for adapter in self.adapters.values() if name in adapter.modules]

    def _module(self, name: str) -> AdapterModule:
        return next(adapter.modules[name] for adapter in self.adapters.values() if name in adapter.modules)

    def _task_entry(self, task: str, digest: str, file: FileEntry, error: float) -> TaskEntry:
        adapter = self.adapters[task]
        return TaskEntry(
            adapter=digest,
            bytes=adapter.reference_bytes,
            file=file,
            relative_error=error,
            task_type=adapter.task_type,
            kind=adapter.kind,
            settings=adapter.settings,
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
            precisions=self.recipe.precisions,
            relative_error=error,
            modules=tuple(modules),
            shared=shared,
            tasks=tasks,
        )

    def bundle(
        self, entries: Sequence[ModuleEntry], stored: Iterable[StoredModule], digests: Mapping[str, str]
    ) -> Bundle:
        """Write every module's blocks one after the other, then describe the files.

        Args:
            entries: What the manifest says of each module.
            stored: The modules, in the same order; taken one at a time.
            digests: Of the adapters; asked for last.
        """
        shared, heads, errors, scratch = self.flats(entries, stored)
        contents = BundleContents(shared, heads, self.extras, scratch=(self.scratch, scratch))
        tasks = self.task_entries(contents, errors, digests)
        manifest = self._manifest(entries, describe(contents.encode_shared()), tasks, errors.mean(self.tasks))
        return Bundle(manifest, contents)

    def task_entries(
        self, contents: BundleContents, errors: Errors, digests: Mapping[str, str]
    ) -> dict[str, TaskEntry]:
        """What the manifest says of each task.

        Args:
            contents: Holds the tasks' heads and extras.
            errors: Of the tasks.
            digests: Of the adapters.
        """

        def described(task: str) -> FileEntry:
            entry = describe(contents.encode_task(task))
            contents.let_go(task)
            return entry

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            files = pool.map(described, self.tasks)
            return {
                task: self._task_entry(task, digests[task], file, errors.relative(task))
                for task, file in zip(self.tasks, files, strict=True)
            }

    def flats(
        self, entries: Sequence[ModuleEntry], stored: Iterable[StoredModule]
    ) -> tuple[Tensor, dict[str, Tensor], Errors, Scratch]:
        """The shared part and the tasks' heads as flat tensors of bytes, the tasks' errors, and where the bytes lie."""
        bits = self.recipe.precisions
        common = sum(block.bytes for entry in entries for block in shared_blocks(entry, bits))
        by_module = [head_sizes(entry, bits) for entry in entries]
        sizes = [sum(one[k] for one in by_module) for k in range(len(self.tasks))]
        scratch = Scratch([common, *sizes])
        shared = _Flat(scratch.take(common))
        heads = {task: _Flat(scratch.take(size)) for task, size in zip(self.tasks, sizes, strict=True)}
        errors = Errors(dict.fromkeys(self.tasks, 0.0), dict.fromkeys(self.tasks, 0.0))
        for module in stored:
            shared.append(module.shared)
            for task, blocks in module.heads.items():
                heads[task].append(blocks)
            errors.add(module)
            scratch.let_go()
        return shared.whole(), {task: flat.whole() for task, flat in heads.items()}, errors, scratch


class _Flat:
    """Bytes written one block after the other into room whose size is known beforehand."""

    def __init__(self, room: Tensor) -> None:
        self._room = room
        self._flat = room.numpy()
        self._filled = 0

    def append(self, blocks: Iterable[Block]) -> None:
        """Write some more."""
        parts = [block.reshape(-1) for block in blocks]
        if parts:
            end = self._filled + sum(part.size for part in parts)
            np.concatenate(parts, out=self._flat[self._filled : end])
            self._filled = end

    def whole(self) -> Tensor:
        """All of it.

        Raises:
            RuntimeError: If it is not full: the layout and the families disagree.
        """
        if self._filled != self._flat.size:
            raise RuntimeError(
                f"the layout calls for {self._flat.size} bytes, but {self._filled} were written"
            )
        return self._room
