"""Fine-tune a LoRA adapter for a task, in a way that survives being killed.

Every so many steps the Trainer writes a checkpoint below ``work/<training key>/``. A run that finds whole
checkpoints there goes on from the last one and ends with the tensors it would have had without the
interruption. The adapter appears at its place in one step when it is finished, never before.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.peft_folder import CONFIG_FILE, TENSOR_FILE
from hydraopt.base_models import (
    LoadedBase,
    files_digest,
    is_head,
    load_base,
    quiet,
)
from hydraopt.devices import find_device
from hydraopt.errors import TaskFileError, first_line
from hydraopt.evaluation.encoding import IGNORED, encoded_rows
from hydraopt.evaluation.rows import Row, rows_digest
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.finite import all_finite
from hydraopt.progress import Progress
from hydraopt.training.checkpoints import MarkCheckpoints, last_whole_checkpoint, step_of
from hydraopt.training.nuclear_decay import NuclearDecay
from hydraopt.whole_folder import in_place_of, recover, write_file

TRAINING_VERSION = "4"
"""Raised whenever the same task and rows would give another adapter."""

_KEPT_CHECKPOINTS = 2  # the last one may be cut short by a kill; then the one before it counts


@dataclass(frozen=True)
class FinetuneResult:
    """A finished fine-tuning."""

    folder: Path  # the adapter: adapter_config.json and adapter_model.safetensors
    seconds: float  # of this run, loading included
    resumed_from_step: int | None  # None if it started from the beginning
    train_rows: int


def training_key(task: TaskFile) -> str:
    """SHA-256 (hex) of all that decides the adapter: the task's definition, its rows, a local base's files, this code.

    Raises:
        TaskFileError: If the training rows or the base's files cannot be read.
    """
    return _training_key(task, rows_digest(task.read_rows("train")))


def finetune(
    task: TaskFile,
    out: str | Path,
    *,
    work: str | Path,
    device: str = "auto",
    checkpoint_steps: int = 50,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train the task's adapter and write it to ``out`` as an ordinary PEFT folder.

    The same task and rows give the same tensors on the same machine. All tasks of a base model with equal
    LoRA settings start from one A, drawn from ``lora.init_seed``.

    Args:
        task: What to learn, and how.
        out: The folder to make. If it holds an adapter, that is replaced at the end.
        work: Where checkpoints are kept until the run is finished; the same folder lets a later run resume.
        device: "auto", "cpu" or "cuda".
        checkpoint_steps: Optimiser steps between checkpoints; it does not change the result.
        progress: Called after every step.

    Raises:
        TaskFileError: If the data or the base model is unusable, ``out`` holds something else, another
            process trains the same task in ``work``, or the training diverges.
        DeviceError: If there is no such device.
    """
    started = time.monotonic()
    out, work, where = Path(out), Path(work), find_device(device)
    _check_out(out)
    rows = task.read_rows("train")
    key = _training_key(task, rows_digest(rows))
    folder = work / key
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(work / f"{key}.lock", task):
        resume = last_whole_checkpoint(folder)
        if out.parent.is_dir():
            recover(out)
        with _isolated_randomness(), quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' advice to one another
            model, base = _new_adapter(task, where)
            trainer = _trainer(
                task,
                model,
                base,
                rows,
                folder=folder,
                checkpoint_steps=checkpoint_steps,
                device=where,
                progress=progress,
            )
            trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        _publish(task, model, out)
        shutil.rmtree(folder)
    step = None if resume is None else step_of(resume)
    return FinetuneResult(out, time.monotonic() - started, step, len(rows))


def _training_key(task: TaskFile, rows: str) -> str:
    parts: dict[str, Any] = {"code": TRAINING_VERSION, "task": task.definition(), "rows": rows}
    if (base := files_digest(task.base_model)) is not None:
        parts["base"] = base
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _new_adapter(task: TaskFile, device: torch.device) -> tuple[Any, LoadedBase]:
    """The base model with a fresh adapter: A from the task's init seed, B zero, head as the base is loaded."""
    task_type = task.task_type()
    # Drawn on the CPU, so that a GPU run starts from the same A.
    base = load_base(task.base_model, task.revision, task_type, num_labels=len(task.labels) or None)
    targets = task.lora.target_modules
    config = LoraConfig(
        task_type=task_type,
        r=task.lora.r,
        lora_alpha=task.lora.alpha,
        lora_dropout=task.lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=task.lora.use_rslora,
        bias="none",
        modules_to_save=_saved_layers(base) or None,
    )
    torch.manual_seed(task.lora.init_seed)
    try:
        model = get_peft_model(base.model, config)
    except ValueError as reason:
        raise TaskFileError(
            f"task {task.name!r}: lora.target_modules {targets!r} does not fit {task.base_model!r}: "
            f"{first_line(reason)}"
        ) from reason
    if task.lora.freeze_a:
        _freeze_a(task, model)
    # Left set, PEFT would ask the hub for this name at every checkpoint.
    model.peft_config["default"].base_model_name_or_path = ""
    return model.to(device), base


