"""A job: what a task file says plus the rows it is measured on, from a file or from the store."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.result import EVALUATION_RULES, Evaluation
from hydraopt.evaluation.rows import rows_digest
from hydraopt.evaluation.task_file import TaskFile
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import AdapterVersion, load_adapter_version, read_evaluation_rows
from infra.settings import Settings
from tasks.store import object_store
from tasks.verb import verb


class Job(NamedTuple):
    """How a task is measured."""

    task: TaskFile
    rows: list[dict[str, Any]]

    @property
    def data_digest(self) -> str:
        """SHA-256 (hex) of the rows, as an :class:`Evaluation` states it."""
        return rows_digest(self.rows)


def job_from_file(path: Path, task_name: str | None = None) -> Job:
    """The job of a task file, with its test rows.

    Raises:
        TaskFileError: If the file or its test rows cannot be used, or it is about another task than
            ``task_name``.
    """
    task = TaskFile.load(path)
    if task_name is not None and task.name != task_name:
        raise TaskFileError(f"{path} is about task {task.name!r}, not {task_name!r}: give one name for both")
    return Job(task, task.read_rows("test"))


def recorded_job(settings: Settings, version: AdapterVersion) -> Job | None:
    """The job an adapter version was stored with; None if it came without a task file."""
    rows = read_evaluation_rows(object_store(settings), version)
    if version.task_definition is None or rows is None:
        return None
    return Job(TaskFile.from_definition(version.task_definition), rows)


def recorded_evaluation(version: AdapterVersion, job: Job) -> Evaluation | None:
    """The version's own measurement, if it is of this very job and under today's rules."""
    if version.own_evaluation is None or version.task_definition != job.task.definition():
        return None
    evaluation = Evaluation.model_validate(version.own_evaluation)
    wanted = (job.data_digest, EVALUATION_RULES)
    return evaluation if (evaluation.data_digest, evaluation.rules) == wanted else None


@verb(task_run_name="look up how {task_name} is measured")
def serving_job(settings: Settings, base_model: str, task_name: str) -> Job | None:
    """The job of the task's serving adapter version, if there is one."""
    digest = AdapterRegistry(settings).serving(base_model).get((base_model, task_name))
    if digest is None:
        return None
    return recorded_job(settings, load_adapter_version(object_store(settings), base_model, task_name, digest))
