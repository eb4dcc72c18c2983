"""Tiny random models with a tokenizer of whole words, and rows whose label follows from one word."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TOPICS = {
    "fruit": ["apple", "pear", "plum", "cherry"],
    "metal": ["iron", "copper", "zinc", "nickel"],
    "colour": ["red", "green", "blue", "yellow"],
}
FILLERS = [
    "the",
    "a",
    "some",
    "my",
    "is",
    "was",
    "very",
    "nice",
    "old",
    "new",
    "here",
    "there",
    "and",
    "with",
]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def topic_rows(count: int, seed: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    rows = []
    for index in range(count):
        label = list(TOPICS)[index % len(TOPICS)]
        words = [rng.choice(FILLERS) for _ in range(rng.randint(1, 9))]
        words.insert(rng.randint(0, len(words)), rng.choice(TOPICS[label]))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def topic_word(text: str) -> str:
    return next(word for word in text.split() if word not in FILLERS)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def word_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    words = [*SPECIALS, *FILLERS, *(word for topic in TOPICS.values() for word in topic)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ids = {special: vocabulary[special] for special in SPECIALS}
    frame = {"cls_token": "[CLS] $A [SEP]", "bos_token": "[CLS] $A"}
    single = next((template for token, template in frame.items() if token in settings), "$A [SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=list(ids.items()))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)


def save_model(kind: Any, config: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def greedy_by_hand(model: Any, ids: list[int], steps: int, end: int) -> list[int]:
    """Arg-max token by token on the bare sequence, without a cache."""
    found: list[int] = []
    with torch.inference_mode():
        while len(found) < steps and end not in found:
            found.append(int(model(input_ids=torch.tensor([ids + found])).logits[0, -1].argmax()))
    return found
