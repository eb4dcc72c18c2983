"""The flow ``finetune-task``: a task file becomes a serving adapter version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from hydraopt.training.finetune import training_key
from infra.settings import Settings
from tasks.adapters import (
    describe_version,
    evaluate_own,
    fetch_version,
    find_trained,
    keep_adapter,
    note_maker,
    register_adapter,
    train_adapter,
)
from tasks.announcing import announce
from tasks.artifacts import show_adapter
from tasks.jobs import job_from_file, recorded_evaluation
from tasks.stale_runs import stay_alive
from tasks.store import check_store


@flow(name="finetune-task", flow_run_name="finetune {task_file.stem}")
def finetune_task(task_file: Path, made_by: str | None = None) -> dict[str, Any]:
    """Train an adapter for a task, measure it, store it and make it the serving one.

    A training that was done before, with the same data, settings and code, is not done again; one that
    was killed continues from its last checkpoint.

    Args:
        task_file: Absolute path of the task file on the machine that runs this flow.
        made_by: Who asked for it: a policy may forbid that person to approve a bundle with it.
    """
    settings = Settings.load().require_services()
    stay_alive(settings)
    check_store(settings)
    job = job_from_file(task_file)

    version = find_trained(settings, job.task)
    trained = version is None
    if version is not None and made_by is not None:
        version = note_maker(settings, version, made_by)
    if version is None or recorded_evaluation(version, job) is None:  # other test rows: measure again
        folder = train_adapter(settings, job.task) if version is None else fetch_version(settings, version)
        version = keep_adapter(
            settings,
            job.task.name,
            folder,
            job=job,
            evaluation=evaluate_own(job, folder),
            source=f"finetune {task_file.name}",
            trained_as=training_key(job.task),
            made_by=made_by,
        )
    result = {**describe_version(version, register_adapter(settings, version)), "trained": trained}
    announce(version)
    show_adapter(result)
    return result
