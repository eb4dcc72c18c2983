"""The flow ``ingest-adapter``: an adapter trained elsewhere becomes a serving adapter version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from hydraopt.evaluation.task_file import TaskFile
from hydraopt.names import check_task_name
from infra.settings import Settings
from tasks.adapters import (
    check_adapter,
    describe_version,
    earlier_job,
    evaluate_own,
    fetch_source,
    keep_adapter,
    register_adapter,
)


@flow(name="ingest-adapter", flow_run_name="ingest {task}")
def ingest_adapter(source: str, task: str, task_file: Path | None = None) -> dict[str, Any]:
    """Bring in a PEFT folder: check it, measure it, store it and make it the serving one of its task.

    Args:
        source: A folder, or ``s3://bucket/prefix``, with ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        task: Name of the task it does.
        task_file: The task's file; None uses what an earlier version of the task was registered with.
            Without either the adapter is stored, but no bundle with it passes the gates.
    """
    settings = Settings.load().require_services()
    check_task_name(task)

    folder = fetch_source(settings, source)
    adapter = check_adapter(folder)
    job = TaskFile.load(task_file) if task_file else earlier_job(settings, adapter.base_model, task)
