"""What a loaded model answers to a task's rows, batch by batch, in the order of the rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hydraopt.errors import TaskFileError
from hydraopt.evaluation.encoding import classification_example, input_limit, prompt_ids
from hydraopt.evaluation.rows import Row
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.progress import Progress


def predict_labels(
    task: TaskFile,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[str | None]:
    """A label per row; None where the logits are not finite, since the largest of NaNs means nothing.

    Raises:
        TaskFileError: If the model's head does not have one output per label.
    """
    limit = input_limit(model, tokenizer, task.max_length)
    inputs = [classification_example(tokenizer, row["text"], limit) for row in rows]
    predicted: list[str | None] = [None] * len(rows)
    for batch in _batches(task, inputs, batch_size, progress):
        padded = tokenizer.pad([inputs[row] for row in batch], padding_side="right", return_tensors="pt")
        logits: Tensor = model(**padded.to(model.device)).logits  # (batch, labels)
        if logits.shape[1] != len(task.labels):
            raise TaskFileError(
                f"task {task.name!r} names {len(task.labels)} labels, but the model's head has "
                f"{logits.shape[1]} outputs"
            )
        best = logits.argmax(dim=1).tolist()
        finite = logits.isfinite().all(dim=1).tolist()
        for row, label, usable in zip(batch, best, finite, strict=True):
            predicted[row] = task.labels[label] if usable else None
    return predicted


def predict_texts(
    task: TaskFile,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> list[str | None]:
    """The greedy answer per row; None where a step gave NaN."""
    decoder = not model.config.is_encoder_decoder
    limit = input_limit(model, tokenizer, task.max_length, reserved=task.max_new_tokens if decoder else 0)
    prompts = [prompt_ids(tokenizer, task.prompt, row["input"], limit, decoder=decoder) for row in rows]
    inputs = [{"input_ids": prompt} for prompt in prompts]
    greedy = _greedy(model, tokenizer, task.max_new_tokens)
    # A decoder continues the last position, so the padding must stand before the prompt.
    side = "left" if decoder else "right"
    predicted: list[str | None] = [None] * len(rows)
    for batch in _batches(task, inputs, batch_size, progress):
        padded = tokenizer.pad([inputs[row] for row in batch], padding_side=side, return_tensors="pt")
        watch = _NanWatch(len(batch))
        answers = model.generate(
            **padded.to(model.device),
            generation_config=greedy,
            logits_processor=LogitsProcessorList([watch]),
        )
        if decoder:
            answers = answers[:, padded["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        for row, text, broken in zip(batch, texts, watch.broken.tolist(), strict=True):
            predicted[row] = None if broken else text.strip()
    return predicted


class _NanWatch(LogitsProcessor):  # type: ignore[misc]  # untyped library
    """Remembers which rows of a batch ever had a NaN among their scores; changes nothing."""

    def __init__(self, rows: int) -> None:
        self.broken = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the library's signature
        self.broken |= scores.isnan().any(dim=1).cpu()
        return scores


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding.

    A value left out here would come from the base model's own settings, which often sample or punish
    repetition.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_length=0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )


def _batches(
    task: TaskFile,
    inputs: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    progress: Progress | None,
) -> Iterator[list[int]]:
    """Row numbers in batches of rows of like length, so that little is padded; reports what is done."""
    order = sorted(range(len(inputs)), key=lambda row: len(inputs[row]["input_ids"]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
        if progress is not None:
            progress(min(start + batch_size, len(order)), len(order), f"evaluate {task.name}")
