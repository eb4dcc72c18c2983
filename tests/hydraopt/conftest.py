"""Small adapters on disk, with dense float64 references made without the code under test; and tiny random
models with tokenizers and tasks of their own. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_models import TOPICS, save_model, topic_rows, topic_word, word_tokenizer, write_rows
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hydraopt.evaluation.task_file import TaskFile

SHAPES = {"q_proj": (12, 16), "v_proj": (8, 16), "down_proj": (16, 24)}


class Workshop:
    """Writes PEFT folders and multiplies their factors out, densely and in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adapter(self, name, *, rank=4, seed=0, layers=2, shapes=None, scale=1.0, dtype=torch.float32, shared_a=False,
                skip=(), extras=None, refactor=None, **config):  # fmt: skip
        """Write a LoRA folder. ``refactor`` is a seed: A -> G A, B -> B G^-1 with a random well-conditioned G."""
        own, common = torch.Generator().manual_seed(1 + seed), torch.Generator().manual_seed(999)
        tensors = {}
        for layer in range(layers):
            for module, (d_out, d_in) in (shapes or SHAPES).items():
                path = f"model.layers.{layer}.{module}"
                down = torch.randn(rank, d_in, generator=common if shared_a else own, dtype=torch.float64)
                if shared_a:
                    down = down + 0.2 * torch.randn(rank, d_in, generator=own, dtype=torch.float64)
                up = torch.randn(d_out, rank, generator=own, dtype=torch.float64)
                up = scale * up * torch.logspace(0, -1, rank, dtype=torch.float64)
                if path in skip:
                    continue
                if refactor is not None:
                    g = torch.randn(
                        rank, rank, generator=torch.Generator().manual_seed(refactor), dtype=torch.float64
                    )
                    g = g + 3 * torch.eye(rank, dtype=torch.float64)
                    down, up = g @ down, up @ torch.linalg.inv(g)
                tensors[f"base_model.model.{path}.lora_A.weight"] = down.to(dtype)
                tensors[f"base_model.model.{path}.lora_B.weight"] = up.to(dtype)
        tensors |= extras or {}
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny/base",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(shapes or SHAPES),
        } | config
        return self.write(name, settings, tensors)

    def write(self, name, config, tensors):
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()},
                folder / "adapter_model.safetensors",
            )
        return folder

    @staticmethod
    def dense(folder, scaling=None) -> dict[str, torch.Tensor]:
        """``s B A`` per module in float64; ``scaling`` overrides alpha / r."""
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        factor = config["lora_alpha"] / config["r"] if scaling is None else scaling
        updates = {}
        for name, down in tensors.items():
            if name.endswith("lora_A.weight"):
                up = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                updates[module] = factor * up.double() @ down.double()
        return updates

    @staticmethod
    def dense_bundle(bundle, task) -> dict[str, torch.Tensor]:
        """What a bundle stores for one task, multiplied out in float64."""
        updates = {}
        for module, parts in bundle.factors(task).items():
            product = parts[0].double()
            for part in parts[1:]:
                product = product @ part.double()
            updates[module] = product
        return updates


@pytest.fixture
def workshop(tmp_path) -> Workshop:
    return Workshop(tmp_path / "adapters")


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT without a classifier, with dropout, so that training depends on the random state."""
    folder = tmp_path_factory.mktemp("models") / "tiny-encoder"
    tokenizer = word_tokenizer(
        cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.1,  # with the usual 0.02 so small a model tells words apart too little to learn
        pad_token_id=tokenizer.pad_token_id,
    )
    save_model(BertModel, config, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama whose tokenizer has no padding token, as is usual."""
    folder = tmp_path_factory.mktemp("models") / "tiny-decoder"
    tokenizer = word_tokenizer(bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]", model_max_length=128)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    save_model(LlamaForCausalLM, config, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def tiny_seq2seq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with one layer on each side."""
    folder = tmp_path_factory.mktemp("models") / "tiny-seq2seq"
    tokenizer = word_tokenizer(eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", model_max_length=128)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    save_model(T5ForConditionalGeneration, config, tokenizer, folder)
    return folder


@pytest.fixture
def topic_task(tiny_encoder: Path, tmp_path: Path) -> Callable[..., TaskFile]:
    """Makes a classification task whose label follows from one word of the text."""

    def make(**changes: Any) -> TaskFile:
        write_rows(tmp_path / "train.jsonl", topic_rows(96, seed=1))
        write_rows(tmp_path / "test.jsonl", topic_rows(30, seed=2))
        values: dict[str, Any] = {
            "name": "topic",
            "application": "topic classification",
            "language": "en",
            "base_model": str(tiny_encoder),
            "kind": "classification",
            "labels": list(TOPICS),
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
        }
        path = tmp_path / "topic.yaml"
        path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        return TaskFile.load(path)

    return make


@pytest.fixture
def echo_task(tmp_path: Path) -> Callable[..., TaskFile]:
    """Makes a generation task: name the one word of the input that is no filler."""

    def make(base_model: Path, **changes: Any) -> TaskFile:
        rows = [{"input": row["text"], "target": topic_word(row["text"])} for row in topic_rows(60, seed=3)]
        write_rows(tmp_path / "train.jsonl", rows[:48])
        write_rows(tmp_path / "test.jsonl", rows[48:])
        values: dict[str, Any] = {
            "name": "echo",
            "application": "echo",
            "language": "en",
            "base_model": str(base_model),
            "kind": "generation",
            "prompt": "the {input} is",
            "metric": "exact_match",
            "max_length": 32,
            "max_new_tokens": 4,
            "data": {"train": "train.jsonl", "test": "test.jsonl"},
            "lora": {"r": 4, "alpha": 8},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.02},
        }
        path = tmp_path / "echo.yaml"
        path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
        return TaskFile.load(path)

    return make