def _saved_layers(base: LoadedBase) -> list[str]:
    """The layers to train and save whole: random ones would differ on every device.

    A head is saved as a whole. Of one that has several layers (``classifier.dense``, ``classifier.out_proj``) PEFT
    would wrap each and then, for it saves every ``classifier``, all of them once more, and not read what it wrote.
    """
    return sorted({layer.split(".")[0] if is_head(base.model, layer) else layer for layer in base.new_layers})


def _freeze_a(task: TaskFile, model: Any) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_embedding_A." in name:
            # It starts at zero, and B's gradient with it: neither would ever move.
            module = name.removeprefix(PREFIX).partition(".lora_")[0]
            raise TaskFileError(
                f"task {task.name!r}: lora.freeze_a cannot be with {module!r} in lora.target_modules: the A of an "
                "embedding table starts at zero, so nothing would be learnt. Leave the table out, or train A, too."
            )
        if ".lora_A." in name:
            parameter.requires_grad_(requires_grad=False)


def _trainer(
    task: TaskFile,
    model: Any,
    base: LoadedBase,
    rows: Sequence[Row],
    *,
    folder: Path,
    checkpoint_steps: int,
    device: torch.device,
    progress: Progress | None,
) -> Any:
    settings = task.training
    steps = -(-len(rows) // settings.batch_size) * settings.epochs
    on_cpu = device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=int(steps * settings.warmup_ratio),
        weight_decay=settings.weight_decay,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        save_strategy="steps",
        save_steps=checkpoint_steps,
        save_total_limit=_KEPT_CHECKPOINTS,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        log_level="critical",
    )
    if arguments.n_gpu > 1:
        # The Trainer would give each card a batch of its own: other steps than the task file asks for.
        arguments._n_gpu = 1  # noqa: SLF001 - as the Trainer does for models that span cards
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=_dataset(task, model, base.tokenizer, rows),
        data_collator=_collator(task, base.tokenizer),
        callbacks=[MarkCheckpoints(), _Report(task.name, progress)],
    )
    trainer.remove_callback(PrinterCallback)
    if settings.nuclear_decay:
        # Before a checkpoint is written: what a resumed run reads has been lowered.
        trainer.add_callback(NuclearDecay(settings.nuclear_decay))
    return trainer


def _dataset(task: TaskFile, model: Any, tokenizer: Any, rows: Sequence[Row]) -> Any:
    return datasets.Dataset.from_list(encoded_rows(task, model, tokenizer, rows))


def _collator(task: TaskFile, tokenizer: Any) -> Any:
    if task.kind == "classification":
        return DataCollatorWithPadding(tokenizer)
    padded = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    if task.task_type() == "CAUSAL_LM":
        return padded

    def with_what_the_decoder_reads(examples: list[dict[str, Any]]) -> Any:
        read = [torch.tensor(example.pop("decoder_input_ids")) for example in examples]
        batch = padded(examples)
        batch["decoder_input_ids"] = pad_sequence(
            read, batch_first=True, padding_value=tokenizer.pad_token_id
        )
        return batch

    return with_what_the_decoder_reads


class _Report(TrainerCallback):  # type: ignore[misc]  # untyped library
    """Tells the caller about every step."""

    def __init__(self, task: str, progress: Progress | None) -> None:
        self._what = f"fine-tune {task}"
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        if self._progress is not None:
            self._progress(state.global_step, state.max_steps, self._what)


def _publish(task: TaskFile, model: Any, out: Path) -> None:
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Copies: a head may hold one tensor under two names, which safetensors refuses.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in sorted(state.items())}
    _check_finite(task, tensors)
    config = json.dumps(_adapter_config(task, model), indent=2, sort_keys=True)
    with in_place_of(out) as fresh:
        write_file(fresh / TENSOR_FILE, save(tensors, metadata={"format": "pt"}))
        write_file(fresh / CONFIG_FILE, f"{config}\n".encode())


def _adapter_config(task: TaskFile, model: Any) -> dict[str, Any]:
    """PEFT's configuration with the base model's own name, not the folder it was loaded from."""
    config = dict(model.peft_config["default"].to_dict())
    config |= {
        "base_model_name_or_path": task.base_model,
        "revision": task.revision,
        "inference_mode": True,
    }
    # Sets have no order of their own; sorted, the same training always writes the same bytes.
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}


def _check_finite(task: TaskFile, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise TaskFileError(
                f"task {task.name!r}: the training diverged ({name} is not finite). Lower training.learning_rate, "
                f"now {task.training.learning_rate}."
            )


def _check_out(out: Path) -> None:
    if not out.exists():
        return
    if not out.is_dir() or {file.name for file in out.iterdir()} - {CONFIG_FILE, TENSOR_FILE}:
        raise TaskFileError(f"{out}: is there already and is not just an adapter; choose another folder")


@contextlib.contextmanager
def _only_one(lock: Path, task: TaskFile) -> Iterator[None]:
    """Two runs of one training would write the same checkpoints. The lock goes with its process."""
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout as reason:
        raise TaskFileError(
            f"task {task.name!r}: another process is training it in {lock.parent}; wait for it or end it"
        ) from reason


@contextlib.contextmanager
def _isolated_randomness() -> Iterator[None]:
    """The Trainer seeds every generator of the process; the caller's go on as if nothing had happened."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the Trainer's
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with torch.random.fork_rng():
            # The CPU's algorithms all are; on a GPU the few that have no such form only warn.
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
