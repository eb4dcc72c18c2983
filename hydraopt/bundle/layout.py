"""What a bundle directory holds, and how its tensors are laid out.

``manifest.json`` (canonical JSON; its SHA-256 is the bundle id), ``shared.safetensors`` with what all tasks
share, ``tasks/<task>.safetensors`` with one task's heads and whole-layer extras. The factors of a file stand one
after the other in a single flat tensor of bytes, in the manifest's module order: hundreds of small named tensors
would cost more bytes of header than some heads have. A factor is a stack of vectors along its long side, the most
important first; how many of them are kept at which precision stands in the manifest as *counts*.

====================  ======================================  ===========================================
family                shared by all tasks                     per task, p directions
====================  ======================================  ===========================================
``separate``          nothing                                 ``U`` (p, d_out), ``V`` (p, d_in)
``shared-a``          ``A'`` (q, d_in)                        ``U`` (p, d_out), ``C`` (p, q)
``shared-b``          ``B'`` (q, d_out)                       ``V`` (p, d_in), ``C`` (p, q)
``two-sided``         ``A'`` (q, d_in), ``B'`` (q', d_out)    ``X`` (p, q'), ``Y`` (p, q)
``dense-heads``       ``A'`` (q, d_in), with ``groups`` also  ``H`` (q, d_out), one for a group of tasks
                      the heads of all groups
====================  ======================================  ===========================================

An update is ``U^T V``, ``U^T C A'``, ``B'^T C^T V``, ``B'^T X^T Y A'`` or ``H^T A'``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from operator import mul
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from hydraopt.precision import core_bits, vector_bytes
from hydraopt.recipe import Recipe

SCHEMA = 2
MANIFEST_FILE = "manifest.json"
SHARED_FILE = "shared.safetensors"
SHARED_TENSOR = "shared"
FACTORS_TENSOR = "factors"
FAMILIES = ("separate", "shared-a", "shared-b", "two-sided", "dense-heads")


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


Counts = tuple[int, ...]
"""How many vectors at each of the manifest's precisions, finest first; zeros at the end are left out."""


class ModuleEntry(_Part):
    """One linear module: its size, its family and how many vectors of each part are kept, at which precision."""

    name: str
    shape: tuple[int, int]  # (d_out, d_in)
    layer: str = "linear"
    family: str
    shared: tuple[Counts, ...] = Field((), description="Counts of A' and B', as the family has them.")
    heads: tuple[Counts | None, ...] = Field(
        description="Per sorted task: counts of its directions; None where it leaves the module alone. "
        "For dense heads a single one stands at the precision of the whole head."
    )
    groups: tuple[int, ...] = Field(
        (), description="Group of each task, -1 for none, where tasks share heads."
    )


class TaskEntry(_Part):
    """One task: which adapter it came from, where its heads are, how close they are."""

    adapter: str = Field(pattern=r"^[0-9a-f]{64}$", description="Digest of the adapter.")
    bytes: int = Field(description="Reference bytes of the adapter: two a number, plus its configuration.")
    file: FileEntry
    relative_error: float = Field(description="|dW - merged| / |dW|, Frobenius, over all modules, as stored.")
    task_type: str | None = None
    kind: str = Field("LORA", description="PEFT's name of the adapter's kind.")
    settings: dict[str, bool | int | float | str] = Field(
        default_factory=dict, description="What writing the adapter back needs beside its numbers."
    )
    saved_modules: tuple[str, ...] = ()


class Manifest(_Part):
    """Everything but the numbers."""

    schema_version: int
    base_model: BaseModelEntry
    recipe: Recipe
    solver: str
    precisions: tuple[int, ...] = Field(description="Bits per number that counts refer to, finest first.")
    relative_error: float = Field(
        description="Root of the mean squared relative error over the tasks, each counted once."
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


@dataclass(frozen=True)
class Block:
    """A stack of stored vectors of one length, by precision."""

    length: int
    counts: tuple[tuple[int, int], ...]  # (vectors, bits), finest first

    @property
    def vectors(self) -> int:
        """How many vectors."""
        return sum(count for count, _ in self.counts)

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return sum(count * vector_bytes(self.length, bits) for count, bits in self.counts)


def shared_blocks(module: ModuleEntry, precisions: Sequence[int]) -> list[Block]:
    """What the module stores for all tasks, in storage order."""
    d_out, d_in = module.shape
    lengths = {"shared-b": (d_out,), "separate": ()}.get(module.family, (d_in, d_out))
    blocks = [
        _block(length, counts, precisions) for length, counts in zip(lengths, module.shared, strict=False)
    ]
    if module.groups:
        for group in range(max(module.groups) + 1):
            blocks += _dense_head(module, module.heads[module.groups.index(group)], precisions)
    return blocks


def head_blocks(module: ModuleEntry, counts: Counts | None, precisions: Sequence[int]) -> list[Block]:
    """What the module stores in the file of a task with these counts, in storage order."""
    if counts is None or module.groups:
        return []
    if module.family == "dense-heads":
        return _dense_head(module, counts, precisions)
    long, short = _head_lengths(module)
    blocks = [_block(length, counts, precisions) for length in long]
    return blocks + [_block(length, counts, [core_bits(bits) for bits in precisions]) for length in short]


def head_sizes(module: ModuleEntry, precisions: Sequence[int]) -> list[int]:
    """Bytes the module stores in the file of each task: those of its :func:`head_blocks`."""
    if module.family == "dense-heads" or module.groups:
        return [
            sum(block.bytes for block in head_blocks(module, counts, precisions)) for counts in module.heads
        ]
    long, short = _head_lengths(module)
    widths = [
        sum(vector_bytes(length, bits) for length in long)
        + sum(vector_bytes(length, core_bits(bits)) for length in short)
        for bits in precisions
    ]
    return [sum(map(mul, counts or (), widths)) for counts in module.heads]


def _head_lengths(module: ModuleEntry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths of the vectors of a direction: those at its own precision, and those of small factors."""
    d_out, d_in = module.shape
    shared = tuple(sum(part) for part in module.shared)
    return {
        "separate": ((d_out, d_in), ()),
        "shared-a": ((d_out,), shared),
        "shared-b": ((d_in,), shared),
        "two-sided": (shared[1:], shared[:1]),
    }[module.family]


def _block(length: int, counts: Counts, precisions: Sequence[int]) -> Block:
    kept = tuple((count, bits) for count, bits in zip(counts, precisions, strict=False) if count)
    return Block(length, kept)


def _dense_head(module: ModuleEntry, counts: Counts | None, precisions: Sequence[int]) -> list[Block]:
    rank = sum(module.shared[0])
    if counts is None or not any(counts):
        return [Block(module.shape[0], ())]
    return [Block(module.shape[0], ((rank, precisions[counts.index(1)]),))]
