"""What a loaded model answers to a task's rows, batch by batch, in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hydraopt.base_models import known_tokens
from hydraopt.errors import TaskFileError
from hydraopt.evaluation.encoding import (
    answer_start,
    check_tokens,
    classification_examples,
    input_limit,
    prompt_ids,
    virtual_tokens,
)
from hydraopt.evaluation.rows import Row
from hydraopt.evaluation.task_file import TaskFile
from hydraopt.progress import Progress

_ROUNDING = 1e-3
"""Of the largest logit: a text alone and beside others differ by a millionth of it; where padding is read, by more."""


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
        TaskFileError: If the model's head does not have one output per label, or a text does not fit the model.
    """
    inputs = classification_examples(task, model, tokenizer, rows)
    predicted: list[str | None] = [None] * len(rows)

    def answer(batch: Sequence[Mapping[str, Any]]) -> Tensor:
        padded = tokenizer.pad(list(batch), padding_side="right", return_tensors="pt")
        logits: Tensor = model(**padded.to(model.device)).logits
        return logits  # (batch, labels)

    alike = _must_be_alike(model, answer, inputs, batch_size)
    for batch in _batches(task, inputs, batch_size, progress, alike=alike):
        logits = answer([inputs[row] for row in batch])
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
    """The greedy answer per row; None where a step gave NaN.

    Raises:
        TaskFileError: If the answers do not fit the model.
    """
    start = answer_start(model)
    decoder = not start
    limit = input_limit(task, model, tokenizer)
    prompts = [prompt_ids(tokenizer, task.prompt, row["input"], limit, decoder=decoder) for row in rows]
    check_tokens(task, tokenizer, prompts, known_tokens(model))
    inputs = [{"input_ids": prompt} for prompt in prompts]
    greedy = _greedy(model, tokenizer, start, task.max_new_tokens)
    # A decoder continues the last position, so the padding must stand before the prompt.
    side = "left" if decoder else "right"
    predicted: list[str | None] = [None] * len(rows)

    def generated(batch: Sequence[Mapping[str, Any]], settings: GenerationConfig, **more: Any) -> Any:
        padded = tokenizer.pad(list(batch), padding_side=side, return_tensors="pt")
        with _without_own_settings(model):
            return model.generate(**padded.to(model.device), generation_config=settings, **more)

    def first_scores(batch: Sequence[Mapping[str, Any]]) -> Tensor:
        one = _greedy(model, tokenizer, start, 1)
        one.update(output_logits=True, return_dict_in_generate=True)
        found: Tensor = generated(batch, one).logits[-1]
        return found  # (batch, words)

    alike = _must_be_alike(model, first_scores, inputs, batch_size)
    for batch in _batches(task, inputs, batch_size, progress, alike=alike):
        watch = _NanWatch(len(batch))
        answers = generated(
            [inputs[row] for row in batch], greedy, logits_processor=LogitsProcessorList([watch])
        )
        longest = max(len(prompts[row]) for row in batch)
        before = longest if decoder else len(start)
        # What stands behind a row's end is padding, which not every tokenizer knows to be special.
        kept = [_up_to_end(answer, greedy.eos_token_id or ()) for answer in answers[:, before:].tolist()]
        texts = tokenizer.batch_decode(kept, skip_special_tokens=True)
        for row, text, broken in zip(batch, texts, watch.broken.tolist(), strict=True):
            predicted[row] = None if broken else text.strip()
    return predicted


def _up_to_end(answer: list[int], ends: Collection[int]) -> list[int]:
    return answer[: next((place for place, token in enumerate(answer) if token in ends), len(answer))]


class _NanWatch(LogitsProcessor):  # type: ignore[misc]  # untyped library
    """Remembers which rows of a batch ever had a NaN among their scores; changes nothing."""

    def __init__(self, rows: int) -> None:
        self.broken = torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - the library's signature
        self.broken |= scores.isnan().any(dim=1).cpu()
        return scores


def _greedy(model: Any, tokenizer: Any, start: Sequence[int], max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding: of the base model's own settings its tokens alone.

    An answer ends with the model's end tokens and with the tokenizer's, which is what is taught in training.
    """
    own, forced = model.generation_config, start[1:]
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens + len(forced),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=own.bos_token_id,
        decoder_start_token_id=start[0] if start else None,
        forced_bos_token_id=forced[0] if forced else None,
        eos_token_id=sorted({end for end in (*ends, tokenizer.eos_token_id) if end is not None}) or None,
    )


@contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """``generate`` fills what it is not told from the model's own settings, which often sample, punish or suppress."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def _must_be_alike(
    model: Any,
    answer: Callable[[Sequence[Mapping[str, Any]]], Tensor],
    inputs: Sequence[Mapping[str, Any]],
    batch_size: int,
) -> bool:
    """Whether only rows of equal length may go together: where padding changes what a model says.

    So it does behind virtual tokens, where padding between them and a prompt would move it.
    """
    return virtual_tokens(model) > 0 or (batch_size > 1 and _reads_padding(answer, inputs))


def _reads_padding(
    answer: Callable[[Sequence[Mapping[str, Any]]], Tensor], inputs: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether a model says something else of a text that is padded: tried with the shortest and the longest.

    Most mask padding. A convolution looks over a text's end, though, and some decoders count positions from padding.
    """
    by_length = sorted(inputs, key=lambda one: len(one["input_ids"]))
    short, long = by_length[0], by_length[-1]
    if len(short["input_ids"]) == len(long["input_ids"]):
        return False
    alone, beside = answer([short])[0], answer([short, long])[0]
    least = _ROUNDING * float(alone.abs().nan_to_num().max())
    return not torch.allclose(alone, beside, rtol=_ROUNDING, atol=least, equal_nan=True)


def _batches(
    task: TaskFile,
    inputs: Sequence[Mapping[str, Sequence[int]]],
    batch_size: int,
    progress: Progress | None,
    *,
    alike: bool,
) -> Iterator[list[int]]:
    """Row numbers in batches of rows of like length, so that little is padded; reports what is done.

    Args:
        task: Named in the reports.
        inputs: The rows as token ids.
        batch_size: Rows in a batch, at most.
        progress: Told of every batch.
        alike: Whether only rows of equal length go together, so that nothing is padded.
    """
    lengths = [len(one["input_ids"]) for one in inputs]
    order = sorted(range(len(inputs)), key=lengths.__getitem__)
    equal = [list(same) for _, same in groupby(order, lengths.__getitem__)] if alike else [order]
    done = 0
    for rows in equal:
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            yield batch
            done += len(batch)
            if progress is not None:
                progress(done, len(order), f"evaluate {task.name}")
