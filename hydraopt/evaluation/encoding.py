"""Rows as token ids: the same rules in training and in evaluation, or the model answers another question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydraopt.base_models import known_answer_tokens, known_tokens
from hydraopt.errors import TaskFileError
from hydraopt.evaluation.rows import Row
from hydraopt.evaluation.task_file import TaskFile

IGNORED = -100
"""The label torch's cross-entropy skips."""


def input_limit(task: TaskFile, model: Any, tokenizer: Any) -> int:
    """Longest input in tokens: what the task asks for, within what the model and the tokenizer take.

    Args:
        task: Its ``max_length``, and for a decoder its ``max_new_tokens``, for which positions are kept free.
        model: A transformers or PEFT model; its configuration may name the number of positions, of which virtual
            tokens take some.
        tokenizer: May name a longest input.

    Raises:
        TaskFileError: If the model has too few positions for virtual tokens or for the task's answers.
    """
    asked = int(min(task.max_length, tokenizer.model_max_length))
    reads, says = _positions(model)
    if reads is None or says is None:
        return asked
    if min(reads, says) < 1:
        raise TaskFileError(
            f"task {task.name!r}: the adapter's {virtual_tokens(model)} virtual tokens leave no position of the base "
            f"model {task.base_model!r} for a text"
        )
    if task.kind == "classification":
        return min(asked, reads, says)  # an encoder-decoder reads the text on both sides
    start = answer_start(model)
    decoder = not start
    answer = task.max_new_tokens + max(len(start) - 1, 0)
    if says < answer + decoder:
        raise TaskFileError(
            f"task {task.name!r}: max_new_tokens is {task.max_new_tokens}, but the base model {task.base_model!r} has "
            f"only {says} positions{' for prompt and answer' if decoder else ''}; lower it"
        )
    return min(asked, reads - answer if decoder else reads)


def answer_start(model: Any) -> tuple[int, ...]:
    """What an encoder-decoder's answers begin with; nothing for a decoder, whose answers follow the prompt.

    First the token that its decoder is given, then, if its settings force one, the first token it says: a language's
    for mBART, ``<s>`` for BART.

    Raises:
        TaskFileError: If the model does not say what its decoder starts from.
    """
    if not model.config.is_encoder_decoder:
        return ()
    own = model.generation_config
    named = (
        own.decoder_start_token_id,
        getattr(model.config, "decoder_start_token_id", None),
        own.bos_token_id,
    )
    given = next((token for token in named if token is not None), None)
    if given is None:
        raise TaskFileError(
            f"base model {model.config.name_or_path!r}: its config.json has no decoder_start_token_id, the token that "
            f"{model.config.model_type} answers begin with; add it"
        )
    forced = own.forced_bos_token_id
    return (int(given),) if forced is None else (int(given), int(forced))


def virtual_tokens(model: Any) -> int:
    """How many virtual tokens the active adapter puts before every input."""
    config: Any = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0


def _positions(model: Any) -> tuple[int, int] | tuple[None, None]:
    """For how many tokens the model has position embeddings: what it reads, and what it says. None is for any number.

    Virtual tokens take some of them.
    """
    config = model.config
    both = getattr(config, "max_position_embeddings", None)
    reads, says = (
        getattr(config, f"max_{side}_position_embeddings", None)  # LED's
        or getattr(getattr(config, side, None), "max_position_embeddings", both)  # of two models put together
        for side in ("encoder", "decoder")
    )
    if not isinstance(reads, int) or not isinstance(says, int) or min(reads, says) < 1:
        return None, None
    taken = virtual_tokens(model)
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and getattr(table, "padding_idx", None) is not None:
            taken += int(table.padding_idx) + 1  # RoBERTa and its kin start behind the padding's
            break
    return reads - taken, says - taken


def classification_examples(
    task: TaskFile, model: Any, tokenizer: Any, rows: Sequence[Row]
) -> list[dict[str, Any]]:
    """What the model reads to classify each row: what the tokenizer gives, special tokens included, cut to fit.

    Raises:
        TaskFileError: If a text holds what the model takes for its end, or a token it has no embedding for.
    """
    limit = input_limit(task, model, tokenizer)
    examples = [dict(tokenizer(row["text"], truncation=True, max_length=limit)) for row in rows]
    check_tokens(task, tokenizer, [example["input_ids"] for example in examples], known_tokens(model))
    if model.config.is_encoder_decoder:  # such a classifier looks at the one end token of each text
        end = model.config.eos_token_id
        for index, example in enumerate(examples):
            if (ends := example["input_ids"].count(end)) != 1:
                raise TaskFileError(
                    f"task {task.name!r}, row {index}: {ends} end tokens, {tokenizer.convert_ids_to_tokens(end)!r}; "
                    f"{task.base_model!r} classifies by the one at the end of a text, so none may be inside"
                )
    return examples


