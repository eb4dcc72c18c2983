"""The adapters of the quality benchmark, each trained once and kept."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from quality_tasks import AdapterSet
from rich.console import Console

from hydraopt.evaluation.task_file import TaskFile
from hydraopt.training.finetune import finetune, training_key


def train_set(
    tasks: Mapping[str, TaskFile], adapters: AdapterSet, work: Path, console: Console
) -> dict[str, Path]:
    """Train what is missing of a set, and name the adapters' folders by task.

    A training that was cut short goes on where it was. One made from other rows or settings is made again.
    """
    folder = work / adapters.name / "adapters"
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        made_from = folder / f"{name}.key"  # beside the adapter: its folder holds an adapter and nothing else
        key = training_key(task)
        if made_from.is_file() and made_from.read_text("utf-8") == key and (folder / name).is_dir():
            continue
        made_from.unlink(missing_ok=True)
        with _short_products():
            result = finetune(task, folder / name, work=work / "training", device="cpu")
        made_from.write_text(key, encoding="utf-8")
        console.print(f"{adapters.name}: {name}, {result.train_rows} rows, {result.seconds:.0f} s")
    return {name: folder / name for name in tasks}


@contextlib.contextmanager
def _short_products() -> Iterator[None]:
    """Let oneDNN do the matrix products of a training, in bfloat16 where it wants: a third less time."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
