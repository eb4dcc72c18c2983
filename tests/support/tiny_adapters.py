"""Small adapters made without training, and bundles of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors.torch
import torch

import hydraopt

RANK, WIDTH = 4, 24


def write_adapter(folder: Path, seed: int) -> Path:
    """A PEFT folder with two small modules; equal seeds give equal adapters."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in ("q_proj", "v_proj"):
        stem = f"base_model.model.model.layers.0.self_attn.{layer}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, RANK, generator=generator)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tests/tiny",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": ["q_proj", "v_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def write_bundle(folder: Path, seed: int) -> Path:
    """A merged bundle of the tasks ``a`` and ``b`` in a new folder below ``folder``."""
    place = folder / f"bundle-{seed}-{os.urandom(3).hex()}"
    adapters = {task: write_adapter(place / task, seed + more) for task, more in (("a", 0), ("b", 1000))}
    return hydraopt.merge(adapters, budget=0.9, device="cpu").save(place / "bundle")
