"""A task's metric for an adapter of its own, or for its part of a bundle. One scoring core serves both.

The result does not depend on the batch size beyond rounding: padding is masked, and every row is scored
on its own.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from hydraopt.adapters import Adapter, read_adapter
from hydraopt.adapters.kinds import PROMPT_KINDS
from hydraopt.adapters.module import PREFIX, AdapterModule
from hydraopt.adapters.prompts import PROMPT_PREFIX
from hydraopt.adapters.vera import LAMBDA_B, layer_name
from hydraopt.base_models import (
    LoadedBase,
    TaskType,
    base_model_path,
    known_tokens,
    load_base,
    quiet,
)
from hydraopt.bundle import Bundle
from hydraopt.bundle.attach import attached_kind
from hydraopt.devices import find_device
from hydraopt.errors import AdapterFormatError, BundleError, HydraoptError, TaskFileError, first_line
from hydraopt.evaluation.encoding import virtual_tokens
from hydraopt.evaluation.metrics import score_labels, score_texts
from hydraopt.evaluation.predict import predict_labels, predict_texts
from hydraopt.evaluation.result import EVALUATION_RULES, Evaluation
from hydraopt.evaluation.rows import Row, references, rows_digest
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.progress import Progress


def evaluate_adapter(
    task: TaskFile,
    folder: str | Path,
    *,
    rows: Sequence[Row] | None = None,
    device: str = "auto",
    limit: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a PEFT adapter on a task.

    Args:
        task: What to measure. For classification its label i must be output i of the adapter's head.
        folder: The adapter; only safetensors are read.
        rows: Rows to use instead of the task's test rows.
        device: "auto", "cpu" or "cuda".
        limit: Use this many rows, spread evenly over all; None uses all.
        batch_size: Rows per forward pass.
        progress: Called after every batch.

    Raises:
        TaskFileError: If adapter and task do not belong together, or the rows or the base model are unusable.
        AdapterFormatError: If the folder is not an adapter, or does not fit the base model.
    """
    adapter = read_adapter(folder)
    check_base(task, adapter.base_model, adapter.revision, f"adapter {str(folder)!r}")
    task_type = _task_type(task, adapter.task_type)
    chosen = _choose_rows(task, rows, limit)
    target = find_device(device)
    base = load_base(task.base_model, task.revision, task_type, num_labels=len(task.labels) or None)
    _check_layers(adapter, base, task)
    model = _load_adapter(base.model, adapter).to(target)
    return evaluate_model(task, model, base.tokenizer, chosen, batch_size=batch_size, progress=progress)