def check_tokens(task: TaskFile, tokenizer: Any, rows: Sequence[Sequence[int]], known: int | None) -> None:
    """Check that the model has an embedding for every token; it has ``known``, or needs none.

    Raises:
        TaskFileError: If not: the tokenizer was given tokens that the model was not.
    """
    if known is None:
        return
    for index, ids in enumerate(rows):
        if strangers := [token for token in ids if token >= known]:
            token = tokenizer.convert_ids_to_tokens(strangers[0])
            raise TaskFileError(
                f"task {task.name!r}, row {index}: the tokenizer gives {token!r} the number {strangers[0]}, but the "
                f"base model {task.base_model!r} has embeddings for {known} tokens; take its own tokenizer"
            )


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
    tokenizer: Any,
    template: str,
    text: str,
    answer: str,
    *,
    limit: int,
    answer_limit: int,
    start: Sequence[int],
) -> dict[str, list[int]]:
    """``input_ids``, ``attention_mask`` and ``labels`` to learn ``answer`` from the prompt.

    For a decoder (no ``start``) the answer follows the prompt and only the answer is learnt. For an encoder-decoder
    the two are separate, and its decoder reads ``decoder_input_ids``: the labels one place later, from its start token
    on. Left to the model they would begin with another token than its answers do where the two are not the same, and
    mBART would even be shown the last label first. The answer ends with the end token where there is room for it, or
    the model would not learn to stop.
    """
    prompt = prompt_ids(tokenizer, template, text, limit, decoder=not start)
    # Answers of an encoder-decoder may have a vocabulary of their own, as Marian's have.
    given = {"text_target": answer} if start else {"text": answer}
    target = list(tokenizer(**given, add_special_tokens=False)["input_ids"])[:answer_limit]
    if tokenizer.eos_token_id is not None and len(target) < answer_limit:
        target.append(tokenizer.eos_token_id)
    if not start:
        ids = prompt + target
        return {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": [IGNORED] * len(prompt) + target,
        }
    labels = [*start[1:], *target]
    return {
        "input_ids": prompt,
        "attention_mask": [1] * len(prompt),
        "labels": labels,
        "decoder_input_ids": [start[0], *labels[:-1]],
    }


def encoded_rows(task: TaskFile, model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the model reads to learn each row of a task: token ids, masks and ``labels``.

    Args:
        task: Says how to ask.
        model: A model of the task's kind.
        tokenizer: Its tokenizer.
        rows: Canonical rows.

    Raises:
        TaskFileError: If the answers, or a text, do not fit the model.
    """
    if task.kind == "classification":
        numbers = {label: index for index, label in enumerate(task.labels)}
        examples = classification_examples(task, model, tokenizer, rows)
        return [
            example | {"labels": numbers[row["label"]]} for example, row in zip(examples, rows, strict=True)
        ]
    if getattr(model.config, "src_vocab_size", None) != getattr(model.config, "tgt_vocab_size", None):
        raise TaskFileError(
            f"task {task.name!r}: answers of {task.base_model!r} have a vocabulary of their own, in which tokenizers "
            f"of {model.config.model_type} encode nothing; take another base model"
        )
    limit, start = input_limit(task, model, tokenizer), answer_start(model)
    examples = [
        training_example(
            tokenizer,
            task.prompt,
            row["input"],
            row["target"],
            limit=limit,
            answer_limit=task.max_new_tokens,
            start=start,
        )
        for row in rows
    ]
    for part, known in (("input_ids", known_tokens(model)), ("labels", known_answer_tokens(model))):
        check_tokens(task, tokenizer, [example[part] for example in examples], known)
    return examples


def _prompt(tokenizer: Any, template: str, text: str, *, decoder: bool) -> list[int]:
    ids = list(tokenizer(template.replace("{input}", text))["input_ids"])
    if decoder and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids.pop()
    return ids
