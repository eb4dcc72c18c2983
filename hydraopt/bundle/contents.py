"""A merged set in memory: its manifest and its numbers; saved, loaded, verified."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from hydraopt.bundle.chains import chain_of, links_of
from hydraopt.bundle.layout import (
    FACTORS_TENSOR,
    MANIFEST_FILE,
    SHARED_FILE,
    SHARED_TENSOR,
    Manifest,
    ModuleEntry,
    head_blocks,
    head_sizes,
    shared_blocks,
    task_file,
)
from hydraopt.bundle.manifest_file import check_outside, find_manifest, read_manifest, stray_files
from hydraopt.bundle.saved_file import SavedFile, find_saved, read_saved
from hydraopt.bundle.scratch import Scratch
from hydraopt.bundle.stored_rows import Link, Reader, StoredRows
from hydraopt.bundle.tensor_bytes import encode
from hydraopt.errors import BundleError
from hydraopt.finite import all_finite
from hydraopt.whole_folder import in_place_of, is_vacant, write_file

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_WRITERS = 4
_DIGITS_SLACK = 24  # a header gives the length and offsets of the factors in decimal


@dataclass(frozen=True)
class BundleContents:
    """The numbers of a bundle.

    ``shared`` and each of ``heads`` are flat tensors of bytes, see :mod:`hydraopt.bundle.layout`; ``extras`` are
    whole-layer tensors by their name in the adapter. ``kept`` are the files, by their path inside a bundle, that
    already hold some of it byte for byte. ``scratch`` is where all of it lies, unless that is plain memory.
    """

    shared: Tensor
    heads: dict[str, Tensor]
    extras: dict[str, dict[str, Tensor]]
    kept: Mapping[str, SavedFile] = field(default_factory=dict)
    scratch: tuple[Scratch, ...] = ()

    def encode_shared(self) -> list[memoryview]:
        """The bytes of ``shared.safetensors``, in parts."""
        return encode({SHARED_TENSOR: self.shared})

    def encode_task(self, task: str) -> list[memoryview]:
        """The bytes of one task's file, in parts."""
        return encode({FACTORS_TENSOR: self.heads[task], **self.extras[task]})

    def let_go(self, task: str | None) -> None:
        """Leave the bytes of a task's file, or of the shared one, to the system where they lie in a scratch file."""
        tensors = [self.shared] if task is None else [self.heads[task], *self.extras[task].values()]
        for scratch in self.scratch:
            for tensor in tensors:
                scratch.let_go(tensor)

    def write(self, folder: Path) -> None:
        """Write every file into a bundle's empty folder, and wait for the disk."""
        (folder / "tasks").mkdir(parents=True)

        def write(name: str, task: str | None) -> None:
            kept = self.kept.get(name)
            if kept is None or not kept.link(folder / name):
                parts = self.encode_shared() if task is None else self.encode_task(task)
                write_file(folder / name, *parts)
                self.let_go(task)

        with ThreadPoolExecutor(_WRITERS) as pool:  # while one waits for the disk another one copies
            jobs = [pool.submit(write, task_file(task), task) for task in self.heads]
            jobs.append(pool.submit(write, SHARED_FILE, None))
            for job in jobs:
                job.result()


def container_bytes(extras: Mapping[str, Mapping[str, Tensor]]) -> int:
    """An upper bound of the bytes of all tensor files without their factors."""
    empty = torch.empty(0, dtype=torch.uint8)
    files = [{SHARED_TENSOR: empty}] + [{FACTORS_TENSOR: empty, **tensors} for tensors in extras.values()]
    return sum(sum(part.nbytes for part in encode(tensors)) + _DIGITS_SLACK for tensors in files)


