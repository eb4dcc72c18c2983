"""The flow ``finetune-task``: a task file becomes a serving adapter version."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow

from hydraopt.evaluation.task_file import TaskFile
from hydraopt.training.finetune import training_key
from infra.settings import Settings
from tasks.adapters import (
    describe_version,
    evaluate_own,
    find_trained,
    keep_adapter,
    register_adapter,
    train_adapter,
)


@flow(name="finetune-task", flow_run_name="finetune {task_file}")
def finetune_task(task_file: Path) -> dict[str, Any]:
    """Train an adapter for a task, measure it, store it and make it the serving one.

    A training that was done before, with the same data, settings and code, is not done again; one that
    was killed continues from its last checkpoint.

    Args:
        task_file: Absolute path of the task file on the machine that runs this flow.
    """
    settings = Settings.load().require_services()
    task = TaskFile.load(task_file)

    version = find_trained(settings, task)
    trained = version is None
    if version is None:
        folder = train_adapter(settings, task)
        version = keep_adapter(
            settings,
            task.name,
            folder,
            task=task,
            evaluation=evaluate_own(task, folder),
            source=f"finetune {task_file.name}",
            trained_as=training_key(task),
        )
    number = register_adapter(settings, version)
    return {**describe_version(version), "version": number, "trained": trained}
