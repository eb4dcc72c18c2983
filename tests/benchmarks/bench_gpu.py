"""A merge on a GPU, beside the same one on the CPU: 40 adapters of rank 32 of Llama-3.1-8B's shapes (6.7 GB).

    python tests/benchmarks/bench_gpu.py
    python tests/benchmarks/bench_gpu.py --model llama-3.2-1b --rank 16 --folder /tmp/adapters

The first merge starts with files in the system's cache and an idle card; what it reads stays on the card. The others
find the factors there, so theirs is the time to compute: all of a merge from factors on the card to the bundle's bytes
in the computer's memory. Digests and the writing of files, which no device changes, are left out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from model_shapes import SHAPES, write_adapters
from rich.console import Console
from rich.table import Table

from hydraopt.adapters import Adapter
from hydraopt.merging.kept_factors import KeptFactors
from hydraopt.merging.merge import open_set
from hydraopt.merging.run import MergeRun
from hydraopt.merging.solving import solve
from hydraopt.recipe import Recipe

Result = TypeVar("Result")


def main() -> None:
    """Measure and print a table."""
    arguments = _arguments()
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA GPU here: nothing to measure")
    console = Console(width=130)
    with tempfile.TemporaryDirectory(prefix="hydraopt-bench-") as temporary:
        folder = (arguments.folder or Path(temporary)) / f"{arguments.model}-r{arguments.rank}"
        folders = write_adapters(arguments.model, arguments.count, arguments.rank, folder)
        adapters = open_set({path.name: path for path in folders})
        for bits in arguments.bits:
            recipe = Recipe(budget=arguments.budget, bits=bits if bits == "auto" else int(bits))
            console.print(_compared(adapters, recipe, arguments.runs))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.1-8b")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--bits", nargs="+", default=["auto", "16"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Keep the adapters here and reuse them.")
    return parser.parse_args()


class Measured:
    """One merge: the seconds of its stages, and what came out."""

    def __init__(
        self, adapters: dict[str, Adapter], recipe: Recipe, device: str, kept: KeptFactors | None
    ) -> None:
        self.seconds: dict[str, float] = {}
        run = MergeRun(adapters, recipe, torch.device(device), lambda *_: None, kept=kept)
        self._timed("weigh", lambda: run.weights)
        curves = self._timed("trace", run.trace)
        choices = self._timed("solve", lambda: solve(run.assembly, curves, recipe, run.total_weight))
        entries = run.assembly.entries(choices)
        shared, heads, self.errors = self._timed(
            "build", lambda: run.assembly.flats(entries, run.build(choices))
        )
        self.bytes = len(shared) + sum(len(one) for one in heads.values())
        self.parts = {"shared": shared, **heads}
        self.tasks = tuple(adapters)

    @property
    def whole(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def error(self) -> float:
        """Relative error of the merge."""
        return self.errors.mean(self.tasks)

    def _timed(self, stage: str, work: Callable[[], Result]) -> Result:
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = work()
        torch.cuda.synchronize()
        self.seconds[stage] = time.perf_counter() - start
        return result


def _compared(adapters: dict[str, Adapter], recipe: Recipe, runs: int) -> Table:
    kept = KeptFactors.on(torch.device("cuda"), adapters)
    first = Measured(adapters, recipe, "cuda", kept)
    later = [Measured(adapters, recipe, "cuda", kept) for _ in range(runs)]
    cpu = Measured(adapters, recipe, "cpu", None)
    stages = list(first.seconds)
    table = Table(
        "", *stages, "whole", "bytes", "relative error",
        title=f"{len(adapters)} adapters, budget {recipe.budget}, bits {recipe.bits}; {torch.cuda.get_device_name()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}; seconds",
    )  # fmt: skip
    middle = {stage: statistics.median(one.seconds[stage] for one in later) for stage in stages}
    whole = sorted(one.whole for one in later)
    for label, seconds, total, one in (
        ("GPU, from files", first.seconds, f"{first.whole:.2f}", first),
        (
            f"GPU, factors on the card, median of {runs}",
            middle,
            f"{statistics.median(whole):.2f} ({whole[0]:.2f} to {whole[-1]:.2f})",
            later[-1],
        ),
        ("CPU", cpu.seconds, f"{cpu.whole:.2f}", cpu),
    ):
        table.add_row(
            label, *(f"{seconds[stage]:.2f}" for stage in stages), total, str(one.bytes), f"{one.error:.6f}"
        )
    same = sum(
        int((part == cpu.parts[name]).sum())
        for name, part in first.parts.items()
        if len(part) == len(cpu.parts[name])
    )
    worst = max(
        abs(first.errors.relative(task) - cpu.errors.relative(task)) / cpu.errors.relative(task)
        for task in adapters
    )
    peak = torch.cuda.max_memory_allocated() / 2**30
    table.caption = (
        f"GPU and CPU: {100 * same / cpu.bytes:.2f} % of the bytes are equal; a task's errors differ by {worst:.1e} of "
        f"themselves at most. Peak memory of the card: {peak:.1f} GiB"
    )
    return table


if __name__ == "__main__":
    main()