def evaluate_bundle(
    task: TaskFile,
    bundle: Bundle | str | Path,
    *,
    rows: Sequence[Row] | None = None,
    device: str = "auto",
    limit: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a bundle on one of its tasks; see :func:`evaluate_bundle_tasks`."""
    given = None if rows is None else {task.name: rows}
    result = evaluate_bundle_tasks(
        [task], bundle, rows=given, device=device, limit=limit, batch_size=batch_size, progress=progress
    )
    return result[task.name]


def evaluate_bundle_tasks(
    tasks: Sequence[TaskFile],
    bundle: Bundle | str | Path,
    *,
    rows: Mapping[str, Sequence[Row]] | None = None,
    device: str = "auto",
    limit: int | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> dict[str, Evaluation]:
    """Score a bundle on several of its tasks. Those that fit into one model share a loaded base model.

    Args:
        tasks: Tasks of the bundle.
        bundle: A ``hydraopt.Bundle`` or the folder of one.
        rows: Rows by task name, to use instead of the tasks' test rows.
        device: "auto", "cpu" or "cuda".
        limit: Use this many rows of each task, spread evenly over all; None uses all.
        batch_size: Rows per forward pass.
        progress: Called after every batch.

    Returns:
        The evaluations by task name.

    Raises:
        TaskFileError: If a task is not in the bundle or was made for another base model, or rows are unusable.
        BundleError: If the bundle is damaged, or a task brings no head and the base model has none either.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.load(Path(bundle))
    together = _fitting_together(tasks, opened)
    chosen = {task.name: _choose_rows(task, (rows or {}).get(task.name), limit) for task in tasks}
    target = find_device(device)
    results = {}
    for (task_type, _, _), same in together.items():
        for model, tokenizer, attached in _attached(same, opened, task_type):
            model.to(target)
            for adapter, task in attached.items():
                model.set_adapter(adapter)
                results[task.name] = evaluate_model(
                    task, model, tokenizer, chosen[task.name], batch_size=batch_size, progress=progress
                )
    return results


def evaluate_model(
    task: TaskFile,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> Evaluation:
    """Score a loaded model, with whatever adapter is active in it, on canonical rows.

    Args:
        task: Says how to ask and how to score.
        model: A transformers or PEFT model of the task's kind.
        tokenizer: Its tokenizer.
        rows: At least one canonical row.
        batch_size: Rows per forward pass.
        progress: Called after every batch.

    Raises:
        TaskFileError: If the model's head does not have one output per label.
    """
    if batch_size < 1:
        raise TaskFileError(f"batch_size must be at least 1, got {batch_size}")
    model.eval()
    with quiet(), torch.inference_mode(), _told_if_it_fails(task, model, batch_size):
        if task.kind == "classification":
            predicted = predict_labels(task, model, tokenizer, rows, batch_size=batch_size, progress=progress)
            scores = score_labels(predicted, [row["label"] for row in rows])
        else:
            predicted = predict_texts(task, model, tokenizer, rows, batch_size=batch_size, progress=progress)
            scores = score_texts(predicted, [references(row) for row in rows])
    main = scores[task.metric]
    silent = sum(answer is None for answer in predicted) / len(rows)
    return Evaluation(
        task=task.name,
        metric=task.metric,
        value=main.value,
        low=main.low,
        high=main.high,
        samples=len(rows),
        metrics={name: score.value for name, score in scores.items()} | {"without_output": silent},
        data_digest=rows_digest(rows),
        rules=EVALUATION_RULES,
    )


@contextmanager
def _told_if_it_fails(task: TaskFile, model: Any, batch_size: int) -> Iterator[None]:
    """Name the task and the base model where that cannot be run.

    Many models take no virtual tokens, or no keys and values before a text: each library says so in its own way.
    """
    where = f"task {task.name!r}: the base model {task.base_model!r} cannot be run"
    try:
        yield
    except HydraoptError:
        raise
    except torch.OutOfMemoryError as reason:
        raise TaskFileError(
            f"{where} on {batch_size} rows at a time: {model.device} has too little memory; lower batch_size or take "
            "another device"
        ) from reason
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as reason:
        if virtual_tokens(model):
            raise TaskFileError(
                f"{where} behind an adapter's virtual tokens: {first_line(reason)}"
            ) from reason
        if isinstance(reason, ValueError):  # what a model refuses; anything else would be a fault of ours
            raise TaskFileError(f"{where}: {first_line(reason)}") from reason
        raise


def _choose_rows(task: TaskFile, rows: Sequence[Row] | None, limit: int | None) -> list[Row]:
    chosen = task.read_rows("test") if rows is None else task.check_rows(list(rows))
    if limit is None or limit >= len(chosen):
        return chosen
    if limit < 1:
        raise TaskFileError(f"limit must be at least 1 row, got {limit}")
    return [chosen[index * len(chosen) // limit] for index in range(limit)]


def _task_type(task: TaskFile, of_adapter: str | None) -> TaskType:
    """The kind of model to load, and whether the adapter was trained for that kind."""
    wanted = task.task_type()
    if of_adapter is not None and of_adapter != wanted:
        raise TaskFileError(
            f"task {task.name!r} is {task.kind} ({wanted}), but the adapter was trained as {of_adapter}"
        )
    return wanted


def _fitting_together(
    tasks: Sequence[TaskFile], bundle: Bundle
) -> dict[tuple[TaskType, str, int], list[TaskFile]]:
    """The tasks by kind of model, kind of adapter and, where the base model's own head is used, number of labels."""
    together: dict[tuple[TaskType, str, int], list[TaskFile]] = {}
    for task in tasks:
        entry = bundle.manifest.tasks.get(task.name)
        if entry is None:
            raise TaskFileError(
                f"the bundle has no task {task.name!r}; it has {', '.join(bundle.task_names)}"
            )
        base = bundle.manifest.base_model
        check_base(task, base.name, base.revision, "the bundle")
        labels = 0 if entry.saved_modules else len(task.labels)
        key = _task_type(task, entry.task_type), attached_kind(bundle, task.name), labels
        together.setdefault(key, []).append(task)
    return together


def check_base(task: TaskFile, base_model: str, revision: str | None, what: str) -> None:
    """Check that ``what`` was made for the task's base model.

    Raises:
        TaskFileError: If not.
    """
    same = base_model == task.base_model or (
        Path(base_model).is_dir()
        and Path(base_model).resolve() == Path(base_model_path(task.base_model)).resolve()
    )
    if not same:
        raise TaskFileError(
            f"{what} is for the base model {base_model!r}, but task {task.name!r} names {task.base_model!r}. "
            "An adapter works on its own base model only; correct base_model in one of the two."
        )
    if revision is not None and task.revision is not None and revision != task.revision:
        raise TaskFileError(
            f"{what} is for revision {revision!r} of {base_model!r}, but task {task.name!r} names {task.revision!r}"
        )


def _attached(
    tasks: Sequence[TaskFile], bundle: Bundle, task_type: TaskType
) -> Iterator[tuple[Any, Any, dict[str, TaskFile]]]:
    """Models with their tokenizers and the task of each adapter: one model, or one a task if they exclude another."""
    first = tasks[0]
    base = load_base(first.base_model, first.revision, task_type, num_labels=len(first.labels) or None)
    # Not by the tasks' names, which torch may not take.
    adapters = {f"adapter{index}": task for index, task in enumerate(tasks)}
    try:
        _check_heads(tasks, bundle, base)
        model = bundle.attach(base.model, tasks={name: task.name for name, task in adapters.items()})
    except BundleError:
        if len(tasks) == 1:
            raise
        for task in tasks:
            yield from _attached([task], bundle, task_type)
    else:
        yield model, base.tokenizer, adapters


def _check_heads(tasks: Sequence[TaskFile], bundle: Bundle, base: LoadedBase) -> None:
    """Whether every task brings the layers that the base model lacks."""
    for task in tasks:
        brought = _layers(bundle.extras(task.name), bundle.manifest.tasks[task.name].kind)
        if missing := [layer for layer in base.new_layers if layer not in brought]:
            raise BundleError(f"the bundle's task {task.name!r}: {_random(task, missing)}")


def _check_layers(adapter: Adapter, base: LoadedBase, task: TaskFile) -> None:
    """Whether every tensor of the adapter has its place, and every layer the base lacks is in the adapter."""
    # A layer that shares its weight with another, as a decoder's last with its first, has a name of its own.
    named = base.model.named_parameters(remove_duplicate=False)
    parameters = {name: tuple(value.shape) for name, value in named}
    for name, module in adapter.modules.items():
        layer = layer_name(name)
        weight = parameters.get(f"{layer}.weight")
        if module.layer == "prompt":
            _check_prompt(adapter, base, task)
        elif weight is None or not _fits(module, weight):
            size = f"{module.d_in} outputs" if module.layer == "vector" else f"{module.d_out} x {module.d_in}"
            raise AdapterFormatError(
                f"{adapter.folder}: it updates {layer!r} of size {size}, but the base model {task.base_model!r} has "
                f"{'no such layer' if weight is None else f'one of {weight}'}"
            )
    for tensor in adapter.extras:
        name = _base_name(tensor, adapter.kind)
        shape = adapter.file.entries[tensor].shape
        if parameters.get(name, shape) != shape:
            raise TaskFileError(
                f"{adapter.folder}: its layer {name!r} has shape {list(shape)}, but task {task.name!r} with "
                f"{len(task.labels)} labels needs {list(parameters[name])}"
            )
    brought = _layers(adapter.extras, adapter.kind)
    if missing := [layer for layer in base.new_layers if layer not in brought]:
        raise AdapterFormatError(f"{adapter.folder}: {_random(task, missing)}")


def _fits(module: AdapterModule, weight: tuple[int, ...]) -> bool:
    if module.layer == "vector":  # of VeRA's two vectors one is as long as the layer has outputs
        return not module.name.endswith(LAMBDA_B) or module.d_in in weight
    return sorted(weight) == sorted((module.d_out, module.d_in))


def _check_prompt(adapter: Adapter, base: LoadedBase, task: TaskFile) -> None:
    if adapter.kind != "PROMPT_TUNING":
        return
    if known_tokens(base.model) is None:
        raise AdapterFormatError(
            f"{adapter.folder}: the base model {task.base_model!r} has no table of embeddings, so it takes no virtual "
            "tokens"
        )
    width, found = base.model.get_input_embeddings().embedding_dim, adapter.settings["token_dim"]
    if found != width:
        raise AdapterFormatError(
            f"{adapter.folder}: its virtual tokens are {found} wide, but the embeddings of the base model "
            f"{task.base_model!r} are {width}"
        )


def _base_name(tensor: str, kind: str) -> str:
    """The name in the base model of a tensor that an adapter carries whole."""
    return tensor.removeprefix(PROMPT_PREFIX if kind in PROMPT_KINDS else PREFIX)


def _layers(extras: Iterable[str], kind: str) -> set[str]:
    return {_base_name(tensor, kind).rsplit(".", 1)[0] for tensor in extras}


def _random(task: TaskFile, missing: Sequence[str]) -> str:
    return (
        f"the base model {task.base_model!r} has no weights for {list(missing)} and the adapter brings none, so its "
        "results would be random. Save it with these layers in modules_to_save."
    )


def _load_adapter(model: Any, adapter: Adapter) -> Any:
    """The model with the adapter on it, frozen. Its files were checked, so PEFT opens the safetensors file."""
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # PEFT only warns when tensors are missing and goes on with random ones.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, str(adapter.folder), torch_device="cpu").eval()
        except (RuntimeError, ValueError, KeyError, UserWarning) as reason:
            raise AdapterFormatError(
                f"{adapter.folder}: PEFT cannot put it on its base model: {first_line(reason)}"
            ) from reason
