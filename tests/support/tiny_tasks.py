"""A tiny encoder, tasks whose label follows from one word, and task files for them: seconds, not minutes."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry"],
    "metal": ["iron", "copper", "zinc", "nickel"],
    "colour": ["red", "green", "blue", "yellow"],
}
FILLERS = ["the", "a", "some", "my", "is", "was", "very", "nice", "old", "new"]
SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
TASKS = ("topic", "first", "second")


def make_encoder(folder: Path) -> Path:
    """A two-layer BERT with random weights, and a tokenizer of whole words."""
    words = [*SPECIALS, *FILLERS, *(word for topic in WORDS.values() for word in topic)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        model_max_length=64,
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    BertModel(config).save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, encoder: Path, *, seed: int = 0) -> Path:
    """A task file with rows: the label is the topic of the one word that is no filler, shifted by the task."""
    folder.mkdir(parents=True, exist_ok=True)
    shift = TASKS.index(name)
    for split, count, draw in (("train", 96, 1), ("test", 120, 2)):
        rows = _rows(count, random.Random(100 * shift + draw), shift)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}-{split}.jsonl").write_text(text)
    task = {
        "name": name,
        "application": "sorting words",
        "language": "en",
        "base_model": str(encoder),
        "kind": "classification",
        "labels": list(WORDS),
        "data": {"train": f"{name}-train.jsonl", "test": f"{name}-test.jsonl"},
        "max_length": 16,
        "lora": {"r": 8, "alpha": 16, "target_modules": ["query", "key", "value", "dense"]},
        "training": {"epochs": 6, "batch_size": 16, "learning_rate": 0.02, "seed": seed},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task))
    return path


def write_bundle_file(home: Path, encoder: Path, tasks: list[str] | None = None, **gates: float) -> Path:
    """A bundle ``tiny`` with a budget and gates that so small adapters can meet."""
    spec = {
        "name": "tiny",
        "base_model": str(encoder),
        "tasks": tasks,
        "recipe": {"budget": 0.8},
        "gates": {"max_task_drop_percent": 20, "max_mean_drop_percent": 20, "min_samples": 50, **gates},
    }
    path = home / "bundles" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(spec))
    return path


def _rows(count: int, draw: random.Random, shift: int) -> list[dict[str, str]]:
    topics = list(WORDS)
    rows = []
    for number in range(count):
        topic = number % len(topics)
        words = [*draw.sample(FILLERS, 4), draw.choice(WORDS[topics[topic]])]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": topics[(topic + shift) % len(topics)]})
    return rows
