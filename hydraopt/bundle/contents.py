"""A merged set in memory: its manifest and its numbers; saved, loaded, verified."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import safetensors.torch
import torch
from pydantic import ValidationError
from torch import Tensor

from hydraopt.adapters.tensor_file import TensorFile
from hydraopt.bundle.layout import (
    FACTORS_TENSOR,
    MANIFEST_FILE,
    SCHEMA,
    SHARED_FILE,
    SHARED_TENSOR,
    FileEntry,
    Manifest,
    ModuleEntry,
    head_shapes,
    shared_shapes,
    task_file,
)
from hydraopt.errors import BundleError, HydraoptError
from hydraopt.names import check_task_name

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

_MAX_MANIFEST_BYTES = 100_000_000
_DIGITS_SLACK = 24  # a header gives the length and offsets of the factors in decimal


@dataclass(frozen=True)
class BundleContents:
    """The numbers of a bundle.

    ``shared`` and each of ``heads`` are flat tensors in the stored dtype; ``extras`` are whole-layer tensors by
    their name in the adapter.
    """

    shared: Tensor
    heads: dict[str, Tensor]
    extras: dict[str, dict[str, Tensor]]

    def encode_shared(self) -> bytes:
        """The bytes of ``shared.safetensors``."""
        data: bytes = safetensors.torch.save({SHARED_TENSOR: self.shared})
        return data

    def encode_task(self, task: str) -> bytes:
        """The bytes of one task's file."""
        data: bytes = safetensors.torch.save({FACTORS_TENSOR: self.heads[task], **self.extras[task]})
        return data


def describe(data: bytes) -> FileEntry:
    """Digest and length of a file's bytes."""
    return FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))


def container_bytes(extras: Mapping[str, Mapping[str, Tensor]]) -> int:
    """An upper bound of the bytes of all tensor files without their factors."""
    empty = torch.empty(0, dtype=torch.bfloat16)
    files = [{SHARED_TENSOR: empty}] + [{FACTORS_TENSOR: empty, **tensors} for tensors in extras.values()]
    return sum(len(safetensors.torch.save(dict(tensors))) + _DIGITS_SLACK for tensors in files)


