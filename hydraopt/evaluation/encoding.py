"""Rows as token ids: the same rules in training and in evaluation, or the model answers another question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydraopt.evaluation.rows import Row
from hydraopt.evaluation.task_file import TaskFile

IGNORED = -100
"""The label torch's cross-entropy skips."""


def input_limit(model: Any, tokenizer: Any, asked: int, *, reserved: int = 0) -> int:
    """Longest input in tokens: what the task asks for, within what the model and the tokenizer take.

    Args:
        model: Its configuration may name the number of positions.
        tokenizer: May name a longest input.
        asked: The task's ``max_length``.
        reserved: Positions a decoder needs for its answer.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    room = positions - reserved if isinstance(positions, int) and positions > reserved else asked
    return int(min(asked, room, tokenizer.model_max_length))


def classification_example(tokenizer: Any, text: str, limit: int) -> dict[str, Any]:
    """What the tokenizer gives for a text, special tokens included, cut to ``limit`` tokens."""
    return dict(tokenizer(text, truncation=True, max_length=limit))


def prompt_ids(tokenizer: Any, template: str, text: str, limit: int, *, decoder: bool) -> list[int]:
    """Token ids of the prompt ``template`` filled with ``text``.

    Args:
        tokenizer: The model's tokenizer.
        template: Holds ``{input}``; other braces are left as they are.
        text: The row's input. It is shortened at its end until the prompt fits, so that instructions
            after it survive.
        limit: Longest prompt in tokens.
        decoder: Whether the answer continues the prompt, so that the prompt must not end with an end token.
    """
    ids = _prompt(tokenizer, template, text, decoder=decoder)
    while len(ids) > limit and text:
        text = text[: min(len(text) - 1, len(text) * limit // len(ids))]
        ids = _prompt(tokenizer, template, text, decoder=decoder)
    return ids[-limit:]


def training_example(
    tokenizer: Any, template: str, text: str, answer: str, *, limit: int, answer_limit: int, decoder: bool
) -> dict[str, list[int]]:
    """``input_ids``, ``attention_mask`` and ``labels`` to learn ``answer`` from the prompt.

    For a decoder the answer follows the prompt and only the answer is learnt; for an encoder-decoder the
    two are separate. The answer ends with the end token, or the model would not learn to stop.
    """
    prompt = prompt_ids(tokenizer, template, text, limit, decoder=decoder)
    target = list(tokenizer(answer, add_special_tokens=False)["input_ids"])[: answer_limit - 1]
    if tokenizer.eos_token_id is not None:
        target.append(tokenizer.eos_token_id)
    ids = prompt + target if decoder else prompt
    labels = [IGNORED] * len(prompt) + target if decoder else target
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encoded_rows(task: TaskFile, model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the model reads to learn each row of a task: token ids, masks and ``labels``.

    Args:
        task: Says how to ask.
        model: A model of the task's kind.
        tokenizer: Its tokenizer.
        rows: Canonical rows.
    """
    decoder = not model.config.is_encoder_decoder
    if task.kind == "classification":
        limit = input_limit(model, tokenizer, task.max_length)
        numbers = {label: index for index, label in enumerate(task.labels)}
        return [
            classification_example(tokenizer, row["text"], limit) | {"labels": numbers[row["label"]]}
            for row in rows
        ]
    limit = input_limit(model, tokenizer, task.max_length, reserved=task.max_new_tokens if decoder else 0)
    return [
        training_example(
            tokenizer,
            task.prompt,
            row["input"],
            row["target"],
            limit=limit,
            answer_limit=task.max_new_tokens,
            decoder=decoder,
        )
        for row in rows
    ]


def _prompt(tokenizer: Any, template: str, text: str, *, decoder: bool) -> list[int]:
    ids = list(tokenizer(template.replace("{input}", text))["input_ids"])
    if decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
