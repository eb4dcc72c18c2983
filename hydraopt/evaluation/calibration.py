"""Second moments of the adapted modules' inputs, collected by running the base model over the tasks' training rows.

The merge then minimises ``|(dW - merged) C^(1/2)|``, the error of what a module gives out for inputs like these, and
not ``|dW - merged|``. Rows of equal length go through the model together, so that nothing is padded and every token
counts. A forward hook on each module adds up ``x x^T``; as many modules are watched in one pass over the rows as fit
:data:`PASS_BYTES`, then their moments go to a file.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from hydraopt.adapters import Adapter
from hydraopt.base_models import (
    TaskType,
    linear_shapes,
    load_base,
    quiet,
)
from hydraopt.devices import find_device
from hydraopt.errors import TaskFileError
from hydraopt.evaluation.encoding import encoded_rows
from hydraopt.evaluation.evaluate import check_base
from hydraopt.evaluation.rows import Row, rows_digest
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.merging.second_moments import SecondMoments, regularised
from hydraopt.progress import Progress

ROWS = 64
"""Rows of each task, unless asked otherwise."""

PASS_BYTES = 1 << 30
"""Moments held in memory at once."""

_BATCH_TOKENS = 1024  # a language model gives out a number per token and word of its vocabulary
_VERSION = "3"  # raised whenever the same rows would give other moments

Batches = list[dict[str, Tensor]]


@contextmanager
def second_moments(
    tasks: Sequence[TaskFile],
    adapters: Mapping[str, Adapter],
    *,
    rows: int = ROWS,
    device: str = "auto",
    progress: Progress | None = None,
) -> Iterator[SecondMoments]:
    """The regularised second moments of all linear modules that an adapter updates, pooled over the tasks.

    Every token weighs the same, whichever task it is from. Modules without a linear input (embedding tables, virtual
    tokens, VeRA's vectors) and modules that no row reaches have none: for them the plain norm holds. The files lie in a
    temporary folder until the context ends.

    Args:
        tasks: At least one; their training rows are used.
        adapters: What will be merged.
        rows: Rows of each task, spread evenly over all.
        device: Where the base model runs: "auto", "cpu" or "cuda".
        progress: Called after every pass.

    Raises:
        TaskFileError: If a task has no usable training rows, is for another base model than an adapter, or the base
            model cannot be loaded or lacks an adapted module.
    """
    if not tasks or rows < 1:
        raise TaskFileError(
            f"calibration needs at least one task and one row of each, got {len(tasks)} and {rows}"
        )
    for task in tasks:
        for name, adapter in adapters.items():
            check_base(task, adapter.base_model, adapter.revision, f"adapter {name!r}")
    chosen = [(task, _spread(task.read_rows("train"), rows)) for task in tasks]
    sizes = {
        name: module.d_in
        for adapter in adapters.values()
        for name, module in sorted(adapter.modules.items())
        if module.layer == "linear"
    }
    with tempfile.TemporaryDirectory(prefix="hydraopt-calibration-") as folder:
        models = _models(chosen, adapters, find_device(device))
        files = _collect(models, sizes, Path(folder), progress)
        yield SecondMoments(files, _digest(chosen))


def _spread(rows: list[Row], count: int) -> list[Row]:
    return rows if count >= len(rows) else [rows[index * len(rows) // count] for index in range(count)]


def _digest(chosen: Sequence[tuple[TaskFile, list[Row]]]) -> str:
    """SHA-256 (hex) of everything the moments follow from."""
    values = []
    for task, rows in chosen:
        values.append(
            {
                "base_model": task.base_model,
                "revision": task.revision,
                "kind": task.kind,
                "prompt": task.prompt,
                "max_length": task.max_length,
                "max_new_tokens": task.max_new_tokens,
                "rows": rows_digest(rows),
            }
        )
    canonical = json.dumps([_VERSION, sorted(values, key=str)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _models(
    chosen: Sequence[tuple[TaskFile, list[Row]]], adapters: Mapping[str, Adapter], device: torch.device
) -> list[tuple[Any, Batches]]:
    """A base model of each kind with what it will read; every adapter must fit the model of its own kind."""
    models = {kind: _load(kind, same, device) for kind, same in _by_kind(chosen).items()}
    base = chosen[0][0]
    layers: dict[str | None, set[str]] = {
        kind: {name for name, _ in model.named_modules()} for kind, (model, _) in models.items()
    }
    for task, adapter in adapters.items():
        if adapter.task_type not in layers:  # a kind that no row is for: its layers may have other names
            layers[adapter.task_type] = set(linear_shapes(base.base_model, base.revision, adapter.task_type))
        for name, module in sorted(adapter.modules.items()):
            if module.layer == "linear" and name not in layers[adapter.task_type]:
                raise TaskFileError(
                    f"the base model {base.base_model!r} has no module {name!r}, which adapter {task!r} updates"
                )
    return list(models.values())


def _collect(
    models: Sequence[tuple[Any, Batches]],
    sizes: Mapping[str, int],
    folder: Path,
    progress: Progress | None,
) -> dict[str, Path]:
    """Write the moments of every module that was reached; the file of each."""
    files: dict[str, Path] = {}
    passes = _passes(sizes)
    for number, names in enumerate(passes):
        sums = {name: _Sum(sizes[name], models[0][0].device) for name in names}
        for model, batches in models:
            _run(model, batches, sums)
        path = folder / f"{number:04d}.safetensors"
        found = {name: one.moment() for name, one in sums.items() if one.tokens}
        save_file(found, path)
        files |= dict.fromkeys(found, path)
        if progress is not None:
            progress(number + 1, len(passes), "calibrate")
    return files


def _by_kind(
    chosen: Sequence[tuple[TaskFile, list[Row]]],
) -> dict[TaskType, list[tuple[TaskFile, list[Row]]]]:
    """Tasks by the kind of model they run on."""
    kinds: dict[TaskType, list[tuple[TaskFile, list[Row]]]] = {}
    for task, rows in chosen:
        kinds.setdefault(task.task_type(), []).append((task, rows))
    return kinds


def _load(
    kind: TaskType, chosen: Sequence[tuple[TaskFile, list[Row]]], device: torch.device
) -> tuple[Any, Batches]:
    """The base model and what it will read. Its classifier is random, but nothing is taken from behind it."""
    first = chosen[0][0]
    base = load_base(first.base_model, first.revision, kind, num_labels=len(first.labels) or None)
    examples = []
    for task, rows in chosen:
        for example in encoded_rows(task, base.model, base.tokenizer, rows):
            del example["labels"]
            examples.append(example)
    return base.model.to(device), list(_batches(examples))


def _batches(examples: Sequence[Mapping[str, list[int]]]) -> Iterator[dict[str, Tensor]]:
    """Examples of equal lengths together."""
    alike: dict[tuple[tuple[str, int], ...], list[Mapping[str, list[int]]]] = {}
    for example in examples:
        alike.setdefault(tuple((key, len(ids)) for key, ids in sorted(example.items())), []).append(example)
    for lengths, same in sorted(alike.items()):
        step = max(1, _BATCH_TOKENS // max(length for _, length in lengths))
        for start in range(0, len(same), step):
            batch = same[start : start + step]
            yield {key: torch.tensor([example[key] for example in batch]) for key, _ in lengths}


def _passes(sizes: Mapping[str, int]) -> list[list[str]]:
    passes: list[list[str]] = []
    room = 0
    for name, size in sorted(sizes.items()):
        room -= size * size * _dtype(size).itemsize
        if room < 0 or not passes:
            passes.append([])
            room = PASS_BYTES - size * size * _dtype(size).itemsize
        passes[-1].append(name)
    return passes


def _dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= 1024 else torch.float32


class _Sum:
    """``sum_t x_t x_t^T``, ``sum_t |x_t|^4`` and the number of tokens of one module's inputs."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.squares = torch.zeros(size, size, dtype=_dtype(size), device=device)
        self.fourth = 0.0
        self.tokens = 0

    def watch(self, _module: Any, inputs: tuple[Tensor, ...]) -> None:
        """Add the inputs of a forward pass, (..., d_in)."""
        x = inputs[0].detach().flatten(0, -2).to(self.squares.dtype)
        self.squares.addmm_(x.mT, x)
        self.fourth += float(x.square().sum(dim=1).square().sum())
        self.tokens += len(x)

    def moment(self) -> Tensor:
        """Regularised, on the CPU."""
        return regularised((self.squares / self.tokens).cpu(), self.fourth / self.tokens, self.tokens)


def _has(model: Any, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _run(model: Any, batches: Batches, sums: Mapping[str, _Sum]) -> None:
    with ExitStack() as hooks, quiet(), torch.inference_mode():
        for name, one in sums.items():
            if _has(model, name):
                hooks.callback(model.get_submodule(name).register_forward_pre_hook(one.watch).remove)
        for batch in batches:
            model(**{key: ids.to(model.device) for key, ids in batch.items()})
