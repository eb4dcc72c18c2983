"""Adapters: find, train, bring in, measure, store, register, fetch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydraopt.adapters.peft_folder import Adapter, read_adapter
from hydraopt.evaluation.evaluate import evaluate_adapter
from hydraopt.evaluation.result import Evaluation
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.training.finetune import finetune, training_key
from infra.adapter_registry import AdapterRegistry
from infra.adapter_store import (
    AdapterVersion,
    add_maker,
    fetch_adapter,
    find_adapter_version,
    find_training,
    note_training,
    store_adapter,
)
from infra.serving_record import note_serving
from infra.settings import Settings
from tasks.jobs import Job, recorded_evaluation
from tasks.store import object_store
from tasks.verb import progress, verb


@verb(task_run_name="look for a finished training of {task.name}")
def find_trained(settings: Settings, task: TaskFile) -> AdapterVersion | None:
    """The adapter version that the same data, settings and code already gave, if any."""
    return find_training(object_store(settings), training_key(task))


@verb(task_run_name="fine-tune {task.name}")
def train_adapter(settings: Settings, task: TaskFile) -> Path:
    """Train, or continue where a killed run stopped. The folder is keyed by everything that defines it."""
    work = settings.home / "work" / "training"
    out = settings.home / "work" / "trained" / training_key(task)
    if not out.is_dir():  # it appears whole or not at all
        finetune(task, out, work=work, progress=progress)
    return out


@verb(task_run_name="check adapter {folder}")
def check_adapter(folder: Path) -> Adapter:
    """Refuse a folder that is not an adapter we can read exactly, or that holds NaN or infinity."""
    adapter = read_adapter(folder)
    adapter.check_finite()
    return adapter


@verb(task_run_name="look for adapter {task_name} {adapter.digest}")
def find_stored(settings: Settings, adapter: Adapter, task_name: str) -> AdapterVersion | None:
    """The version this adapter is already stored as, if it is."""
    return find_adapter_version(object_store(settings), adapter.base_model, task_name, adapter.digest)


@verb(task_run_name="evaluate {job.task.name}")
def evaluate_own(job: Job, folder: Path, known: AdapterVersion | None = None) -> Evaluation:
    """The adapter measured on its task's test rows; not again if ``known`` holds that measurement."""
    found = recorded_evaluation(known, job) if known is not None else None
    if found is not None:
        return found
    return evaluate_adapter(job.task, folder, rows=job.rows, progress=progress)


@verb(task_run_name="store adapter {task_name}")
def keep_adapter(
    settings: Settings,
    task_name: str,
    folder: Path,
    *,
    job: Job | None,
    evaluation: Evaluation | None,
    source: str,
    trained_as: str | None = None,
    made_by: str | None = None,
) -> AdapterVersion:
    """Put an adapter, its job and its measurement into the object store."""
    store = object_store(settings)
    version = store_adapter(
        store,
        folder,
        task=task_name,
        task_definition=job.task.definition() if job else None,
        evaluation_rows=job.rows if job else None,
        own_evaluation=evaluation.model_dump(mode="json") if evaluation else None,
        source=source,
        training_key=trained_as,
        made_by=made_by,
    )
    if trained_as is not None:
        note_training(store, trained_as, version)
    return version


@verb(task_run_name="note who asked for {version.task}")
def note_maker(settings: Settings, version: AdapterVersion, made_by: str) -> AdapterVersion:
    """Remember somebody who asked for a version that was there already."""
    return add_maker(object_store(settings), version, made_by)


@verb(task_run_name="register adapter {version.task}")
def register_adapter(settings: Settings, version: AdapterVersion) -> int:
    """Show the version in MLflow and make it the serving one of its task; returns MLflow's number."""
    note_serving(object_store(settings), version.base_model, version.task, version.digest)
    return AdapterRegistry(settings).register(version, f"s3://{settings.s3_bucket}/{version.key}")


@verb(task_run_name="fetch {version.task}")
def fetch_version(settings: Settings, version: AdapterVersion) -> Path:
    """A local folder with this adapter version, from the cache if it is there whole."""
    return fetch_adapter(object_store(settings), version, settings.home / "cache" / "adapters")


def describe_version(version: AdapterVersion, number: int) -> dict[str, Any]:
    """What a flow says of an adapter version: small, and without a path of this machine."""
    own = version.own_evaluation
    return {
        "task": version.task,
        "base_model": version.base_model,
        "digest": version.digest,
        "bytes": sum(ref.bytes for ref in version.files.values()),
        "version": number,
        "metric": own["metric"] if own else None,
        "value": own["value"] if own else None,
        "samples": own["samples"] if own else None,
    }
