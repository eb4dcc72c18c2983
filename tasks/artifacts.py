"""What people see in the Prefect pages beside a run: tables and short reports."""

from __future__ import annotations

import re
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from hydraopt.evaluation.gates import GateReport
from infra.publishing import Published


def show_adapter(result: dict[str, Any]) -> None:
    """The adapter version that a flow registered."""
    rows = "\n".join(f"| {key} | {value} |" for key, value in result.items())
    create_markdown_artifact(
        f"## Adapter {result['task']}\n\n| | |\n|---|---|\n{rows}\n", key=_key("adapter", result["task"])
    )


def show_gates(bundle: str, report: GateReport) -> None:
    """Two tables: every gate's verdict, and every task's own and merged score."""
    verdict = "passed" if report.passed else "**failed**"
    create_markdown_artifact(
        f"## Bundle {bundle}: gates {verdict}\n\n`{report.bundle_id}`\n\n"
        f"storage ratio {report.storage_ratio:.4f}, mean drop {_percent(report.mean_drop_percent)}\n",
        key=_key("candidate", bundle),
    )
    create_table_artifact(
        [one.model_dump(mode="json") for one in report.verdicts],
        key=_key("gates", bundle),
        description=f"Gates of {report.bundle_id}",
    )
    create_table_artifact(
        [{"task": task, **row.model_dump(mode="json")} for task, row in report.tasks.items()],
        key=_key("tasks", bundle),
        description=f"Tasks of {report.bundle_id}",
    )


def show_move(published: Published) -> None:
    """Where a channel points now."""
    create_markdown_artifact(
        f"## {published.name}, channel {published.channel}: version {published.live_version} is live\n\n"
        f"`{published.live_bundle_id}`\n",
        key=_key("channel", published.name, published.channel),
    )


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} %"


def _key(*words: str) -> str:
    """A key as Prefect wants it: ``a-z``, ``0-9`` and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
