"""The quality benchmark's result for readers: a table on the screen, and one in markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

HEADINGS = (
    "method",
    "bits",
    "level",
    "storage",
    "without classifiers",
    "rel. squared error",
    "mean drop %",
    "95 % interval",
    "worst task %",
    "sets",
    "more than hydraopt, 95 %",
)
_PARTS = {
    "one_init": "All adapters of a set started from one A",
    "own_inits": "Every adapter started from an A of its own",
}


def printed(result: dict[str, Any]) -> Iterator[Table]:
    """One table for each kind of set."""
    for part, title in _PARTS.items():
        if result[part]:
            table = Table(*HEADINGS, title=title)
            for row in result[part]:
                table.add_row(*_cells(row))
            yield table


def markdown(result: dict[str, Any]) -> str:
    """The whole result as a page."""
    lines = ["# Quality at equal bytes", "", _preface(result), "", f"Machine: {result['machine']}.", ""]
    for part, title in _PARTS.items():
        if result[part]:
            lines += [f"## {title}", "", *_pipes(HEADINGS)]
            lines += [*(f"| {' | '.join(_cells(row))} |" for row in result[part]), ""]
    lines += ["## Own accuracy", "", *_own(result), ""]
    if result["not_available"]:
        lines += ["## Not available", ""]
        lines += [
            f"- {row['method']}, {row['bits']} bits, level {row['level']} of {row['counted']}: {row['reason']}"
            for row in result["not_available"]
        ]
    return "\n".join(lines).rstrip() + "\n"


def _preface(result: dict[str, Any]) -> str:
    settings, rows = result["settings"], sum(result["test_rows"].values())
    return (
        f"{len(result['test_rows'])} tasks, {rows} test rows; every adapter saw about {settings['examples']} training "
        "rows, repeats counted. Drop: relative loss of test accuracy against the task's own adapter. Worst task: mean "
        "over the sets. A set is one adapter per task with one data order. Intervals: 2,000 draws of tasks and of test "
        "rows, seeds kept together."
    )


def _own(result: dict[str, Any]) -> list[str]:
    sets = list(result["own_accuracy"])
    lines = _pipes(("task", "test rows", *sets))
    for task, rows in result["test_rows"].items():
        values = [f"{result['own_accuracy'][name][task]:.3f}" for name in sets]
        lines.append(f"| {' | '.join([task, str(rows), *values])} |")
    return lines


def _pipes(headings: tuple[str, ...]) -> list[str]:
    return [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]


def _cells(row: dict[str, Any]) -> list[str]:
    more = row.get("more_than_hydraopt")
    return [
        row["method"],
        str(row["bits"]),
        "-" if row["level"] is None else f"{row['level']:g} of {row['counted']}",
        f"{row['storage']:.4f}",
        f"{row['storage_without_classifiers']:.4f}",
        f"{row['relative_squared_error']:.4f}",
        f"{row['mean']:.2f}",
        f"{row['low']:.2f} to {row['high']:.2f}",
        f"{row['worst']:.2f}",
        str(row["sets"]),
        "" if more is None else f"{more['mean']:+.2f} ({more['low']:+.2f} to {more['high']:+.2f})",
    ]
