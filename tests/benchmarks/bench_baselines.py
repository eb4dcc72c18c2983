"""The merge beside what it replaces: PEFT's "svd" combination, and the paper's form fitted by Adam.

    python tests/benchmarks/bench_baselines.py
    python tests/benchmarks/bench_baselines.py --peft-count 40 --steps 5000 --seconds 300    # PEFT needs 9 GiB then

Four linear modules in the shapes of Llama-3.2-1B, one thing after the other in one process with one number of threads:

- `hydraopt.merge` of 40 adapters from their folders, reading and digests included.
- `PeftModel.add_weighted_adapter(combination_type="svd")` of adapters in memory. The SVD takes as long for any number
  of adapters, making and adding their dense updates grows with it. By default PEFT gets 8; for 40 the time of the
  other updates, measured apart, is added. Beside it stands `task_arithmetic`, which finds the same update of those 8.
- `gradient` until its error is within 1 % of the optimum that `hydraopt.merge(method="paper")` finds at the same rank,
  at the learning rate that gets there first. It works on thin factors; one step of the same Adam on dense updates is
  timed too (on four tasks, times their number), for the course is the same and its steps would take that much longer.

Quote the ratios; absolute times are the machine's.
"""

from __future__ import annotations

import argparse
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from model_shapes import write_adapters
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.merge_utils import task_arithmetic as peft_sum
from rich.console import Console
from rich.table import Table

import hydraopt
from hydraopt.merging.gradient import Fitted, gradient
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.task_arithmetic import task_arithmetic

_SUFFICES = 1.01  # times the optimum
_DENSE_TASKS = 4

Updates = Mapping[str, Sequence[LowRank]]  # by module: one of each task


def main() -> None:
    """Measure and print the tables."""
    arguments = _arguments()
    console = Console(width=130)
    with tempfile.TemporaryDirectory(prefix="hydraopt-bench-") as temporary:
        folders = write_adapters("llama-3.2-1b-four", arguments.count, arguments.rank, Path(temporary))
        adapters = {folder.name: folder for folder in folders}
        opened = [hydraopt.read_adapter(folder) for folder in folders]
        updates = {
            name: [LowRank(*one.factors(name)) for one in opened] for name in sorted(opened[0].modules)
        }
        console.print(
            f"{arguments.count} adapters, 4 modules of Llama-3.2-1B, rank {arguments.rank}, bf16; {machine()}"
        )
        if "peft" in arguments.part:
            merge_s = median_s(arguments.runs, lambda: hydraopt.merge(adapters, budget=0.25))
            console.print(peft_table(updates, arguments.peft_count, merge_s))
        if "gradient" in arguments.part:
            settings = {"method": "paper", "rank": arguments.rank, "dtype": "float32"}
            closed_s = median_s(arguments.runs, lambda: hydraopt.merge(adapters, **settings))
            bundle = hydraopt.merge(adapters, **settings)
            stored = {task: bundle.factors(task) for task in adapters}
            optima = {name: closed_error(name, updates, list(stored.values())) for name in updates}
            console.print(gradient_table(updates, optima, closed_s, arguments))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=40, help="adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--part", action="append", choices=["peft", "gradient"], help="default: both")
    parser.add_argument("--peft-count", type=int, default=8, help="adapters PEFT gets")
    parser.add_argument("--steps", type=int, default=1000, help="most steps of a fit")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="most seconds of a fit: per module and rate"
    )
    parser.add_argument("--learning-rate", type=float, action="append", help="default: 0.03 and 0.1")
    parser.add_argument("--runs", type=int, default=5, help="of hydraopt.merge; the median counts")
    arguments = parser.parse_args()
    arguments.part = arguments.part or ["peft", "gradient"]
    arguments.learning_rate = arguments.learning_rate or [0.03, 0.1]
    arguments.peft_count = min(arguments.peft_count, arguments.count)
    return arguments


