"""The flow ``retrain``: every kept task whose adapter is out of date is trained again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger

from flows.deployed_run import run_deployed
from hydraopt.errors import HydraoptError, ServiceError
from infra.settings import Settings
from infra.task_folder import kept_task_files
from tasks.adapters import find_trained
from tasks.jobs import job_from_file
from tasks.store import check_store

_STEPS = 10
"""Task runs of a finetune-task, for its progress bar."""


@flow(name="retrain")
def retrain() -> dict[str, Any]:
    """Train every task of ``<home>/tasks`` whose data, base model, settings or training code changed.

    That is, no adapter was trained with just these yet. Age alone is no reason: the same data, base, settings
    and code give the same adapter. One ``finetune-task`` runs after another, each where its deployment does.

    Returns:
        ``trained`` and ``unchanged``: names of the task files.

    Raises:
        HydraoptError: If a task could not be trained. The others were, before this is raised.
    """
    settings = Settings.load().require_services()
    check_store(settings)
    trained, unchanged, problems = [], [], []
    for task_file in kept_task_files(settings.home):
        try:
            if _is_up_to_date(settings, task_file):
                unchanged.append(task_file.stem)
                continue
            get_run_logger().info("task %s is out of date: it is trained", task_file.stem)
            run_deployed("finetune-task", {"task_file": str(task_file)}, steps=_STEPS)
            trained.append(task_file.stem)
        except ServiceError:
            raise
        except HydraoptError as problem:
            problems.append(problem)
    if problems:
        raise type(problems[0])("; ".join(str(problem) for problem in problems))
    return {"trained": trained, "unchanged": unchanged}


def _is_up_to_date(settings: Settings, task_file: Path) -> bool:
    """Whether this very training was done before, here or elsewhere."""
    return find_trained(settings, job_from_file(task_file).task) is not None
