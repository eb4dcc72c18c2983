"""The flow ``ingest-adapter``: an adapter made elsewhere becomes a serving adapter version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from hydraopt.names import check_task_name
from infra.settings import Settings
from tasks.adapters import (
    check_adapter,
    describe_version,
    evaluate_own,
    find_stored,
    keep_adapter,
    register_adapter,
)
from tasks.announcing import announce
from tasks.artifacts import show_adapter
from tasks.jobs import job_from_file, serving_job
from tasks.sources import fetch_source
from tasks.store import check_store


@flow(name="ingest-adapter", flow_run_name="ingest {task}")
def ingest_adapter(
    source: str, task: str, task_file: Path | None = None, made_by: str | None = None
) -> dict[str, Any]:
    """Bring in a PEFT folder: check it, measure it, store it and make it the serving one of its task.

    Args:
        source: A folder, or ``s3://bucket/prefix``, with ``adapter_config.json`` and
            ``adapter_model.safetensors``.
        task: Name of the task it does.
        task_file: The task's file; None uses what the task's serving version was registered with.
            Without either the adapter is stored, but no bundle with it passes the gates.
        made_by: Who brings it in: a policy may forbid that person to approve a bundle with it.
    """
    check_task_name(task)
    settings = Settings.load().require_services()
    check_store(settings)

    folder = fetch_source(settings, source)
    adapter = check_adapter(folder)
    known = find_stored(settings, adapter, task)
    job = job_from_file(task_file, task) if task_file else serving_job(settings, adapter.base_model, task)
    if job is None:
        get_run_logger().warning("no evaluation data for %s: its bundle will fail the gates", task)

    version = keep_adapter(
        settings,
        task,
        folder,
        job=job,
        evaluation=evaluate_own(job, folder, known) if job else None,
        source=source,
        made_by=made_by,
    )
    result = {**describe_version(version, register_adapter(settings, version)), "known": known is not None}
    announce(version)
    show_adapter(result)
    return result
