"""What a bundle directory holds, and how its tensors are laid out.

``manifest.json`` (canonical JSON; its SHA-256 is the bundle id), ``shared.safetensors`` with what all tasks
share, ``tasks/<task>.safetensors`` with one task's heads and whole-layer extras. The factors of a file stand one
after the other in a single flat tensor, in the manifest's module order: hundreds of small named tensors would
cost more bytes of header than some heads have.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hydraopt.merging.recipe import Recipe

SCHEMA = 1
MANIFEST_FILE = "manifest.json"
SHARED_FILE = "shared.safetensors"
SHARED_TENSOR = "shared"
FACTORS_TENSOR = "factors"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Part):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)


class BaseModelEntry(_Part):
    """The frozen model the adapters belong to."""

    name: str
    revision: str | None = None


class ModuleEntry(_Part):
    """One linear module: its size, its family and the ranks of its parts.

    ``ranks`` holds one head rank per task in the order of the manifest's sorted task names; -1 where the task does
    not update the module. For the family "shared-a" a head rank equal to ``rank`` is a dense head.
    """

    name: str
    shape: tuple[int, int]  # (d_out, d_in)
    family: str
    rank: int = Field(ge=0, description="Rows of the shared A'.")
    ranks: tuple[int, ...]


class TaskEntry(_Part):
    """One task: which adapter it came from, where its heads are, how close they are."""

    adapter: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the adapter.")
    bytes: int = Field(description="Reference bytes of the adapter: two a number, plus its configuration.")
    file: FileEntry
    relative_error: float = Field(description="|dW - merged| / |dW|, Frobenius, over all modules, as stored.")
    task_type: str | None = None
    fan_in_fan_out: bool = False
    saved_modules: tuple[str, ...] = ()


class Manifest(_Part):
    """Everything but the numbers."""

    schema_version: int
    base_model: BaseModelEntry
    recipe: Recipe
    solver: str
    relative_error: float = Field(
        description="Root of the weighted mean squared relative error over the tasks."
    )
    modules: tuple[ModuleEntry, ...]
    shared: FileEntry
    tasks: dict[str, TaskEntry]

    def canonical(self) -> bytes:
        """The bytes of ``manifest.json``: sorted keys, no spaces, nothing that changes between runs."""
        value = self.model_dump(mode="json", exclude_defaults=True)
        value["recipe"] = self.recipe.model_dump(mode="json", exclude_none=True)
        return canonical_json(value)

    @property
    def id(self) -> str:
        """The bundle id: SHA-256 (hex) of :meth:`canonical`."""
        return hashlib.sha256(self.canonical()).hexdigest()

    @property
    def task_names(self) -> tuple[str, ...]:
        """Task names, sorted."""
        return tuple(sorted(self.tasks))

    @property
    def adapters(self) -> dict[str, str]:
        """Adapter digest by task."""
        return {task: entry.adapter for task, entry in sorted(self.tasks.items())}

    def files(self) -> dict[str, FileEntry]:
        """Every file but the manifest, by its path inside the bundle."""
        files = {SHARED_FILE: self.shared}
        files |= {task_file(task): entry.file for task, entry in sorted(self.tasks.items())}
        return files

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of all files, the manifest included."""
        return len(self.canonical()) + sum(entry.bytes for entry in self.files().values())

    @property
    def storage_ratio(self) -> float:
        """Bytes on disk over the adapters' own, these counted at two bytes a number."""
        return self.bytes_on_disk / sum(entry.bytes for entry in self.tasks.values())


def canonical_json(value: Any) -> bytes:
    """One spelling for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True
    ).encode()


def task_file(task: str) -> str:
    """Path of a task's file inside the bundle."""
    return f"tasks/{task}.safetensors"


def shared_shapes(module: ModuleEntry) -> list[tuple[int, int]]:
    """Shapes of the module's shared parts, in storage order."""
    return [(module.rank, module.shape[1])] if module.family == "shared-a" else []


def head_shapes(module: ModuleEntry, rank: int) -> list[tuple[int, int]]:
    """Shapes of one task's parts of the module, in storage order; none where ``rank`` is -1."""
    d_out, d_in = module.shape
    if rank < 0:
        return []
    if module.family == "separate":
        return [(d_out, rank), (rank, d_in)]
    if rank == module.rank:
        return [(d_out, rank)]
    return [(d_out, rank), (rank, module.rank)]
