"""What the demo works on: its task files, its bundle, its approver's key, and the update it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hydraopt.atomic_files import write_atomically
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.evaluation.yaml_file import read_yaml
from hydraopt.training.finetune import finetune, training_key
from infra.approvers import trust
from infra.settings import Settings
from infra.signatures import generate_key, load_private_key, public_key_pem

BUNDLE = "demo"
CHANNEL = "stable"
APPROVER = "demo-release-manager"
_BUDGET = 0.25
_TRAINED_ELSEWHERE = 2
_UPDATED = "it-helpdesk"
_TASKS = Path(__file__).parent / "tasks"


def task_files() -> tuple[list[Path], list[Path]]:
    """The task files to fine-tune in the pipeline, and those whose adapters come from outside."""
    found = sorted(_TASKS.glob("*.yaml"))
    return found[:-_TRAINED_ELSEWHERE], found[-_TRAINED_ELSEWHERE:]


def describe_bundle(settings: Settings) -> Path:
    """Write the demo's bundle file.

    It names every task, so a reconcile that the schedule starts half-way has nothing to merge yet.
    """
    pipeline, outside = task_files()
    tasks = [TaskFile.load(path) for path in (*pipeline, *outside)]
    spec = {
        "name": BUNDLE,
        "base_model": tasks[0].base_model,
        "tasks": [task.name for task in tasks],
        "recipe": {"budget": _BUDGET},
        "gates": {
            "max_storage_ratio": _BUDGET,
            "max_task_drop_percent": 5,
            # Measured: 0.2. Other processors round differently while training, and one row is 0.1 here.
            "max_mean_drop_percent": 1,
            "min_samples": 100,
        },
        "channel": CHANNEL,
    }
    path = settings.home / "bundles" / f"{BUNDLE}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(spec, sort_keys=False).encode())
    return path


def approver_key(settings: Settings) -> Path:
    """The private key of the demo's approver, made at the first run; the machine trusts it."""
    path = settings.home / "demo" / f"{APPROVER}.pem"
    if not path.exists():
        generate_key(path)
    trust(settings.home, APPROVER, public_key_pem(load_private_key(path)))
    return path


def train_elsewhere(settings: Settings, task_file: Path, progress: Any) -> Path:
    """An adapter made with the library alone, as another team would; kept under its training key."""
    task = TaskFile.load(task_file)
    out = settings.home / "demo" / "adapters" / f"{task.name}-{training_key(task)[:12]}"
    if not out.is_dir():
        finetune(task, out, work=settings.home / "work" / "training", progress=progress)
    return out


def task_to_update() -> Path:
    """The task file whose adapter the demo updates, whichever process trained it first."""
    pipeline, _ = task_files()
    return next((path for path in pipeline if path.stem == _UPDATED), pipeline[0])


def updated_task_file(settings: Settings, task_file: Path) -> Path:
    """The same task trained a little longer: one more epoch."""
    content = read_yaml(task_file)
    content["training"]["epochs"] += 1
    for split in ("train", "validation", "test"):
        if split in content["data"]:
            content["data"][split] = str((task_file.parent / content["data"][split]).resolve())
    path = settings.home / "demo" / "updates" / task_file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(content, sort_keys=False).encode())
    return path