def peft_table(updates: Updates, count: int, merge_s: float) -> Table:
    """PEFT's svd of every module, and the whole merge."""
    total = len(next(iter(updates.values())))
    table = Table(
        "module",
        "size",
        f"PEFT svd, {count}, s",
        f"PEFT svd, {total}, s",
        f"same, {count}, s",
        "PEFT / ours",
        "differ by",
    )
    sums = [0.0, 0.0, 0.0]
    for name, own in updates.items():
        seconds, more, merged = peft_svd(own[:count])
        weights = [1 / count] * count
        same_s = median_s(3, lambda own=own, weights=weights: task_arithmetic(own[:count], weights))
        difference = relative_difference(merged, task_arithmetic(own[:count], weights))
        row = [seconds, seconds + (total - count) * more, same_s]
        sums = [old + new for old, new in zip(sums, row, strict=True)]
        table.add_row(
            _short(name), _size(own), *_seconds(row), f"{seconds / same_s:.0f}", f"{difference:.1e}"
        )
    table.add_row("all four", "", *_seconds(sums), f"{sums[0] / sums[2]:.0f}", end_section=True)
    table.add_row(f"hydraopt.merge of {total}", "", "", f"{merge_s:.3f}", "", f"{sums[1] / merge_s:.0f}")
    extrapolated = "" if count == total else f"; {total} is extrapolated from {count}"
    table.caption = f"PEFT gets adapters in memory, hydraopt.merge reads them from files{extrapolated}"
    return table


def peft_svd(updates: Sequence[LowRank]) -> tuple[float, float, LowRank]:
    """Seconds of PEFT's svd, seconds per dense update made and added within it, and what it found."""
    model, layer = peft_model(updates)
    names = [f"t{k}" for k in range(len(updates))]
    weights = [1 / len(names)] * len(names)
    with torch.no_grad():
        start = time.perf_counter()
        model.add_weighted_adapter(names, weights, "merged", combination_type="svd")
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        peft_sum([layer.get_delta_weight(name) for name in names], torch.tensor(weights))
        dense_s = (time.perf_counter() - start) / len(names)
    return seconds, dense_s, LowRank(layer.lora_B["merged"].weight.data, layer.lora_A["merged"].weight.data)


def peft_model(updates: Sequence[LowRank]) -> tuple[PeftModel, torch.nn.Module]:
    """One linear layer with the updates as live adapters, alpha equal to the rank."""
    d_out, d_in = updates[0].shape
    config = LoraConfig(r=updates[0].rank, lora_alpha=updates[0].rank, target_modules=["0"])
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(d_in, d_out, bias=False)), config, "t0")
    layer = model.base_model.model[0]
    for k, update in enumerate(updates):
        if k:
            model.add_adapter(f"t{k}", config)
        layer.lora_B[f"t{k}"].weight.data.copy_(update.up)
        layer.lora_A[f"t{k}"].weight.data.copy_(update.down)
    return model, layer


def gradient_table(
    updates: Updates, optima: Mapping[str, float], closed_s: float, arguments: argparse.Namespace
) -> Table:
    """The fit of every module, and the closed form of all."""
    table = Table(
        "module",
        "size",
        "closed error",
        "fitted error",
        "rate",
        "steps",
        "fit, s",
        "dense: s / step",
        "dense fit, s",
    )
    sums = [0.0, 0.0]
    reached = True
    weights = task_weights(updates)
    for name, own in updates.items():
        enough = _SUFFICES * optima[name]
        fits = [(rate, *timed_fit(own, weights, rate, enough, arguments)) for rate in arguments.learning_rate]
        arrived = [fit for fit in fits if fit[2].errors[-1] <= enough]
        reached = reached and bool(arrived)
        rate, seconds, fitted = (
            min(arrived, key=lambda fit: fit[1]) if arrived else min(fits, key=lambda fit: fit[2].errors[-1])
        )
        steps = len(fitted.errors) - 1
        step_s = dense_step_s(own)
        row = [seconds, steps * step_s]
        sums = [old + new for old, new in zip(sums, row, strict=True)]
        count = f"{steps}" if arrived else f"> {steps}"
        errors = (f"{optima[name]:.4f}", f"{fitted.errors[-1]:.4f}")
        table.add_row(
            _short(name),
            _size(own),
            *errors,
            f"{rate}",
            count,
            f"{row[0]:.2f}",
            f"{step_s:.2f}",
            f"{row[1]:.0f}",
        )
    table.add_row("all four", "", "", "", "", "", f"{sums[0]:.2f}", "", f"{sums[1]:.0f}", end_section=True)
    table.add_row("closed form", "", "", "", "", "", f"{closed_s:.3f}", "", f"{closed_s:.3f}")
    ratios = [f"{'' if reached else '> '}{total / closed_s:.0f} x" for total in sums]
    table.add_row("ratio", "", "", "", "", "", ratios[0], "", ratios[1])
    if not reached:
        table.caption = (
            "> : not within 1 % of the closed form's error after so many steps; raise --steps and --seconds"
        )
    return table


