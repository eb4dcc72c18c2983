"""Ask a pulled bundle, as an application on the device would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flows.demo.material import task_files
from hydraopt import Bundle
from hydraopt.base_models import load_base
from hydraopt.errors import BundleError
from hydraopt.evaluation.evaluate import evaluate_model
from hydraopt.evaluation.gates import GateReport
from hydraopt.evaluation.task_file import TaskFile


def check_pulled(folder: Path, report: GateReport, progress: Any) -> list[str]:
    """Let the bundle answer one test row of each of two tasks, and measure one task in full.

    Raises:
        BundleError: If the pulled bundle does not score what the gates saw.
    """
    bundle = Bundle.load(folder)
    pipeline, outside = task_files()
    tasks = [TaskFile.load(path) for path in (pipeline[0], outside[0])]
    first = tasks[0]
    base = load_base(first.base_model, first.revision, "SEQ_CLS", num_labels=len(first.labels))
    model = bundle.attach(base.model)
    model.eval()

    answers = []
    for task in tasks:
        model.set_adapter(task.name)
        row = task.read_rows("test")[0]
        inputs = base.tokenizer(row["text"], return_tensors="pt", truncation=True, max_length=task.max_length)
        with torch.inference_mode():
            label = task.labels[int(model(**inputs).logits.argmax())]
        answers.append(f"{task.name}: {row['text']!r} -> {label} (expected {row['label']})")

    model.set_adapter(first.name)
    measured = evaluate_model(first, model, base.tokenizer, first.read_rows("test"), progress=progress).value
    expected = report.tasks[first.name].merged
    if expected is None or abs(measured - expected) > 1e-9:
        raise BundleError(f"the pulled bundle scores {measured} on {first.name}, its gates saw {expected}")
    return [*answers, f"{first.name}: {measured:.4f} on the device, as the gates saw"]