class Bundle:
    """A merged set of adapters: one shared part, one head per task, whole-layer extras.

    Made by :func:`hydraopt.merge` or :meth:`load`.
    """

    def __init__(self, manifest: Manifest, contents: BundleContents) -> None:
        self.manifest = manifest
        self.contents = contents

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

    def factors(self, task: str) -> dict[str, tuple[Tensor, ...]]:
        """What the bundle stores of one task, per module.

        Returns:
            For family "separate" and dense heads ``(up, down)``, for low-rank heads ``(up, inner, shared)``: their
            product, left to right, is the task's update (d_out, d_in) of the module. Views in the stored dtype;
            ``shared`` is one tensor for all tasks. Modules the task does not update are left out.

        Raises:
            BundleError: If there is no such task.
        """
        index = self._index(task)
        shared = _split(self.contents.shared, [shared_shapes(module) for module in self.manifest.modules])
        heads = _split(
            self.contents.heads[task],
            [head_shapes(module, module.ranks[index]) for module in self.manifest.modules],
        )
        return {
            module.name: (*head, *common)
            for module, head, common in zip(self.manifest.modules, heads, shared, strict=True)
            if head
        }

    def shared_rows(self) -> dict[str, Tensor]:
        """A' (q, d_in) of every module that has one: the tensor all its heads multiply. Views, stored dtype."""
        shared = _split(self.contents.shared, [shared_shapes(module) for module in self.manifest.modules])
        return {
            module.name: rows[0] for module, rows in zip(self.manifest.modules, shared, strict=True) if rows
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
            BundleError: If ``path`` exists and is not a bundle or an empty folder.
        """
        path = Path(path)
        if (
            path.exists()
            and not (path / MANIFEST_FILE).is_file()
            and (not path.is_dir() or any(path.iterdir()))
        ):
            raise BundleError(f"{path}: exists and is not a bundle; choose another place")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as temporary:
            fresh = Path(temporary) / "new"
            (fresh / "tasks").mkdir(parents=True)
            _write(fresh / SHARED_FILE, self.contents.encode_shared())
            for task in self.task_names:
                _write(fresh / task_file(task), self.contents.encode_task(task))
            _write(fresh / MANIFEST_FILE, self.manifest.canonical())
            if path.exists():  # a folder cannot replace a non-empty one: move the old one aside first
                path.rename(Path(temporary) / "old")
            fresh.rename(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a bundle directory, checking every digest on the way.

        Raises:
            BundleError: If it is missing, damaged, tampered with or written by a newer version.
        """
        path = Path(path)
        manifest = read_manifest(path)
        shared = _read_file(path, SHARED_FILE, manifest.shared)
        heads: dict[str, Tensor] = {}
        extras: dict[str, dict[str, Tensor]] = {}
        for task, entry in sorted(manifest.tasks.items()):
            tensors = _read_file(path, task_file(task), entry.file)
            heads[task] = _take(tensors, FACTORS_TENSOR, path / task_file(task))
            extras[task] = tensors
        contents = BundleContents(_take(shared, SHARED_TENSOR, path / SHARED_FILE), heads, extras)
        _check_sizes(path, manifest, contents)
        return cls(manifest, contents)

    def attach(self, base_model: PreTrainedModel) -> PeftModel:
        """The base model with one PEFT adapter per task; see :func:`hydraopt.bundle.attach.attach`."""
        from hydraopt.bundle.attach import attach  # noqa: PLC0415 - PEFT takes seconds to import

        return attach(self, base_model)

    def export(self, out: str | Path, task: str | None = None, profile: str = "peft") -> dict[str, Path]:
        """Write ordinary PEFT folders; see :func:`hydraopt.bundle.export.export`."""
        from hydraopt.bundle.export import export  # noqa: PLC0415 - imports this module

        return export(self, Path(out), task=task, profile=profile)


def verify(path: str | Path) -> Manifest:
    """Check a bundle directory: digests, shapes, finite values, no file too many.

    Raises:
        BundleError: Naming the first thing that is wrong.
    """
    path = Path(path)
    bundle = Bundle.load(path)
    tensors = {SHARED_FILE: bundle.contents.shared}
    for task in bundle.task_names:
        tensors[task_file(task)] = bundle.contents.heads[task]
        tensors |= {
            f"{task_file(task)}:{name}": extra for name, extra in bundle.contents.extras[task].items()
        }
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BundleError(f"{path}: {name} holds NaN or infinite values")
    known = {MANIFEST_FILE, *bundle.manifest.files()}
    found = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
    if stray := sorted(found - known):
        raise BundleError(f"{path}: {stray[0]!r} is not listed in the manifest; a bundle holds nothing else")
    return bundle.manifest


def read_manifest(path: Path) -> Manifest:
    """Read and check ``manifest.json`` alone.

    Raises:
        BundleError: If it is missing, not canonical, contradicts itself, or was written by a newer version.
    """
    file = path / MANIFEST_FILE
    if not file.is_file():
        raise BundleError(f"{path}: not a bundle: {MANIFEST_FILE} is missing")
    if file.stat().st_size > _MAX_MANIFEST_BYTES:
        raise BundleError(f"{file}: {file.stat().st_size} bytes is no manifest")
    return parse_manifest(file.read_bytes(), str(file))


def parse_manifest(data: bytes, where: str) -> Manifest:
    """A manifest from its bytes; ``where`` is named in errors.

    Raises:
        BundleError: As for :func:`read_manifest`.
    """
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as reason:
        first = reason.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise BundleError(
            f"{where}: not a manifest this version can read: {place}: {first['msg']}"
        ) from reason
    if manifest.schema_version != SCHEMA:
        raise BundleError(
            f"{where}: schema {manifest.schema_version}; this version reads {SCHEMA}. Update hydraopt."
        )
    for task in manifest.tasks:
        _checked_name(task, where)
    if manifest.canonical() != data:
        raise BundleError(
            f"{where}: the bytes are not the canonical form hydraopt writes; the file was changed"
        )
    for module in manifest.modules:
        _check_module(where, module, len(manifest.tasks))
    return manifest


def _checked_name(task: str, where: str) -> None:
    try:
        check_task_name(task)
    except HydraoptError as reason:
        raise BundleError(f"{where}: {reason}") from reason


def _check_module(where: str, module: ModuleEntry, tasks: int) -> None:
    if module.family not in {"shared-a", "separate"}:
        raise BundleError(
            f"{where}: module {module.name!r} has the unknown family {module.family!r}. Update hydraopt."
        )
    if len(module.ranks) != tasks or min(module.ranks, default=0) < -1 or min(module.shape) < 1:
        raise BundleError(
            f"{where}: module {module.name!r} has shape {module.shape} and ranks {module.ranks} for {tasks} tasks"
        )


def _read_file(path: Path, name: str, entry: FileEntry) -> dict[str, Tensor]:
    file = path / name
    if not file.is_file():
        raise BundleError(f"{path}: {name} is missing")
    with file.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if digest != entry.sha256:
        raise BundleError(
            f"{file}: SHA-256 is {digest}, but the manifest says {entry.sha256}; fetch the bundle again"
        )
    tensors = TensorFile(file, BundleError)
    return {name: tensors.read(name) for name in tensors.entries}


def _take(tensors: dict[str, Tensor], name: str, file: Path) -> Tensor:
    if name not in tensors:
        raise BundleError(f"{file}: tensor {name!r} is missing")
    return tensors.pop(name)


def _check_sizes(path: Path, manifest: Manifest, contents: BundleContents) -> None:
    dtype = getattr(torch, manifest.recipe.dtype)
    shared = [shape for module in manifest.modules for shape in shared_shapes(module)]
    wanted = {SHARED_FILE: (contents.shared, shared)}
    for index, task in enumerate(manifest.task_names):
        shapes = [shape for module in manifest.modules for shape in head_shapes(module, module.ranks[index])]
        wanted[task_file(task)] = (contents.heads[task], shapes)
    for name, (tensor, shapes) in wanted.items():
        numbers = sum(rows * columns for rows, columns in shapes)
        if tensor.shape != (numbers,) or tensor.dtype != dtype:
            raise BundleError(
                f"{path}: {name} holds {tensor.dtype} of shape {list(tensor.shape)}, but the manifest calls for "
                f"{numbers} numbers of {dtype}"
            )


def _split(flat: Tensor, shapes: list[list[tuple[int, int]]]) -> list[list[Tensor]]:
    parts: list[list[Tensor]] = []
    start = 0
    for group in shapes:
        parts.append([])
        for rows, columns in group:
            parts[-1].append(flat[start : start + rows * columns].view(rows, columns))
            start += rows * columns
    return parts


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write a folder of small files whole or not at all, replacing a former one of the same file names.

    Raises:
        BundleError: If ``folder`` holds anything else.
    """
    if folder.exists() and (not folder.is_dir() or {path.name for path in folder.iterdir()} - set(files)):
        raise BundleError(f"{folder}: exists and holds something else; choose another place")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        for name, data in files.items():
            _write(fresh / name, data)
        if folder.exists():
            shutil.move(folder, Path(temporary) / "old")
        fresh.rename(folder)
    return folder


__all__ = [
    "Bundle",
    "BundleContents",
    "container_bytes",
    "describe",
    "parse_manifest",
    "read_manifest",
    "verify",
    "write_folder",
]