class Bundle:
    """A merged set of adapters: one shared part, one head per task, whole-layer extras.

    Made by :func:`hydraopt.merge` or :meth:`load`. ``warnings`` is what the merge has to say about the result, for
    people; it is not stored.
    """

    def __init__(self, manifest: Manifest, contents: BundleContents, warnings: tuple[str, ...] = ()) -> None:
        self.manifest = manifest
        self.contents = contents
        self.warnings = warnings
        self.files: Mapping[str, SavedFile] = {}  # what it was loaded from, by path inside the bundle

    def __repr__(self) -> str:
        return f"Bundle({self.id[:12]}, {len(self.task_names)} tasks, storage_ratio={self.storage_ratio:.4f})"

    @property
    def id(self) -> str:
        """SHA-256 (hex) of the manifest: the same adapters and recipe on the same machine give the same id."""
        return self.manifest.id

    @property
    def task_names(self) -> tuple[str, ...]:
        """Task names, sorted."""
        return self.manifest.task_names

    @property
    def storage_ratio(self) -> float:
        """Bytes of the bundle's files over the adapters' bytes counted at two bytes a number."""
        return self.manifest.storage_ratio

    @property
    def relative_error(self) -> float:
        """Root mean square over the tasks of |dW - merged| / |dW|."""
        return self.manifest.relative_error

    @property
    def dtype(self) -> torch.dtype:
        """Float dtype of what is stored in 16 or 32 bits, and of exports."""
        dtype: torch.dtype = getattr(torch, self.manifest.recipe.dtype)
        return dtype

    def factors(
        self, task: str, read_shared: Callable[[StoredRows], Tensor] = StoredRows.read
    ) -> dict[str, tuple[Tensor, ...]]:
        """What the bundle stores of one task, per module, read back from its stored precision.

        Args:
            task: Its name.
            read_shared: Reads what tasks share; :func:`hydraopt.bundle.stored_rows.read_once` for many tasks in turn.

        Returns:
            Two or three matrices whose product, left to right, is the task's update (d_out, d_in) of the module. Parts
            kept in 16 or 32 bits come in :attr:`dtype`, parts kept in fewer bits in float32. Modules the task does
            not update are left out.

        Raises:
            BundleError: If there is no such task.
        """
        chains = {}
        for module, own, common in self._stored(task):
            counts = module.heads[self._index(task)]
            if counts is not None:
                read_own = (
                    read_shared if module.groups else StoredRows.read
                )  # of a group: in the shared file, too
                chains[module.name] = chain_of(
                    module, counts, [read_own(one) for one in own], [read_shared(one) for one in common]
                )
        return chains

    def links(self, task: str) -> dict[str, tuple[Link, ...]]:
        """What the bundle stores of one task, per module, in the order an input meets it and not read yet.

        Shared factors of one module are the same object in the links of every task. Modules the task does not update,
        or keeps nothing of, are left out.

        Raises:
            BundleError: If there is no such task.
        """
        found = {}
        for module, own, common in self._stored(task):
            if any(module.heads[self._index(task)] or ()):
                found[module.name] = links_of(module.family, own, common)
        return found

    def _stored(self, task: str) -> Iterator[tuple[ModuleEntry, list[StoredRows], list[StoredRows]]]:
        """Per module the task's own parts and the shared ones that it uses."""
        index = self._index(task)
        heads = Reader(self.contents.heads[task], self.dtype)
        for module, common in self._shared_parts:
            own = heads.take(head_blocks(module, module.heads[index], self.manifest.precisions))
            if module.groups and module.groups[index] >= 0:
                yield module, common[1 + module.groups[index] :][:1], common[:1]
            else:
                yield module, own, common

    @cached_property
    def _shared_parts(self) -> list[tuple[ModuleEntry, list[StoredRows]]]:
        shared = Reader(self.contents.shared, self.dtype)
        bits = self.manifest.precisions
        return [(module, shared.take(shared_blocks(module, bits))) for module in self.manifest.modules]

    def modules_of(self, tasks: Iterable[str]) -> list[ModuleEntry]:
        """The modules that at least one of some tasks updates.

        Raises:
            BundleError: If there is no such task.
        """
        indices = [self._index(task) for task in tasks]
        return [
            module
            for module in self.manifest.modules
            if any(module.heads[index] is not None for index in indices)
        ]

    def shared_bytes(self) -> dict[str, Tensor]:
        """What all tasks share, per module, as bytes: views of the shared file's flat tensor."""
        parts, start = {}, 0
        for module in self.manifest.modules:
            end = start + sum(block.bytes for block in shared_blocks(module, self.manifest.precisions))
            parts[module.name] = self.contents.shared[start:end]
            start = end
        return parts

    def shared_rows(self) -> dict[str, Tensor]:
        """A' (q, d_in) of every module that has one, as read back: the last factor of every task's update."""
        return {
            module.name: common[0].read()
            for module, common in self._shared_parts
            if common and module.family != "shared-b"
        }

    def extras(self, task: str) -> dict[str, Tensor]:
        """Whole-layer tensors of one task by their PEFT names, exactly as its adapter had them."""
        self._index(task)
        return self.contents.extras[task]

    def _index(self, task: str) -> int:
        if task not in self.manifest.tasks:
            raise BundleError(f"the bundle has no task {task!r}; it has {', '.join(self.task_names)}")
        return self.task_names.index(task)

    def save(self, path: str | Path) -> Path:
        """Write the bundle directory, whole or not at all.

        Raises:
            BundleError: If ``path`` exists and is not a bundle or an empty folder, holds anything that is no part of
                its bundle, or lies within another one.
        """
        path = Path(path)
        check_replaceable(path)
        with in_place_of(path) as fresh:
            self.contents.write(fresh)
            write_file(fresh / MANIFEST_FILE, self.manifest.canonical())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a bundle directory, checking every digest on the way.

        Raises:
            BundleError: If it is missing, damaged, tampered with or written by a newer version.
        """
        path = Path(path)
        manifest = read_manifest(path)
        entries = manifest.files()
        found = {name: find_saved(path, name, entry) for name, entry in entries.items()}
        scratch = Scratch(entry.bytes for entry in entries.values())
        room = {name: scratch.take(entry.bytes) for name, entry in entries.items()}

        def read_one(name: str) -> tuple[dict[str, Tensor], SavedFile]:
            tensors_and_file = read_saved(found[name], entries[name], room[name])
            scratch.let_go(room[name])
            return tensors_and_file

        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            read = dict(zip(entries, pool.map(read_one, entries), strict=True))
        tensors = {name: found for name, (found, _) in read.items()}
        files = {task: task_file(task) for task in manifest.task_names}
        contents = BundleContents(
            _take(tensors[SHARED_FILE], SHARED_TENSOR, path / SHARED_FILE),
            {task: _take(tensors[name], FACTORS_TENSOR, path / name) for task, name in files.items()},
            {task: tensors[name] for task, name in files.items()},
            scratch=(scratch,),
        )
        _check_sizes(path, manifest, contents)
        bundle = cls(manifest, contents)
        bundle.files = {name: file for name, (_, file) in read.items()}
        return bundle

    def attach(
        self,
        base_model: PreTrainedModel,
        *,
        tasks: Iterable[str] | Mapping[str, str] | None = None,
        packed: bool = False,
    ) -> PeftModel:
        """The base model with one PEFT adapter per task; see :func:`hydraopt.bundle.attach.attach`."""
        from hydraopt.bundle.attach import attach  # noqa: PLC0415 - PEFT takes seconds to import

        return attach(self, base_model, tasks=tasks, packed=packed)

    def export(self, out: str | Path, task: str | None = None, profile: str = "peft") -> dict[str, Path]:
        """Write ordinary PEFT folders; see :func:`hydraopt.bundle.export.export`."""
        from hydraopt.bundle.export import export  # noqa: PLC0415 - imports this module

        return export(self, Path(out), task=task, profile=profile)


def verify(path: str | Path) -> Manifest:
    """Check a bundle directory: digests, shapes, finite values, no file too many, no link that leads out of it.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    path = Path(path)
    bundle = Bundle.load(path)
    for name, is_finite in _finite_parts(bundle):
        if not is_finite:
            raise BundleError(f"{path}: {name} holds NaN or infinite values")
    if stray := stray_files(path, bundle.manifest):
        raise BundleError(f"{path}: {stray[0]!r} is not listed in the manifest; a bundle holds nothing else")
    return bundle.manifest