def timed_fit(
    updates: Sequence[LowRank],
    weights: Sequence[float],
    rate: float,
    enough: float,
    arguments: argparse.Namespace,
) -> tuple[float, Fitted]:
    """Seconds and result of one fit that stops at ``enough``, or when its steps or seconds are spent."""

    def fit(steps: int) -> Fitted:
        heads = list(range(len(updates)))
        return gradient(
            updates,
            weights,
            arguments.rank,
            heads=heads,
            steps=steps,
            learning_rate=rate,
            target_error=enough,
        )

    start = time.perf_counter()
    fit(3)
    step_s = (time.perf_counter() - start) / 4  # four times gradients, three times Adam
    start = time.perf_counter()
    fitted = fit(max(1, min(arguments.steps, int(arguments.seconds / step_s))))
    return time.perf_counter() - start, fitted


def dense_step_s(updates: Sequence[LowRank]) -> float:
    """Seconds of one step of Adam on dense updates for all tasks, by automatic differentiation."""
    some = updates[:_DENSE_TASKS]
    targets = [update.up @ update.down for update in some]
    shared = torch.nn.Parameter(some[0].down.clone())
    heads = [torch.nn.Parameter(torch.zeros_like(update.up)) for update in some]
    adam = torch.optim.Adam([shared, *heads])
    start = time.perf_counter()
    for target, head in zip(targets, heads, strict=True):
        (target - head @ shared).square().sum().backward()
    adam.step()
    return (time.perf_counter() - start) * len(updates) / len(some)


def task_weights(updates: Updates) -> list[float]:
    """``1 / |dW_k|^2`` over all modules, as the merge weighs its tasks."""
    return [1 / sum(squared_norm(*update) for update in task) for task in zip(*updates.values(), strict=True)]


def closed_error(
    name: str, updates: Updates, stored: Sequence[Mapping[str, tuple[torch.Tensor, ...]]]
) -> float:
    """Relative error of one module as the bundle stores it, in the terms of ``gradient``."""
    lost = wanted = 0.0
    for update, factors, weight in zip(updates[name], stored, task_weights(updates), strict=True):
        up, *rest = (part.float() for part in factors[name])
        down = rest[0] if len(rest) == 1 else torch.linalg.multi_dot(rest)
        lost += weight * squared_norm(torch.cat([update.up, -up], dim=1), torch.cat([update.down, down]))
        wanted += weight * squared_norm(*update)
    return math.sqrt(lost / wanted)


def squared_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """``|up down|^2`` without the product."""
    up, down = up.double(), down.double()
    return float(((up.mT @ up) * (down @ down.mT)).sum())


def relative_difference(one: LowRank, other: LowRank) -> float:
    """``|one - other| / |one|``."""
    apart = squared_norm(torch.cat([one.up, -other.up], dim=1), torch.cat([one.down, other.down]))
    return math.sqrt(max(apart, 0.0) / squared_norm(*one))


def median_s(runs: int, work: Callable[[], object]) -> float:
    """Median seconds of ``work``."""
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def machine() -> str:
    """What the figures were measured on."""
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{torch.get_num_threads()} threads, {memory}, {platform.machine()}, {versions}"


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def _size(updates: Sequence[LowRank]) -> str:
    return "{} x {}".format(*updates[0].shape)


def _seconds(row: Sequence[float]) -> list[str]:
    return [f"{value:.3f}" if value < 1 else f"{value:.1f}" for value in row]


if __name__ == "__main__":
    main()
