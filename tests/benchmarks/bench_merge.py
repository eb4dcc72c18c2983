"""Time and memory of whole merges on the shapes of well-known models.

    python tests/benchmarks/bench_merge.py
    python tests/benchmarks/bench_merge.py --model llama-3.1-8b --count 16 --rank 32

Each merge runs as a process of its own, as `hydraopt merge` does for a user, so its peak memory is its own. Beside
it, in the same run, stands the floor: reading every byte of the same files once. Quote the ratio; absolute times are
the machine's. After each full merge by `hydraopt` one adapter is exchanged and merged again onto its shared part.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from model_shapes import SHAPES, write_adapters
from rich.console import Console
from rich.progress import track
from rich.table import Table


def main() -> None:
    """Measure and print a table."""
    arguments = _arguments()
    keeping = f"keep-shared, one of {arguments.count} changed"
    with tempfile.TemporaryDirectory(prefix="hydraopt-bench-") as temporary:
        folder = arguments.folder or Path(temporary)
        *adapters, other = write_adapters(
            arguments.model, arguments.count + 1, arguments.rank, folder / arguments.model
        )
        changed = [f"{adapters[0].name}={other}", *map(str, adapters[1:])]
        rows = []
        for method in track(arguments.method * arguments.runs, description="merge"):
            bundle = Path(temporary) / f"bundle-{method}"
            how = ["--method", method, "--budget", str(arguments.budget)]
            rows.append({"method": method, **_measure(adapters, map(str, adapters), how, bundle)})
            if method == "hydraopt":
                kept = _measure([other, *adapters[1:]], changed, ["--keep-shared", str(bundle)], bundle)
                rows.append({"method": keeping, **kept, "full": rows[-1]["seconds"]})
    table = Table("method", "storage", "relative error", "seconds", "read floor, s", "ratio", "peak RSS, GiB")
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        middle = {key: statistics.median(row[key] for row in own) for key in own[0] if key != "method"}
        table.add_row(
            method,
            f"{100 * middle['storage_ratio']:.2f} %",
            f"{middle['relative_error']:.4f}",
            f"{middle['seconds']:.2f}",
            f"{middle['floor']:.2f}",
            f"{middle['seconds'] / middle['floor']:.1f}",
            f"{middle['peak_rss_bytes'] / 2**30:.2f}",
        )
    console = Console(width=120)
    console.print(
        f"{arguments.count} adapters, shapes of {arguments.model}, rank {arguments.rank}, bf16; {_machine()}"
    )
    console.print(table)
    shares = [100 * row["seconds"] / row["full"] for row in rows if "full" in row]
    if shares:
        each = ", ".join(f"{share:.1f}" for share in shares)
        console.print(
            f"{keeping}: {statistics.median(shares):.1f} % of the full merge just before it ({each})"
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="llama-3.2-1b")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--method", action="append", choices=["hydraopt", "paper", "separate"])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="Keep the adapters here and reuse them.")
    arguments = parser.parse_args()
    arguments.method = arguments.method or ["hydraopt", "separate"]
    return arguments


def _measure(
    adapters: list[Path], arguments: Iterable[str], options: list[str], out: Path
) -> dict[str, float | str]:
    start = time.perf_counter()
    for adapter in adapters:
        with (adapter / "adapter_model.safetensors").open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
    floor = time.perf_counter() - start
    command = [sys.executable, "-m", "flows.command_line", "merge", *arguments, "--out", str(out), "--json"]
    run = subprocess.run([*command, *options], check=True, capture_output=True, text=True)
    result = json.loads(run.stdout)
    kept = ("storage_ratio", "relative_error", "seconds", "peak_rss_bytes")
    return {"floor": floor, **{key: result[key] for key in kept}}


def _machine() -> str:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads, {platform.machine()}, {versions}"


if __name__ == "__main__":
    main()