def check_replaceable(path: Path) -> None:
    """Refuse to write a bundle over anything else, or where nothing can be written.

    Raises:
        BundleError: As for :meth:`Bundle.save`.
    """
    check_outside(path)
    place = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise BundleError(f"{path}: nothing can be written in {place}; choose another place")
    if path.is_symlink() and not path.exists():
        raise BundleError(f"{path}: is a link that leads nowhere; remove it, or choose another place")
    if path.exists() and path.samefile("."):
        raise BundleError(f"{path}: is the folder you are in, which cannot be replaced; name one in it")
    if is_vacant(path):
        return
    manifest = find_manifest(path)
    if manifest is None:
        raise BundleError(f"{path}: exists and is not a bundle; choose another place")
    if stray := stray_files(path, manifest):
        raise BundleError(
            f"{path}: would be replaced, but {stray[0]!r} in it is no part of the bundle; move it, or choose "
            "another place"
        )


def _finite_parts(bundle: Bundle) -> Iterator[tuple[str, bool]]:
    """Of everything the bundle stores the file it is in, and whether it reads back as finite numbers."""
    bits = bundle.manifest.precisions
    shared = Reader(bundle.contents.shared, bundle.dtype)
    for module in bundle.manifest.modules:
        for part in shared.take(shared_blocks(module, bits)):
            yield f"{SHARED_FILE} (module {module.name!r})", part.is_finite()
    for index, task in enumerate(bundle.task_names):
        heads = Reader(bundle.contents.heads[task], bundle.dtype)
        for module in bundle.manifest.modules:
            for part in heads.take(head_blocks(module, module.heads[index], bits)):
                yield f"{task_file(task)} (module {module.name!r})", part.is_finite()
        for name, extra in bundle.contents.extras[task].items():
            if extra.is_floating_point():
                yield f"{task_file(task)}:{name}", all_finite(extra)
        bundle.contents.let_go(task)


def _take(tensors: dict[str, Tensor], name: str, file: Path) -> Tensor:
    if name not in tensors:
        raise BundleError(f"{file}: tensor {name!r} is missing")
    return tensors.pop(name)


def _check_sizes(path: Path, manifest: Manifest, contents: BundleContents) -> None:
    bits = manifest.precisions
    shared = sum(block.bytes for module in manifest.modules for block in shared_blocks(module, bits))
    heads = [head_sizes(module, bits) for module in manifest.modules]
    wanted = {SHARED_FILE: (contents.shared, shared)}
    for index, task in enumerate(manifest.task_names):
        wanted[task_file(task)] = (contents.heads[task], sum(sizes[index] for sizes in heads))
    for name, (tensor, length) in wanted.items():
        if tensor.shape != (length,) or tensor.dtype != torch.uint8:
            raise BundleError(
                f"{path}: {name} holds {tensor.dtype} of shape {list(tensor.shape)}, but the manifest calls for "
                f"{length} bytes"
            )
