"""What people see in the Prefect pages beside a run: tables and short reports."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from hydraopt.evaluation.gates import GateReport
from infra.bundle_registry import model_name
from infra.publishing import Published
from infra.settings import Settings


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


def show_links(settings: Settings, bundle: str) -> None:
    """A link to the bundle's page in MLflow, where its versions, scores and aliases are."""
    if str(settings.mlflow_uri).startswith("http"):
        create_link_artifact(
            link=f"{settings.mlflow_uri}/#/models/{model_name(bundle)}",
            link_text=f"{bundle} in MLflow",
            key=_key("mlflow", bundle),
        )


def show_frontier(bundle: str, picture: Path) -> None:
    """Error over storage of the set just merged. The picture travels with the run: no server holds it."""
    data = base64.b64encode(picture.read_bytes()).decode()
    create_image_artifact(
        image_url=f"data:image/png;base64,{data}",
        key=_key("frontier", bundle),
        description=f"Error over storage of {bundle}: the curve that the budget is a point of.",
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
