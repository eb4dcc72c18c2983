"""Time and memory of whole merges on the shapes of well-known models.

    python tests/benchmarks/bench_merge.py                       # 40 adapters of Llama-3.2-1B's shapes
    python tests/benchmarks/bench_merge.py --case scaling --case 8b --folder /tmp/adapters

Each merge runs as a process of its own, as `hydraopt merge` does for a user, so its peak memory is its own. Beside
it, in the same run, stands the floor: reading every byte of the same files once. Quote the ratio; absolute times are
the machine's. `seconds` is the merge with the writing of the bundle, or the frontier without its plot; `wall` the whole
process from its start.

Cases: `1b` compares methods, a merge onto a kept shared part after one adapter changed, and the frontier; `scaling`
merges more and more adapters; `8b` 16 adapters of rank 32 of Llama-3.1-8B's shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from model_shapes import write_adapters
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

BUDGET = 0.25


@dataclass(frozen=True)
class Run:
    """One command: what it is called in the table, its arguments, and the adapters it reads."""

    label: str
    command: str
    arguments: list[str]
    adapters: list[Path]


def main() -> None:
    """Measure and print a table per case."""
    arguments = _arguments()
    console = Console(width=130)
    console.print(
        f"budget {BUDGET}, bfloat16 inputs; {_machine()}; median of {arguments.runs} runs (least to most)"
    )
    with tempfile.TemporaryDirectory(prefix="hydraopt-bench-") as temporary:
        folder = arguments.folder or Path(temporary)
        for case in arguments.case:
            runs = list(CASES[case](folder, Path(temporary) / case))
            console.print(_table(case, _measured(runs, arguments.runs)))


def _methods(folder: Path, out: Path) -> Iterator[Run]:
    """Every method at one size; then what follows a merge by the default one."""
    *adapters, other = write_adapters("llama-3.2-1b", 41, 16, folder / "llama-3.2-1b")
    for label, options in {
        "hydraopt": [],
        "hydraopt, 16 bits": ["--bits", "16"],
        "separate, 16 bits": ["--method", "separate", "--bits", "16"],
        "paper": ["--method", "paper"],
    }.items():
        yield _merge(label, adapters, out / label.replace(", ", "-"), ["--budget", str(BUDGET), *options])
    changed = [other, *adapters[1:]]
    named = [f"{adapters[0].name}={other}", *map(str, adapters[1:])]
    kept = ["--out", str(out / "kept"), "--keep-shared", str(out / "hydraopt")]
    yield Run("keep-shared, 1 of 40 changed", "merge", [*named, *kept], changed)
    yield Run("frontier", "frontier", list(map(str, adapters)), adapters)


def _scaling(folder: Path, out: Path) -> Iterator[Run]:
    for count in (10, 20, 40, 80, 200):
        adapters = write_adapters("llama-3.2-1b", count, 16, folder / "llama-3.2-1b")
        yield _merge(f"{count} adapters", adapters, out / str(count), ["--budget", str(BUDGET)])


def _large(folder: Path, out: Path) -> Iterator[Run]:
    adapters = write_adapters("llama-3.1-8b", 16, 32, folder / "llama-3.1-8b-r32")
    yield _merge("16 adapters of 8B, rank 32", adapters, out, ["--budget", str(BUDGET)])


CASES = {"1b": _methods, "scaling": _scaling, "8b": _large}


def _merge(label: str, adapters: list[Path], out: Path, options: list[str]) -> Run:
    return Run(label, "merge", [*map(str, adapters), "--out", str(out), *options], adapters)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--case", action="append", choices=sorted(CASES), help="May be repeated; 1b if not given."
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Keep the adapters here and reuse them.")
    arguments = parser.parse_args()
    arguments.case = arguments.case or ["1b"]
    return arguments


def _measured(runs: list[Run], times: int) -> dict[str, list[dict[str, float]]]:
    """Every run in turn, ``times`` times over: what drifts with the machine drifts for all of them."""
    rows: dict[str, list[dict[str, float]]] = {run.label: [] for run in runs}
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("merge", total=times * len(runs))
        for _ in range(times):
            for run in runs:
                rows[run.label].append(_measure(run))
                progress.advance(bar)
    return rows


def _measure(run: Run) -> dict[str, float]:
    start = time.perf_counter()
    for adapter in run.adapters:
        with (adapter / "adapter_model.safetensors").open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    floor = time.perf_counter() - start
    command = [sys.executable, "-m", "flows.command_line", run.command, *run.arguments, "--json"]
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout is not None
    printed = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    wall = time.perf_counter() - start
    if status:
        raise SystemExit(
            f"{run.label}: the command ended with status {os.waitstatus_to_exitcode(status)}: {printed}"
        )
    result = json.loads(printed)
    return {
        "floor": floor,
        "wall": wall,
        "seconds": result["seconds"],
        "rss": usage.ru_maxrss / 2**20,
        "storage": result.get("storage_ratio", float("nan")),
        "error": result.get("relative_error", float("nan")),
    }


def _table(case: str, rows: dict[str, list[dict[str, float]]]) -> Table:
    table = Table(
        case,
        "storage",
        "relative error",
        "seconds",
        "wall, s",
        "read floor, s",
        "seconds/floor",
        "peak RSS, GiB",
    )
    first = statistics.median(row["seconds"] for row in next(iter(rows.values())))
    for label, own in rows.items():
        middle = {key: statistics.median(row[key] for row in own) for key in own[0]}
        seconds = sorted(row["seconds"] for row in own)
        table.add_row(
            label,
            f"{100 * middle['storage']:.2f} %",
            f"{middle['error']:.4f}",
            f"{middle['seconds']:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f}), {middle['seconds'] / first:.2f}x",
            f"{middle['wall']:.2f}",
            f"{middle['floor']:.2f}",
            f"{middle['seconds'] / middle['floor']:.0f}",
            f"{middle['rss']:.2f}",
        )
    return table


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads, {platform.machine()}, {_processor()}, {versions}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    native = any("avx512_bf16" in line or "amx_bf16" in line for line in lines if line.startswith("flags"))
    return f"{names[0] if names else 'unknown processor'} ({'with' if native else 'no'} bfloat16 units)"


if __name__ == "__main__":
    main()
